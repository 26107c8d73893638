"""When to put time into the log: while something is due, one tick at a time, and not all the time."""

from __future__ import annotations

from typing import Final

# A tick costs a transaction. Once a second is as exact as expiry in seconds can be seen from outside.
TICK_INTERVAL_MS: Final = 1_000


class Ticks:
    """The ticks of one partition, as its owner sends and folds them."""

    def __init__(self) -> None:
        """None sent yet."""
        self._sent_ms: int | None = None  # by the owner's clock
        self._folded_ms: int | None = None  # by the log's clock
        self._under_way = False

    def forget(self) -> None:
        """Somebody else may have folded the one under way."""
        self._under_way = False

    def folded(self, now_ms: int) -> None:
        """A tick did what was due at `now_ms`, or a piece of it."""
        self._folded_ms, self._under_way = now_ms, False

    def send(self, due_ms: int | None, wall_ms: int) -> bool:
        """Whether to send one now: something is due, none is under way, and the last one was an interval ago.

        A tick that left something over is followed at once.
        """
        if due_ms is None or due_ms > wall_ms or self._under_way:
            return False
        rested = self._sent_ms is None or wall_ms - self._sent_ms >= TICK_INTERVAL_MS
        unfinished = self._folded_ms is not None and due_ms <= self._folded_ms
        if not (rested or unfinished):
            return False
        self._sent_ms, self._under_way = wall_ms, True
        return True
