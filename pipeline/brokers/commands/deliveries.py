"""What comes of the commands for clients: each is carried out in its turn or fails, and that is reported."""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from typing import Final, Literal, TypeAlias

from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.commands.reports import ReportEntry, Reports
from millpond.pipeline.clock import now_ms
from millpond.pipeline.telemetry.histogram import LONG_S, Histogram, histogram_of
from millpond.schemas.events import DeliveryFailed, Sent
from millpond.schemas.leases import LeaseName

logger = logging.getLogger(__name__)

Failure: TypeAlias = Literal["no_client", "stale", "bridge"]

# An epoch that is forgotten could let a command overtake one that failed; agents begin a new one soon after a failure.
EPOCHS_MAX: Final = 100_000


NOBODY: Final = "none"  # of commands without a lease
ID_LENGTH: Final = 32  # of message ids whose first half is the time of the publish, in µs
ID_TIMES_S: Final = range(1_500_000_000, 4_000_000_000)  # what can be such a time


def published_at_s(message_id: str) -> float | None:
    """When a message was published, as EMQX and the embedded broker write it into its id; None if another made it."""
    if len(message_id) != ID_LENGTH:
        return None
    try:
        at_us = int(message_id[: ID_LENGTH // 2], 16)
    except ValueError:
        return None
    return at_us / 1e6 if at_us // 1_000_000 in ID_TIMES_S else None


class FailedEpochs:
    """Where a command failed, those after it fail too, until the agent begins a new epoch."""

    def __init__(self, size_max: int = EPOCHS_MAX) -> None:
        """The epochs asked for least recently go first."""
        self._epochs: OrderedDict[tuple[str, str, int, int], None] = OrderedDict()
        self._size_max = size_max

    def add(self, client_id: str, lease: LeaseName, epoch: int) -> None:
        """A command failed."""
        key = client_id, lease.agent, lease.partition, epoch
        self._epochs[key] = None
        self._epochs.move_to_end(key)
        if len(self._epochs) > self._size_max:
            self._epochs.popitem(last=False)

    def holds(self, client_id: str, lease: LeaseName, epoch: int) -> bool:
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
        self.outcomes: Counter[tuple[str, str]] = (
            Counter()
        )  # by agent, if it wants to know, and outcome
        self.delivery_s: dict[str, Histogram] = {}  # by agent: from publish to client

    def fail_if_stale(self, pending: PendingCommand) -> bool:
        """True if the command is stale, or follows a failed one of its epoch; it is then reported as failed."""
        lease = pending.lease
        if now_ms() > pending.valid_until_ms or (
            lease is not None and self._failed.holds(pending.client_id, lease, pending.epoch)
        ):
            self.fail(pending, "stale")
            return True
        return False

    def fail(self, pending: PendingCommand, reason: Failure) -> None:
        """It is not carried out."""
        lease = pending.lease
        self.outcomes[NOBODY if lease is None else lease.agent, reason] += 1
        if lease is None:
            logger.info("%s: a command is not carried out: %s", pending.client_id, reason)
            pending.done()
            return
        self._failed.add(pending.client_id, lease, pending.epoch)
        event = DeliveryFailed(
            at=now_ms(), node=self._node, agent=lease.agent, lease=str(lease),
            client_id=pending.client_id, message_id=pending.message_id, reason=reason,
        )  # fmt: skip
        self.reports.add(ReportEntry(event, lease, on_kept=pending.done))

    def sent(self, pending: PendingCommand, qos: int) -> None:
        """A copy was handed to its client's connection."""
        agent = NOBODY if pending.lease is None else pending.lease.agent
        self.outcomes[agent, "sent"] += 1
        if pending.lease is None:
            pending.done()
            return
        published_s = published_at_s(pending.message_id)
        if published_s is not None:
            latency = histogram_of(self.delivery_s, agent, LONG_S)
            latency.add(max(time.time() - published_s, 0.0))
        sent = Sent(str(pending.lease), pending.client_id, pending.message_id, qos=qos)
        self.reports.add(ReportEntry(sent, pending.lease, on_kept=pending.done))
