"""A command that a bridge has read and not finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from millpond.schemas.leases import LeaseName


class PendingCommand(NamedTuple):
    """One unfinished command."""

    client_id: str
    lease: LeaseName | None  # None: no agent expects a report
    epoch: int  # 0 without a lease
    message_id: str  # "" unless the command is a `deliver`
    valid_until_ms: int  # wall clock; after it the command fails as stale
    # Call it once, when the result is stored: the command may be committed.
    done: Callable[[], None]
    # True after a rebalance: the next owner of the partition carries the command out.
    is_revoked: Callable[[], bool]
