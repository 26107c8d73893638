"""Counts the events and outputs of one agent's batches, once for each batch and never for each record.

A batch counts when the store has applied it. A batch that is folded again after a failure counts once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final

from millpond.agents.driver.batch import Batch
from millpond.agents.effects import DeadLetter, DeadLetterMessage, DeliverMessage, WriteSeen
from millpond.agents.ports import Applied, Transaction
from millpond.pipeline.telemetry.histogram import LONG_S, RECORDS, SHORT_S, Histogram
from millpond.schemas.events import DeliveriesSent, DeliveryFailed, MessagePublished

UNREADABLE: Final = "unreadable"  # the type of a record that does not decode
# Shown with 0 from the start. Prometheus cannot see an increase of a series that did not exist.
LETTERS: Final = (
    "unreadable", "failed", "refused", "given_up", "too_large", "subscriptions", "retained",
    "invalid_order",
)  # fmt: skip
OPERATIONS: Final = ("load", "read", "commit", "check")
_event_of: Final = attrgetter("event")


class AgentCounts:
    """The counts of a worker, over all partitions that it has owned."""

    def __init__(self) -> None:
        self.events: Counter[tuple[str, str]] = Counter()  # by type and outcome
        self.outputs: Counter[str] = Counter()  # by type
        self.dead_letters = Counter(dict.fromkeys(LETTERS, 0))  # by reason
        self.deliveries: Counter[str] = Counter()  # by outcome, as bridges report it
        self.leases = self.redeliveries = self.seen_ids = 0
        self.records_skipped = self.records_lost = 0
        self.batch_records = Histogram(RECORDS)
        self.batch_s = Histogram(SHORT_S)
        self.store_s: dict[str, Histogram] = {}  # by operation
        self.store_failures = Counter(dict.fromkeys(OPERATIONS, 0))  # by operation
        self.delivery_s = Histogram(LONG_S)  # from a publish to its first `deliver` command

    def dead_letter(self, reason: str) -> None:
        """Count a dead letter that no batch has."""
        self.dead_letters[reason] += 1


class PartitionObserver:
    """Counts the batches of one partition, while this worker owns it. See `millpond.agents.driver.observer.Observer`.

    `counts` belongs to the worker, and survives the observer.
    """

    def __init__(self, counts: AgentCounts) -> None:
        self._counts = counts
        # Sequence → start of the batch, for batches that the store has not applied.
        self._began_s: dict[int, float] = {}
        self.fence: Applied | None = None  # of the last batch that was applied

    def stepping(self, sequence: int) -> None:
        self._began_s[sequence] = time.perf_counter()

    def dead_letter(self, reason: str) -> None:
        self._counts.dead_letter(reason)

    def applied(
        self, batch: Batch, transaction: Transaction, refused: Sequence[DeadLetter]
    ) -> None:
        counts, applied = self._counts, transaction.applied
        began_s = self._began_s.get(applied.sequence)
        # Earlier sequences still in there were of transactions that failed.
        for sequence in [each for each in self._began_s if each <= applied.sequence]:
            del self._began_s[sequence]
        self.fence = applied
        # A transaction without records only writes notes of the driver.
        if began_s is not None and batch.records:
            counts.batch_s.add(time.perf_counter() - began_s)
            counts.batch_records.add(len(batch.folded) + len(batch.unreadable))
        counts.seen_ids += _new_message_ids(transaction)
        # An unreadable record that is folded again, after the store lost data, is no dead letter again.
        dead = {each.offset for each in transaction.outputs if type(each) is DeadLetter}
        unreadable = sum(each.offset in dead for each in batch.unreadable)
        self._count_events(batch, dead | {each.offset for each in refused}, unreadable)
        counts.dead_letters["refused"] += len(refused)
        if transaction.outputs:
            self._count_outputs(batch, transaction, unreadable)

    def _count_events(self, batch: Batch, dead: set[int], unreadable: int) -> None:
        counts = self._counts
        kinds: Counter[Any] = Counter(map(type, map(_event_of, batch.folded)))
        for kind, number in kinds.items():
            counts.events[str(kind.__struct_config__.tag), "applied"] += number
        # First all events count as applied. Then those with a dead letter move to the other outcome.
        if dead:
            for record, event, _ in batch.folded:
                if record.offset in dead:
                    name = str(event.__struct_config__.tag)
                    counts.events[name, "applied"] -= 1
                    counts.events[name, "dead_letter"] += 1
            counts.events[UNREADABLE, "dead_letter"] += unreadable
        if DeliveriesSent in kinds or DeliveryFailed in kinds:
            self._count_reports(batch)

    def _count_reports(self, batch: Batch) -> None:
        deliveries = self._counts.deliveries
        for event in map(_event_of, batch.folded):
            if type(event) is DeliveriesSent:
                deliveries["sent"] += len(event.sent)
            elif type(event) is DeliveryFailed:
                deliveries[event.reason] += 1

    def _count_outputs(self, batch: Batch, transaction: Transaction, unreadable: int) -> None:
        counts = self._counts
        kinds: Counter[Any] = Counter(map(type, transaction.outputs))
        for kind, number in kinds.items():
            counts.outputs[str(kind.__struct_config__.tag)] += number
        counts.dead_letters["given_up"] += kinds[DeadLetterMessage]
        counts.dead_letters["unreadable"] += unreadable
        counts.dead_letters["failed"] += max(kinds[DeadLetter] - unreadable, 0)
        if DeliverMessage in kinds:
            self._count_deliveries(batch, transaction)

    def _count_deliveries(self, batch: Batch, transaction: Transaction) -> None:
        """Count leases and redeliveries, and the latency of first deliveries.

        Only a delivery in the batch of its publish has a latency: no client had to come or to make room for it.
        """
        counts, now_ms = self._counts, time.time() * 1000
        published = {
            record.offset: event.published_at
            for record, event, _ in batch.folded
            if type(event) is MessagePublished
        }
        for output in transaction.outputs:
            if type(output) is not DeliverMessage:
                continue
            counts.leases += output.lease > 0
            counts.redeliveries += output.attempt > 1
            at_ms = published.get(output.offset)
            if at_ms is not None and output.attempt == 1:
                counts.delivery_s.add(max(now_ms - at_ms, 0) / 1000)


def _new_message_ids(transaction: Transaction) -> int:
    """Return the number of new message ids. A machine writes them with the last effects of a batch."""
    number = 0
    for effect in reversed(transaction.effects):
        if type(effect) is not WriteSeen:
            break
        number += len(effect.message_ids)
    return number
