"""Times as EMQX writes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

from millpond.schemas.events import TIME_MS_MAX

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Time: TypeAlias = str | int | None  # RFC 3339; anything else counts as missing


def milliseconds(time: Time) -> int | None:
    """A time in milliseconds since the epoch; None if it is missing or not a time."""
    try:
        at = datetime.fromisoformat(time if isinstance(time, str) else "")
        at_ms = (at - EPOCH) // timedelta(milliseconds=1)
    # ValueError: not a time. OverflowError: out of range. TypeError: a time without a zone.
    except (ValueError, OverflowError, TypeError):
        return None
    return at_ms if 0 <= at_ms <= TIME_MS_MAX else None
