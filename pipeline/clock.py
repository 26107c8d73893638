"""The wall clock, in the unit that events use."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Return the milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000
