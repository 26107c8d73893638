"""Tracks the unfinished records of one Kafka partition: what may be committed, and whether to read more.

State:

- `_unfinished`: offset → size in bytes of each record that began and did not finish, in log order.
- `_bytes`: the sum of those sizes.
- `_end`: the offset behind the last record that began. The log may have gaps, so it is no count.
- `_committed`: the last offset that Kafka has as committed; at first the start.
- `revoked`: the assignment has ended. The next owner of the partition reads the unfinished records again.

Invariant: every record below `offset_to_commit()` is finished. It never goes back.
"""

from __future__ import annotations

from typing import Final

UNFINISHED_MAX: Final = 10_000  # records of one partition
# Of one partition, too. A record and what the handler makes of it take about twice its size in memory.
UNFINISHED_BYTES_MAX: Final = 64 * 1024 * 1024


class OffsetTracker:
    """Tracks one partition from its assignment on. Records begin in log order, and finish in any order."""

    def __init__(self, start: int) -> None:
        """`start` is the offset of the first record that was read."""
        self._unfinished: dict[int, int] = {}  # offset → bytes, in order
        self._bytes = 0
        self._end = self._committed = start
        self.revoked = False

    def begin(self, offset: int, size: int) -> None:
        """Note that the record at `offset` was read; `size` is in bytes."""
        self._unfinished[offset] = size
        self._bytes += size
        self._end = offset + 1

    def finish(self, offset: int) -> None:
        """Note that the record at `offset` is finished. A second call changes nothing."""
        self._bytes -= self._unfinished.pop(offset, 0)

    @property
    def unfinished(self) -> int:
        """The number of unfinished records."""
        return len(self._unfinished)

    @property
    def full(self) -> bool:
        """True if the partition must be paused."""
        return len(self._unfinished) >= UNFINISHED_MAX or self._bytes >= UNFINISHED_BYTES_MAX

    def offset_to_commit(self) -> int | None:
        """Return the offset of the first unfinished record. None if that offset is already committed."""
        lowest = next(iter(self._unfinished), self._end)
        return lowest if lowest > self._committed else None

    def mark_committed(self, offset: int) -> None:
        """Note that Kafka has `offset` as the committed one."""
        self._committed = offset
