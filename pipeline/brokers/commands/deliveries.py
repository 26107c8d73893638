"""The results of commands: each copy is sent or fails, and its agent gets a report.

An agent numbers the periods of a member: the *epoch* of a lease. When a command fails, the later commands of the same
client, agent, partition and epoch fail, too (`FailedEpochs`). Without this a later copy would overtake the failed one.
The agent begins a new epoch after it has read the failure, and delivers again in order.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from typing import Final, Literal, TypeAlias

from millpond.pipeline.brokers.commands.active_members import ActiveMembers
from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.commands.reports import Call, ReportEntry, Reports
from millpond.pipeline.clock import now_ms
from millpond.pipeline.telemetry.histogram import LONG_S, Histogram, histogram_of
from millpond.schemas.events import DeliveryFailed, Sent
from millpond.schemas.leases import LeaseName

logger = logging.getLogger(__name__)

Failure: TypeAlias = Literal["no_client", "stale", "bridge"]

# If an epoch is forgotten too early, a later command of it can overtake the failed one. An agent begins a new epoch
# as soon as it reads the failure, so only the most recent epochs matter.
EPOCHS_MAX: Final = 100_000


NO_AGENT: Final = "none"  # the label of commands without a lease
ID_LENGTH: Final = 32  # hexadecimal digits; the first half is the time of the publish, in µs
ID_TIMES_S: Final = range(1_500_000_000, 4_000_000_000)  # plausible times, from 2017 to 2096


def published_at_s(message_id: str) -> float | None:
    """The time of the publish, which EMQX and the embedded broker write into the id; None for any other id."""
    if len(message_id) != ID_LENGTH:
        return None
    try:
        at_us = int(message_id[: ID_LENGTH // 2], 16)
    except ValueError:
        return None
    return at_us / 1e6 if at_us // 1_000_000 in ID_TIMES_S else None


class FailedEpochs:
    """The epochs in which a command failed. The least recently used epoch is forgotten first."""

    def __init__(self, size_max: int = EPOCHS_MAX) -> None:
        self._epochs: OrderedDict[tuple[str, str, int, int], None] = OrderedDict()
        self._size_max = size_max

    def add(self, client_id: str, lease: LeaseName, epoch: int) -> None:
        """Note that a command of this epoch failed."""
        key = client_id, lease.agent, lease.partition, epoch
        self._epochs[key] = None
        self._epochs.move_to_end(key)
        if len(self._epochs) > self._size_max:
            self._epochs.popitem(last=False)

    def holds(self, client_id: str, lease: LeaseName, epoch: int) -> bool:
        """True if a command of this epoch failed before."""
        key = client_id, lease.agent, lease.partition, epoch
        if key not in self._epochs:
            return False
        self._epochs.move_to_end(key)
        return True


class Deliveries:
    """The results of all commands of a bridge, counted and reported. One per bridge."""

    def __init__(self, node: str, reports: Reports) -> None:
        """Report in the name of `node`."""
        self.reports = reports
        self.active_members = ActiveMembers(node, reports)
        self._node = node
        self._failed = FailedEpochs()
        # By agent (`NO_AGENT` without a lease) and outcome: "sent", or the reason of the failure.
        self.outcomes: Counter[tuple[str, str]] = Counter()
        # By agent: from the publish of a message until its copy is handed to the client.
        self.delivery_s: dict[str, Histogram] = {}

    def drop_if_over(self, pending: PendingCommand) -> bool:
        """True if the command must not be carried out, or not any more.

        It was revoked, or it is stale: it has expired, or follows a failed one of its epoch. A stale one is reported.
        """
        if pending.is_revoked():
            return True
        lease = pending.lease
        if now_ms() > pending.valid_until_ms or (
            lease is not None and self._failed.holds(pending.client_id, lease, pending.epoch)
        ):
            self.fail(pending, "stale")
            return True
        return False

    def fail(self, pending: PendingCommand, reason: Failure) -> None:
        """Report a command that the bridge does not carry out. Without a lease the log is the report.

        A revoked command is not reported: the next owner carries it out.
        """
        if pending.is_revoked():
            return
        lease = pending.lease
        self.outcomes[NO_AGENT if lease is None else lease.agent, reason] += 1
        if lease is None:
            logger.info("%s: the bridge drops a command: %s", pending.client_id, reason)
            pending.done()
            return
        self._report_failed(pending, lease, reason, pending.done)

    def expired(self, pending: PendingCommand) -> None:
        """Report a copy that was sent: its connection ended, and it expired before the client came back."""
        if pending.lease is not None:
            self._report_failed(pending, pending.lease, "stale", None)

    def _report_failed(
        self, pending: PendingCommand, lease: LeaseName, reason: Failure, on_kept: Call | None
    ) -> None:
        self._failed.add(pending.client_id, lease, pending.epoch)
        event = DeliveryFailed(
            at=now_ms(), node=self._node, agent=lease.agent, lease=str(lease),
            client_id=pending.client_id, message_id=pending.message_id, reason=reason,
        )  # fmt: skip
        self.reports.add(ReportEntry(event, lease, on_kept=on_kept))

    def sent(self, pending: PendingCommand, qos: int) -> None:
        """Report a copy that was handed to its client's connection with this QoS."""
        agent = NO_AGENT if pending.lease is None else pending.lease.agent
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
