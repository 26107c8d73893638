"""A Redis database seen from outside: which keys there are, and what they hold."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, cast

from hiredis import ReplyError

from millpond.pipeline.stores.redis.connection import (
    Connection,
    RedisCommand,
    checked,
    pack,
    store_error,
)
from millpond.pipeline.stores.registry import connector
from millpond.schemas.errors import StoreRefused
from millpond.schemas.rules.pool import Pool

SCANNED: Final = 1_000  # keys of one answer, about


def glob(text: str) -> str:
    """A pattern that matches this very text."""
    return "".join(f"\\{each}" if each in "*?[]\\" else each for each in text)


class Keyspace:
    """One connection to one server and database."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.where = connection.address

    async def ask(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """The replies, in order; one that only concerns its key is an error among them.

        Raises:
            StoreDown, StoreRefused: the server is away, or will not serve us.
        """
        replies = await self._connection.send(b"".join(map(pack, commands)), len(commands))
        for reply in replies:
            if isinstance(reply, ReplyError):
                error = store_error(reply, self.where)
                if error is not None:
                    raise error
        return replies

    async def at_once(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """The same, all of one moment."""
        data = [pack(("MULTI",)), *map(pack, commands), pack(("EXEC",))]
        *_, executed = await self._connection.send(b"".join(data), len(commands) + 2)
        checked((executed,), self.where)
        return cast(list[Any], executed)

    async def get(self, *command: Any) -> Any:
        """The reply to one command, which is no error."""
        return checked(await self._connection.call(*command), self.where)[0]

    async def scan(self, prefix: str) -> AsyncIterator[list[bytes]]:
        """All keys that begin so, page by page; one that comes or goes meanwhile may be missed, or told twice."""
        cursor: Any = 0
        while True:
            cursor, found = await self.get(
                "SCAN", cursor, "MATCH", f"{glob(prefix)}*", "COUNT", SCANNED
            )
            if found:
                yield found
            if int(cursor) == 0:
                return

    async def identity(self) -> tuple[str, int]:
        """Which server this is, wherever it is reached, and which database of it."""
        told = (await self.get("INFO", "server")).decode()
        run_id = next(
            line.partition(":")[2].strip()
            for line in told.splitlines()
            if line.startswith("run_id:")
        )
        client = (await self.get("CLIENT", "INFO")).decode()
        database = next(part[3:] for part in client.split() if part.startswith("db="))
        return run_id, int(database)

    async def check_primary(self) -> None:
        """Whether it takes writes.

        Raises:
            StoreRefused: it is a replica.
        """
        role = await self.get("ROLE")
        if role[0] != b"master":
            raise StoreRefused(f"{self.where} is a replica")


@asynccontextmanager
async def keyspace(pool: Pool) -> AsyncIterator[Keyspace]:
    """A connection to the one server of a pool.

    Raises:
        StoreDown, StoreRefused: it is away, or will not let us in.
    """
    connection = await connector(pool)()
    try:
        yield Keyspace(connection)
    finally:
        await connection.close()
