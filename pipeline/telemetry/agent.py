"""What the batches of one agent's partitions come to, counted once for each batch."""

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

UNREADABLE: Final = "unreadable"  # the type of a record that is no event
# From the beginning on: Prometheus sees no increase in what was not there before.
LETTERS: Final = ("unreadable", "failed", "refused", "given_up")
OPERATIONS: Final = ("load", "read", "commit", "check")
_event_of: Final = attrgetter("event")


class AgentCounts:
    """Of all partitions that a worker has had."""

    def __init__(self) -> None:
        """Nothing so far."""
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
        self.delivery_s = Histogram(LONG_S)  # from a publish to its first command


class PartitionObserver:
    """See `millpond.agents.driver.observer.Observer`. One for each owner of a partition; `counts` go on when the owner changes."""

    def __init__(self, counts: AgentCounts) -> None:
        """Nothing is known of the partition yet."""
        self._counts = counts
        self._since: dict[int, float] = {}  # by sequence, of batches not in the store
        self.fence: Applied | None = None  # of the last batch

    def stepping(self, sequence: int) -> None:
        self._since[sequence] = time.perf_counter()

    def applied(
        self, batch: Batch, transaction: Transaction, refused: Sequence[DeadLetter]
    ) -> None:
        counts, applied = self._counts, transaction.applied
        began = self._since.get(applied.sequence)
        for sequence in [each for each in self._since if each <= applied.sequence]:
            del self._since[sequence]
        self.fence = applied
        if began is not None and batch.records:
            counts.batch_s.add(time.perf_counter() - began)
            counts.batch_records.add(len(batch.folded) + len(batch.unreadable))
        counts.seen_ids += _seen(transaction)
        letters = [each for each in transaction.outputs if type(each) is DeadLetter]
        self._count_events(batch, [*letters, *refused])
        counts.dead_letters["refused"] += len(refused)
        if transaction.outputs:
            self._count_outputs(batch, transaction)

    def _count_events(self, batch: Batch, letters: Sequence[DeadLetter]) -> None:
        counts = self._counts
        kinds: Counter[Any] = Counter(map(type, map(_event_of, batch.folded)))
        for kind, number in kinds.items():
            counts.events[str(kind.__struct_config__.tag), "applied"] += number
        if letters:
            dead = {letter.offset for letter in letters}
            for record, event, _ in batch.folded:
                if record.offset in dead:
                    name = str(event.__struct_config__.tag)
                    counts.events[name, "applied"] -= 1
                    counts.events[name, "dead_letter"] += 1
            counts.events[UNREADABLE, "dead_letter"] += len(batch.unreadable)
        if DeliveriesSent in kinds or DeliveryFailed in kinds:
            self._count_reports(batch)

    def _count_reports(self, batch: Batch) -> None:
        deliveries = self._counts.deliveries
        for event in map(_event_of, batch.folded):
            if type(event) is DeliveriesSent:
                deliveries["sent"] += len(event.sent)
            elif type(event) is DeliveryFailed:
                deliveries[event.reason] += 1

    def _count_outputs(self, batch: Batch, transaction: Transaction) -> None:
        counts = self._counts
        kinds: Counter[Any] = Counter(map(type, transaction.outputs))
        for kind, number in kinds.items():
            counts.outputs[str(kind.__struct_config__.tag)] += number
        counts.dead_letters["given_up"] += kinds[DeadLetterMessage]
        unreadable = len(batch.unreadable)
        counts.dead_letters["unreadable"] += unreadable
        counts.dead_letters["failed"] += max(kinds[DeadLetter] - unreadable, 0)
        if DeliverMessage in kinds:
            self._count_hand_outs(batch, transaction)

    def _count_hand_outs(self, batch: Batch, transaction: Transaction) -> None:
        """What was handed out in the batch of its own publish was not waiting for anybody."""
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
            at = published.get(output.offset)
            if at is not None and output.attempt == 1:
                counts.delivery_s.add(max(now_ms - at, 0) / 1000)


def _seen(transaction: Transaction) -> int:
    """How many message ids are new: a machine says so at the end of its effects."""
    number = 0
    for effect in reversed(transaction.effects):
        if type(effect) is not WriteSeen:
            break
        number += len(effect.message_ids)
    return number
