"""What comes of the commands for clients: each is carried out in its turn or fails, and that is reported."""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import partial
from typing import Final, Literal, TypeAlias

from pipeline.brokers.embedded.outgoing import Change, Copy, Outgoing, Ticket
from pipeline.brokers.embedded.recorder import Recorder, now_ms
from pipeline.brokers.embedded.reports import Entry, Reports
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

    def __init__(self, recorder: Recorder, reports: Reports) -> None:
        """`reports` tells the agents."""
        self._recorder, self._reports = recorder, reports
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
            at=now_ms(), node=self._recorder.node, agent=lease.agent, lease=str(lease),
            client_id=ticket.client_id, message_id=ticket.message_id, reason=reason,
        )  # fmt: skip
        self._reports.add(Entry(event, lease, on_kept=ticket.done))

    async def withdraw(self, outgoing: Outgoing) -> list[Change]:
        """A connection ended: its copies whose turn has not come have failed. The changes that waited among them.

        What became of its copies is told before the end of the connection is: else their leases would end untold.
        """
        changes = []
        for item in outgoing.withdraw():
            if isinstance(item, Change):
                changes.append(item)
            elif item.ticket is not None:
                self.fail(item.ticket, "no_client")
        await self._reports.flush()
        return changes

    def sent(self, copy: Copy) -> None:
        """A copy was written to its client's connection."""
        ticket = copy.ticket
        if ticket is None:
            return
        if ticket.lease is None:
            ticket.done()
            return
        sent = Sent(str(ticket.lease), ticket.client_id, ticket.message_id, qos=copy.qos)
        self._reports.add(Entry(sent, ticket.lease, on_kept=ticket.done))

    def acknowledged(self, copy: Copy, client_id: str, outgoing: Outgoing) -> None:
        """A client has acknowledged a copy: its room is free when Kafka is told."""
        leased = copy.ticket is not None and copy.ticket.lease is not None
        event = self._recorder.acknowledgement(copy.message, client_id, copy.qos, leased=leased)
        if event is None:
            outgoing.entered(copy)
        else:
            self._reports.add(Entry(event, None, on_entered=partial(outgoing.entered, copy)))
