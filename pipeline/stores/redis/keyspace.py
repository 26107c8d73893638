"""A Redis database as a set of keys, for commands that compare, fill or empty it: replay, rebuild, --diff."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any, Final, cast

import msgspec
from hiredis import ReplyError

from millpond.agents.ports import Applied
from millpond.pipeline.stores.redis.connection import (
    Connection,
    RedisCommand,
    checked,
    escape_glob,
    pack,
    store_error,
)
from millpond.pipeline.stores.redis.location import connector
from millpond.pipeline.stores.redis.packing import decode_applied
from millpond.pipeline.stores.redis.role import is_replica
from millpond.schemas import keys
from millpond.schemas.errors import MillpondError, StoreRefused
from millpond.schemas.keys import Partition
from millpond.schemas.rules.pool import Pool

SCAN_COUNT: Final = 1_000  # keys of one page, about
PROBE_LIFETIME_MS: Final = (
    60_000  # of a key that a killed process leaves behind; a slow answer comes sooner
)


class Keyspace:
    """One database of one server, through one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.where = connection.address

    async def run(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """Run commands in one round trip, and return the replies in order.

        An error about one key is returned among the replies.

        Raises:
            StoreDown, StoreRefused: the connection is lost, or an error about the server.
        """
        replies = await self._connection.send(b"".join(map(pack, commands)), len(commands))
        for reply in replies:
            if isinstance(reply, ReplyError):
                error = store_error(reply, self.where)
                if error is not None:
                    raise error
        return replies

    async def run_atomically(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """Run commands in one transaction, so that all replies are of one moment. Otherwise like `run`."""
        data = [pack(("MULTI",)), *map(pack, commands), pack(("EXEC",))]
        *_, executed = await self._connection.send(b"".join(data), len(commands) + 2)
        checked((executed,), self.where)
        return cast(list[Any], executed)

    async def call(self, *command: Any) -> Any:
        """Run one command, and return its reply.

        Raises:
            StoreDown, StoreRefused: the connection is lost, or the reply is an error.
        """
        return checked(await self._connection.call(*command), self.where)[0]

    async def scan(self, prefix: str) -> AsyncIterator[list[bytes]]:
        """Return all keys with a prefix, page by page. A key may occur twice, and a key that changes meanwhile may be missing."""
        cursor: Any = 0
        while True:
            cursor, found = await self.call(
                "SCAN", cursor, "MATCH", f"{escape_glob(prefix)}*", "COUNT", SCAN_COUNT
            )
            if found:
                yield found
            if int(cursor) == 0:
                return

    async def is_same_database(self, other: Keyspace, app: str) -> bool:
        """True if both are one database of one server, under any two addresses.

        A value that one writes and the other reads tells. It needs no permission that Millpond does not need anyway.
        """
        name, value = keys.probe(app), token_hex(16).encode()
        await self.call("SET", name, value, "PX", PROBE_LIFETIME_MS)
        try:
            return bool(await other.call("GET", name) == value)
        finally:
            await self.call("DEL", name)

    async def check_primary(self) -> None:
        """Check that the server takes writes.

        Raises:
            StoreRefused: it is a replica.
        """
        if await is_replica(self._connection):
            raise StoreRefused(f"{self.where} is a replica: name its primary")

    def decode_fence(self, partition: Partition, reply: Any) -> Applied:
        """Decode the reply to a GET of a partition's fence.

        Raises:
            MillpondError: the key does not hold a fence.
        """
        try:
            return decode_applied(reply)
        # TypeError: the reply is an error, because the key is no string.
        except (msgspec.DecodeError, TypeError) as error:
            raise MillpondError(
                f"{self.where} holds no fence in {keys.applied(partition)}: {error}"
            ) from error

    def check_cluster(self, partition: Partition, fence: Applied, cluster_id: str) -> None:
        """Check that a partition's state came from this Kafka cluster.

        Raises:
            MillpondError: it came from another one.
        """
        if fence.cluster_id != cluster_id:
            raise MillpondError(
                f"{self.where} holds the state of {partition} of Kafka cluster {fence.cluster_id},"
                f" but this is cluster {cluster_id}"
            )


@asynccontextmanager
async def keyspace(pool: Pool) -> AsyncIterator[Keyspace]:
    """Connect to the one server of a pool, or to its primary.

    Raises:
        StoreDown, StoreRefused: the server is down, or refuses the user.
    """
    connection = await connector(pool)()
    try:
        yield Keyspace(connection)
    finally:
        await connection.close()
