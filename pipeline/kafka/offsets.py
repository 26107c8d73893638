"""Which records of one Kafka partition are not finished: how far may be committed, and whether to read on."""

from __future__ import annotations

from typing import Final

UNFINISHED_MAX: Final = 10_000  # records of one partition
# A record and what is made of it take about twice that in memory.
UNFINISHED_BYTES_MAX: Final = 64 * 1024 * 1024


class OffsetTracker:
    """Of one partition, from its assignment on. Records begin in order, and finish in any."""

    def __init__(self, start: int) -> None:
        """`start` is the offset of the first record that was read."""
        self._unfinished: dict[int, int] = {}  # offset → bytes, in order
        self._bytes = 0
        self._end = self._committed = start

    def begin(self, offset: int, size: int) -> None:
        """A record was read."""
        self._unfinished[offset] = size
        self._bytes += size
        self._end = offset + 1

    def finish(self, offset: int) -> None:
        """What came of it is in Kafka."""
        self._bytes -= self._unfinished.pop(offset, 0)

    @property
    def unfinished(self) -> int:
        """How many commands are not finished."""
        return len(self._unfinished)

    @property
    def full(self) -> bool:
        """Whether no more may be read for now."""
        return len(self._unfinished) >= UNFINISHED_MAX or self._bytes >= UNFINISHED_BYTES_MAX

    def due(self) -> int | None:
        """The offset to commit: everything below it is finished. None if that is committed."""
        lowest = next(iter(self._unfinished), self._end)
        return lowest if lowest > self._committed else None

    def committed(self, offset: int) -> None:
        """Kafka has it."""
        self._committed = offset
