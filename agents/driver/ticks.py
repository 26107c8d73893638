"""When to produce a tick: only while something is due, and one tick at a time."""

from __future__ import annotations

from typing import Final

# A tick costs a transaction, and expiry is given in seconds: more ticks would not be visible from outside.
TICK_INTERVAL_MS: Final = 1_000


class Ticks:
    """The ticks of one partition, as its owner sends and folds them."""

    def __init__(self) -> None:
        self._sent_ms: int | None = None  # by the owner's clock
        self._folded_ms: int | None = None  # by the log's clock
        self._in_flight = False  # sent, and not yet folded by this owner

    def forget_in_flight(self) -> None:
        """Stop waiting for the tick that was sent: after a reload, another owner may have folded it."""
        self._in_flight = False

    def folded(self, now_ms: int) -> None:
        """Note that a tick was folded at `now_ms` of the log's time."""
        self._folded_ms, self._in_flight = now_ms, False

    def send(self, due_ms: int | None, log_ms: int, wall_ms: int) -> bool:
        """True if the caller must produce a tick now; the tick counts as sent.

        Something is due at `log_ms`, the log's time as far as the owner can tell, no tick is in flight, and the last one
        is an interval old by the owner's clock. A tick that left something over is followed at once.
        """
        if due_ms is None or due_ms > log_ms or self._in_flight:
            return False
        # An owner's clock that was set back must not stop the ticks until it has caught up.
        rested = self._sent_ms is None or not 0 <= wall_ms - self._sent_ms < TICK_INTERVAL_MS
        unfinished = self._folded_ms is not None and due_ms <= self._folded_ms
        if not (rested or unfinished):
            return False
        self._sent_ms, self._in_flight = wall_ms, True
        return True
