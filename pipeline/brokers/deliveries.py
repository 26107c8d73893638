"""What comes of the commands for clients: each is carried out in its turn or fails, and that is reported."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Final, Literal, TypeAlias

from pipeline.brokers.reports import Entry, Reports
from pipeline.brokers.tickets import Ticket
from pipeline.clock import now_ms
from schemas.events import DeliveryFailed, Sent
from schemas.leases import Lease

logger = logging.getLogger(__name__)

Failure: TypeAlias = Literal["no_client", "stale", "bridge"]

# An epoch that is forgotten could let a command overtake one that failed; agents begin a new one soon after a failure.
EPOCHS_MAX: Final = 100_000


class FailedEpochs:
    """Where a command failed, those after it fail too, until the agent begins a new epoch."""

    def __init__(self, size_max: int = EPOCHS_MAX) -> None:
        """The epochs asked for least recently go first."""
        self._epochs: OrderedDict[tuple[str, str, int, int], None] = OrderedDict()
        self._size_max = size_max

    def add(self, client_id: str, lease: Lease, epoch: int) -> None:
        """A command failed."""
        key = client_id, lease.agent, lease.partition, epoch
        self._epochs[key] = None
        self._epochs.move_to_end(key)
        if len(self._epochs) > self._size_max:
            self._epochs.popitem(last=False)

    def holds(self, client_id: str, lease: Lease, epoch: int) -> bool:
        """Whether a command of this epoch failed before."""
        key = client_id, lease.agent, lease.partition, epoch
        if key not in self._epochs:
            return False
        self._epochs.move_to_end(key)
        return True


class Deliveries:
    """One per bridge."""

    def __init__(self, node: str, reports: Reports) -> None:
        """`reports` tells the agents; `node` is who says so."""
        self.reports = reports
        self._node = node
        self._failed = FailedEpochs()

    def good(self, ticket: Ticket) -> bool:
        """Whether a command may still be carried out. One that may not has failed with this."""
        lease = ticket.lease
        if now_ms() > ticket.valid_until_ms or (
            lease is not None and self._failed.holds(ticket.client_id, lease, ticket.epoch)
        ):
            self.fail(ticket, "stale")
            return False
        return True

    def fail(self, ticket: Ticket, reason: Failure) -> None:
        """It is not carried out."""
        lease = ticket.lease
        if lease is None:
            logger.info("%s: a command is not carried out: %s", ticket.client_id, reason)
            ticket.done()
            return
        self._failed.add(ticket.client_id, lease, ticket.epoch)
        event = DeliveryFailed(
            at=now_ms(), node=self._node, agent=lease.agent, lease=str(lease),
            client_id=ticket.client_id, message_id=ticket.message_id, reason=reason,
        )  # fmt: skip
        self.reports.add(Entry(event, lease, on_kept=ticket.done))

    def sent(self, ticket: Ticket, qos: int) -> None:
        """A copy was handed to its client's connection."""
        if ticket.lease is None:
            ticket.done()
            return
        sent = Sent(str(ticket.lease), ticket.client_id, ticket.message_id, qos=qos)
        self.reports.add(Entry(sent, ticket.lease, on_kept=ticket.done))
