"""Reads of an agent's state by other processes: commands of the CLI and the web page.

A reader has no fence, changes nothing, and does not wait for a store that is down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Self

from millpond.agents.reads import Read
from millpond.pipeline.stores.redis.connection import COMMAND_TIMEOUT_S, Address, RedisCommand, pack
from millpond.pipeline.stores.redis.foreign_keys import foreign_key, is_wrong_type
from millpond.pipeline.stores.redis.inspection import (
    InspectionRead,
    inspection_answer,
    inspection_command,
)
from millpond.pipeline.stores.redis.location import access_of, addresses, locate
from millpond.pipeline.stores.redis.nodes import Nodes
from millpond.pipeline.stores.redis.reads import answer, read_command
from millpond.schemas.keys import Partition
from millpond.schemas.rules.pool import Pool

FOREIGN_KEYS_MAX: Final = 20  # remembered by one reader, and so shown in one answer


class StoreReader:
    """Answers reads of every partition of one pool. It is a context manager.

    Raises:
        StoreDown, StoreRefused: the store is down, or refuses the user. Nothing is retried.
    """

    def __init__(self, pool: Pool) -> None:
        """Nothing connects before the context is entered."""
        self._pool = pool
        self._access = access_of(pool)._replace(reply_timeout_s=COMMAND_TIMEOUT_S)
        self._nodes = Nodes(addresses(pool), self._access)
        # None for a cluster: `_nodes` then finds the server of each key.
        self._server: Address | None = None
        # The first public keys of another type that were read: key → what is to be said of it.
        self.foreign_keys: dict[str, str] = {}

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
        """Answer reads in order, in one round trip."""
        commands = [_command(partition, read) for read in reads]
        if self._server is None:
            replies = await self._nodes.run(commands)
        else:
            connection = await self._nodes.connection(self._server)
            replies = await connection.send(b"".join(map(pack, commands)), len(commands))
        for (_, key, *_), reply in zip(commands, replies, strict=True):
            # A private key of another type is an error below.
            if is_wrong_type(reply) and len(self.foreign_keys) < FOREIGN_KEYS_MAX:
                self.foreign_keys[str(key)] = foreign_key(str(key), reply)
        where = self._server or "the cluster"
        return [_answer(read, reply, where) for read, reply in zip(reads, replies, strict=True)]


def _command(partition: Partition, read: Read | InspectionRead) -> RedisCommand:
    if isinstance(read, InspectionRead):
        return inspection_command(partition, read)
    return read_command(partition, read)


def _answer(read: Read | InspectionRead, reply: Any, where: object) -> Any:
    if isinstance(read, InspectionRead):
        return inspection_answer(read, reply, where)
    return answer(read, reply, where)
