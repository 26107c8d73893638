"""Dead letters as they were at one time: sorted, each once, on disk, so that a million take no memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self, cast

import msgspec

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import AgentName

WRITTEN_AT_ONCE: Final = 1_000

# An agent's id is unique, because a store that is changed while it is read may tell the same twice.
_CREATE: Final = """
CREATE TABLE dead (agent TEXT, message_id TEXT, at INTEGER, packed BLOB, UNIQUE (agent, message_id))
"""
_INSERT: Final = "INSERT OR IGNORE INTO dead VALUES (?, ?, ?, ?)"
_IN_ORDER: Final = "SELECT agent, packed FROM dead ORDER BY at, message_id"
_NEWEST: Final = "SELECT agent, packed FROM dead ORDER BY at DESC, message_id DESC LIMIT ?"

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(DeadMessage).decode


class DeadLetterSnapshot:
    """A private file in the system's temporary directory, gone when it is closed; a context manager.

    Raises:
        MillpondError: the directory has no room.
    """

    def __init__(self) -> None:
        """Empty."""
        self._database = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode", "synchronous"):
            self._database.execute(f"PRAGMA {setting} = OFF")  # nobody needs it after a crash
        self._database.execute(_CREATE)
        self._new: list[tuple[AgentName, str, int, bytes]] = []

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
        """One more, unless it is there."""
        self._new.append((agent, dead.message_id, dead.at, _encode(dead)))
        if len(self._new) >= WRITTEN_AT_ONCE:
            self._write()

    def _write(self) -> None:
        try:
            self._database.execute("BEGIN")
            self._database.executemany(_INSERT, self._new)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise MillpondError(
                f"the dead letters need a temporary file: {error}; make room, or name another directory in TMPDIR"
            ) from error
        self._new.clear()

    def __len__(self) -> int:
        self._write()
        (count,) = self._database.execute("SELECT count(*) FROM dead").fetchone()
        return cast(int, count)

    def __iter__(self) -> Iterator[tuple[AgentName, DeadMessage]]:
        """All of them, in the order in which they died."""
        self._write()
        return map(_found, self._database.execute(_IN_ORDER))

    def newest(self, limit: int) -> list[tuple[AgentName, DeadMessage]]:
        """The last ones, in the same order."""
        self._write()
        return [_found(row) for row in self._database.execute(_NEWEST, (limit,))][::-1]


def _found(row: tuple[AgentName, bytes]) -> tuple[AgentName, DeadMessage]:
    agent, packed = row
    return agent, _decode(packed)
