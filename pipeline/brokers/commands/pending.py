"""What a bridge knows of a command while it is carried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from millpond.schemas.leases import LeaseName


class PendingCommand(NamedTuple):
    """One command: whose it is, how long it is good for, and what to call when Kafka knows what came of it.

    Nobody wants a report of a command without a lease.
    """

    client_id: str
    lease: LeaseName | None
    epoch: int
    message_id: str
    valid_until_ms: int
    done: Callable[[], None]
