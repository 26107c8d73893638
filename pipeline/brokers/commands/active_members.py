"""Clients that acknowledge copies of one partition while they have copies of others.

A delivery agent reads the acknowledgements of its own partition. A client that works through the copies of another one
would look silent there, and its copies could go to other members. So the bridge reports such a client as active, to each
partition of which it has copies and has acknowledged none for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NoReturn, TypeAlias

from millpond.pipeline.brokers.commands.reports import SENT_BYTES_MAX, SENT_MAX, Reports
from millpond.pipeline.clock import now_ms
from millpond.schemas.events import AgentName, MembersActive
from millpond.schemas.leases import LeaseName
from millpond.schemas.rules import Rules
from millpond.schemas.rules.rule import ACK_TIMEOUT_S

# Rounds in the shortest ack_timeout. A client that acknowledges just after a round is reported in the next one; then
# two thirds of its time are left.
ROUNDS_IN_TIMEOUT: Final = 3

AgentPartition: TypeAlias = tuple[AgentName, int]


# The leases of the copies that a client has and has not acknowledged
Unacknowledged: TypeAlias = Callable[[str], Iterable[LeaseName]]


def report_interval_s(rules: Rules) -> float:
    """The time between two rounds."""
    timeouts_s = (rule.ack_timeout_s for rule in rules.delivery_rules())
    return min(timeouts_s, default=ACK_TIMEOUT_S) / ROUNDS_IN_TIMEOUT


class ActiveMembers:
    """One per bridge process, for the clients whose commands it carries out."""

    def __init__(self, node: str, reports: Reports) -> None:
        """Report in the name of `node`."""
        self._node, self._reports = node, reports
        # Client id → where it has acknowledged copies since the last round
        self._acked: dict[str, set[AgentPartition]] = {}

    def acked(self, client_id: str, lease: LeaseName | None) -> None:
        """Note that a client acknowledged a copy. A copy without a lease shows that it is active, too."""
        partitions = self._acked.setdefault(client_id, set())
        if lease is not None:
            partitions.add((lease.agent, lease.partition))

    async def run(self, interval_s: float, unacknowledged: Unacknowledged) -> NoReturn:
        """Report in each round, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            self.report(unacknowledged)

    def report(self, unacknowledged: Unacknowledged) -> None:
        """Report who was active since the last round, where the agents cannot see it."""
        acked, self._acked = self._acked, {}
        found: dict[AgentPartition, list[str]] = {}
        for client_id, seen in acked.items():
            for lease in unacknowledged(client_id):
                at = lease.agent, lease.partition
                if at not in seen:
                    seen.add(at)
                    found.setdefault(at, []).append(client_id)
        for (agent, partition), client_ids in found.items():
            for some in _records(client_ids):
                event = MembersActive(
                    at=now_ms(), node=self._node, agent=agent, client_ids=tuple(some)
                )
                self._reports.add_event(event, partition)


def _records(client_ids: Sequence[str]) -> Iterator[list[str]]:
    """Divide client ids so that each part fits into a record."""
    some: list[str] = []
    size = 0
    for client_id in client_ids:
        some.append(client_id)
        size += len(client_id.encode())
        if len(some) >= SENT_MAX or size >= SENT_BYTES_MAX:
            yield some
            some, size = [], 0
    if some:
        yield some
