"""The log's time: one clock for all decisions in a partition, made of the timestamps of its records alone.

Kafka stamps each record with the clock of the partition's leader. That clock can be set back, and the clock of the next
leader can be behind. A machine's time must not run backwards. It must not stand still either: no lease or message would
expire until the timestamps have caught up, an hour later if the clock was an hour ahead.

- A timestamp ahead of the log's time becomes the log's time.
- While timestamps are behind, the log's time advances at half their speed, until they have caught up.

So a clock that was an hour ahead makes deadlines take up to twice as long, for two hours.
"""

from __future__ import annotations


def log_time(now_ms: int, last_ms: int, at_ms: int) -> int:
    """Return the log's time at a record of `at_ms`, if it was `now_ms` at the record before, of `last_ms`."""
    if at_ms >= now_ms:
        return at_ms
    # Halves of the timestamps, not of their difference: steps of 1 ms add up.
    return now_ms + max(0, at_ms // 2 - last_ms // 2)
