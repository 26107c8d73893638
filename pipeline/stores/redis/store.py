"""A partition on one Redis server, which has an address or is found through Sentinel. A batch is one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from millpond.agents.effects import Refusal
from millpond.agents.ports import LoadedState, Transaction
from millpond.agents.reads import Read
from millpond.pipeline.clock import now_ms
from millpond.pipeline.stores.redis.connection import Connection, pack
from millpond.pipeline.stores.redis.fence import Fence, Packed
from millpond.pipeline.stores.redis.packing import BatchCommands
from millpond.pipeline.stores.redis.reads import answer, read_command
from millpond.pipeline.stores.retries import Retries, until_up
from millpond.schemas.keys import Partition

NOT_LOADED: Final = "call load() first, and again after every failure; one commit at a time"


class RedisStore:
    """See `millpond.agents.ports.Store`. It has one connection, and at most one transaction in flight."""

    def __init__(self, partition: Partition, connect: Callable[[], Awaitable[Connection]]) -> None:
        """`connect` opens a connection to the current primary."""
        self._partition, self._connect = partition, connect
        self._connection: Connection | None = None
        self._retries = Retries()
        # None before `load`, during a commit, and after a failure.
        self._fence: Fence | None = None

    async def load(self) -> LoadedState:
        # A store that was loaded, and then refused the transaction, is not loaded again at once.
        await self._retries.pause()
        return await until_up(self._load, self._partition, self._retries)

    async def _load(self) -> LoadedState:
        await self.close()
        self._connection = await self._connect()
        fence = Fence(self._connection, self._partition)
        stored, _ = await fence.load()
        self._fence = fence
        return stored

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        """See `millpond.agents.ports.Store`. The answers come after those of the transaction in flight."""
        assert self._connection is not None, NOT_LOADED
        commands = [read_command(self._partition, read) for read in reads]
        where = self._connection.address
        with self._retries.counting(success=False):
            replies = await self._connection.send(b"".join(map(pack, commands)), len(commands))
            return [answer(read, reply, where) for read, reply in zip(reads, replies, strict=True)]

    def pack(self, transaction: Transaction) -> Packed:
        commands = BatchCommands(self._partition, transaction, now_ms()).all()
        return Packed(transaction.expected, commands, commands.packed())

    def commit(self, packed: Packed) -> Awaitable[Sequence[Refusal]]:
        fence, self._fence = self._fence, None
        assert fence is not None, NOT_LOADED
        # `fence.send` writes now, before the task begins.
        return asyncio.ensure_future(self._result(fence, packed, fence.send(packed)))

    async def _result(
        self, fence: Fence, packed: Packed, sent: asyncio.Future[list[Any]]
    ) -> Sequence[Refusal]:
        with self._retries.counting():
            refused = await fence.result(packed, sent)
        # Not reached after an error or a cancellation: the store must then load again.
        self._fence = fence
        return refused

    async def check(self) -> None:
        fence, self._fence = self._fence, None
        assert fence is not None, NOT_LOADED
        with self._retries.counting():
            await fence.verify()
        self._fence = fence

    async def close(self) -> None:
        self._fence = None
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
