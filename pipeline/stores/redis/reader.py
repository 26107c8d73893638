"""Reading what agents keep, from outside: without a fence, without finishing anything, without waiting for a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from millpond.agents.reads import Read
from millpond.pipeline.stores.redis.connection import Address, RedisCommand, pack
from millpond.pipeline.stores.redis.inspection import (
    InspectionRead,
    outside_answer,
    outside_command,
)
from millpond.pipeline.stores.redis.nodes import Nodes
from millpond.pipeline.stores.redis.reads import answer, read_command
from millpond.pipeline.stores.registry import access_of, addresses, locate
from millpond.schemas.keys import Partition
from millpond.schemas.rules.pool import Pool


class StoreReader:
    """Answers reads of any partition of one pool; a context manager.

    Raises:
        StoreDown, StoreRefused: at once, when the store is away or will not serve us.
    """

    def __init__(self, pool: Pool) -> None:
        """Connected when it is entered."""
        self._pool, self._access = pool, access_of(pool)
        self._nodes = Nodes(addresses(pool), self._access)
        self._server: Address | None = None  # None: a cluster, whose nodes tell who holds a key

    async def __aenter__(self) -> Self:
        if self._pool.type == "cluster":
            await self._nodes.discover()
        else:
            self._server = await locate(self._pool, self._access)
            await self._nodes.connection(self._server)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._nodes.close()

    async def read(self, partition: Partition, reads: Sequence[Read | InspectionRead]) -> list[Any]:
        """See `millpond.agents.ports.Store.read`; all are sent at once."""
        commands = [_command(partition, read) for read in reads]
        if self._server is None:
            replies = await self._nodes.run(commands)
        else:
            connection = await self._nodes.connection(self._server)
            replies = await connection.send(b"".join(map(pack, commands)), len(commands))
        where = self._server or "the cluster"
        return [_answer(read, reply, where) for read, reply in zip(reads, replies, strict=True)]


def _command(partition: Partition, read: Read | InspectionRead) -> RedisCommand:
    if isinstance(read, InspectionRead):
        return outside_command(partition, read)
    return read_command(partition, read)


def _answer(read: Read | InspectionRead, reply: Any, where: object) -> Any:
    if isinstance(read, InspectionRead):
        return outside_answer(read, reply, where)
    return answer(read, reply, where)
