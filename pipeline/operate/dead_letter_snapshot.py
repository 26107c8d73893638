"""A snapshot of dead letters: each once, in the order in which they died.

It is a temporary file, so a million dead letters take no memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self, cast

import msgspec

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import AgentName

WRITTEN_AT_ONCE: Final = 1_000  # rows of one transaction

# UNIQUE, because a scan of a table that changes meanwhile may return a dead letter twice.
_CREATE: Final = """
CREATE TABLE dead (agent TEXT, message_id TEXT, at INTEGER, packed BLOB, UNIQUE (agent, message_id))
"""
_INSERT: Final = "INSERT OR IGNORE INTO dead VALUES (?, ?, ?, ?)"
_IN_ORDER: Final = "SELECT agent, packed FROM dead ORDER BY at, message_id"
_NEWEST: Final = "SELECT agent, packed FROM dead ORDER BY at DESC, message_id DESC LIMIT ?"

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(DeadMessage).decode


class DeadLetterSnapshot:
    """A private file in the system's temporary directory. A context manager, which deletes the file at its end.

    Raises:
        MillpondError: the directory has no space left.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode", "synchronous"):
            # After a crash the file is useless anyway.
            self._database.execute(f"PRAGMA {setting} = OFF")
        self._database.execute(_CREATE)
        self._unwritten: list[tuple[AgentName, str, int, bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._database.close()

    def add(self, agent: AgentName, dead: DeadMessage) -> None:
        """Add a dead letter, unless the snapshot has it."""
        self._unwritten.append((agent, dead.message_id, dead.at, _encode(dead)))
        if len(self._unwritten) >= WRITTEN_AT_ONCE:
            self._write()

    def _write(self) -> None:
        try:
            self._database.execute("BEGIN")
            self._database.executemany(_INSERT, self._unwritten)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise MillpondError(
                f"cannot write dead letters to a temporary file: {error}; free space, or set another TMPDIR"
            ) from error
        self._unwritten.clear()

    def __len__(self) -> int:
        self._write()
        (count,) = self._database.execute("SELECT count(*) FROM dead").fetchone()
        return cast(int, count)

    def __iter__(self) -> Iterator[tuple[AgentName, DeadMessage]]:
        """All dead letters, the oldest first."""
        self._write()
        return map(_found, self._database.execute(_IN_ORDER))

    def newest(self, limit: int) -> list[tuple[AgentName, DeadMessage]]:
        """The newest dead letters, at most `limit`, the newest last."""
        self._write()
        return [_found(row) for row in self._database.execute(_NEWEST, (limit,))][::-1]


def _found(row: tuple[AgentName, bytes]) -> tuple[AgentName, DeadMessage]:
    agent, packed = row
    return agent, _decode(packed)
