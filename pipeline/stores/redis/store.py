"""A partition on one Redis server, named by address or found through Sentinel: everything is one transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from redis.backoff import EqualJitterBackoff

from millpond.agents.effects import Refusal
from millpond.agents.ports import LoadedState, Transaction
from millpond.agents.reads import Read
from millpond.pipeline.clock import now_ms
from millpond.pipeline.stores.redis.connection import Connection, pack
from millpond.pipeline.stores.redis.fence import Fence, Packed
from millpond.pipeline.stores.redis.packing import BatchCommands
from millpond.pipeline.stores.redis.reads import answer, read_command
from millpond.schemas.errors import StoreDown
from millpond.schemas.keys import Partition

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# Between attempts to reach a store that is down: doubling from 0.05 s up to 2 s, half of it by chance, so that a
# server that comes back is found soon and not met by every partition at once.
BACKOFF_BASE_S, BACKOFF_MAX_S, BACKOFF_DOUBLINGS_MAX = 0.05, 2.0, 8


async def until_up(attempt: Callable[[], Awaitable[Result]], partition: Partition) -> Result:
    """Try until the store is not down; says so once."""
    backoff, failures = EqualJitterBackoff(cap=BACKOFF_MAX_S, base=BACKOFF_BASE_S), 0
    while True:
        try:
            result = await attempt()
        except StoreDown as error:
            if not failures:
                log.warning("%s: %s; trying until it is back", partition, error)
            failures += 1
            await asyncio.sleep(backoff.compute(min(failures, BACKOFF_DOUBLINGS_MAX)))
        else:
            if failures:
                log.info("%s: the store is back", partition)
            return result


class RedisStore:
    """See `millpond.agents.ports.Store`. One connection, one transaction on its way at a time."""

    def __init__(self, partition: Partition, connect: Callable[[], Awaitable[Connection]]) -> None:
        """`connect` opens a connection to the server that is the primary now."""
        self._partition, self._connect = partition, connect
        self._connection: Connection | None = None
        # None before `load`, while a commit is on its way, and after one that failed.
        self._fence: Fence | None = None

    async def load(self) -> LoadedState:
        return await until_up(self._load, self._partition)

    async def _load(self) -> LoadedState:
        await self.close()
        self._connection = await self._connect()
        fence = Fence(self._connection, self._partition)
        stored, _ = await fence.load()
        self._fence = fence
        return stored

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        """See `millpond.agents.ports.Store`. Answered after what is on its way, on the same connection."""
        assert self._connection is not None, "load() comes first"
        commands = [read_command(self._partition, read) for read in reads]
        replies = await self._connection.send(b"".join(map(pack, commands)), len(commands))
        where = self._connection.address
        return [answer(read, reply, where) for read, reply in zip(reads, replies, strict=True)]

    def pack(self, transaction: Transaction) -> Packed:
        commands = BatchCommands(self._partition, transaction, now_ms()).all()
        return Packed(transaction.expected, commands, commands.packed())

    def commit(self, packed: Packed) -> Awaitable[Sequence[Refusal]]:
        fence, self._fence = self._fence, None
        assert fence is not None, (
            "load() comes first, and after every failure; one commit at a time"
        )
        return asyncio.ensure_future(self._result(fence, packed, fence.send(packed)))

    async def _result(
        self, fence: Fence, packed: Packed, sent: asyncio.Future[list[Any]]
    ) -> Sequence[Refusal]:
        refused = await fence.result(packed, sent)
        self._fence = fence
        return refused

    async def check(self) -> None:
        fence, self._fence = self._fence, None
        assert fence is not None, (
            "load() comes first, and after every failure; one commit at a time"
        )
        await fence.verify()
        self._fence = fence

    async def close(self) -> None:
        self._fence = None
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
