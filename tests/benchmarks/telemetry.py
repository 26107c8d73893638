"""What it costs a worker to be watched: the telemetry's own processor time per event, beside what an event costs.

python -m tests.benchmarks.telemetry
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from statistics import median
from typing import Final, NamedTuple

from millpond.agents.driver.batch import Batch, FoldedEvent
from millpond.agents.effects import DeadLetter, DeliverMessage
from millpond.agents.ports import Applied, Transaction
from millpond.pipeline.telemetry.agent import AgentCounts, PartitionObserver
from millpond.schemas.events import Event
from tests.benchmarks.events import event
from tests.support import given

RECORDS: Final = 2_000  # of a batch, as many as a worker takes
ROUNDS: Final = 50
# What a worker's event costs at 76,000 events a second, and a queue message's life at 15,000.
EVENT_US: Final = 13.0
LIFE_US: Final = 65.0
# A batch of one event, which is what comes when little comes.
ALONE_US: Final = 500.0
SHARE_MAX: Final = 0.02


class Measured(NamedTuple):
    """Microseconds for each event, and as a share of what an event costs altogether."""

    name: str
    telemetry_us: float
    share: float


def batch_of(events: Sequence[Event]) -> Batch:
    """A batch as the driver makes it."""
    folded = [
        FoldedEvent(given.record(each, offset, 1_000), each, 1_000)
        for offset, each in enumerate(events)
    ]
    return Batch([record for record, _, _ in folded], folded)


def transaction_of(outputs: Sequence[DeliverMessage]) -> Transaction:
    """One with these outputs."""
    applied = Applied(
        offset=RECORDS, timestamp=1_000, cluster_id="c", partition_count=4, sequence=1, produced=0,
        now_ms=1_000, score=1, machine={},
    )  # fmt: skip
    return Transaction(None, applied, (), outputs, ())


def delivery(offset: int, topic: str, message_id: str) -> DeliverMessage:
    """The first delivery of a message in its own batch."""
    return DeliverMessage(offset, offset + 1, "client", 0, message_id, topic, 1, 1, None)


def cost_us(batch: Batch, transaction: Transaction) -> float:
    """Processor time of the telemetry for one record, in µs; the median of many rounds."""
    observer = PartitionObserver(AgentCounts())
    refused: Sequence[DeadLetter] = ()
    rounds = []
    gc.collect()
    for _ in range(ROUNDS):
        began = time.process_time()
        observer.stepping(1)
        observer.applied(batch, transaction, refused)
        rounds.append(time.process_time() - began)
    return median(rounds) / len(batch.records) * 1e6


def measure() -> list[Measured]:
    """A batch of publishes that are stored, and one of publishes that are handed out at once."""
    events = [event(number) for number in range(RECORDS)]
    batch = batch_of(events)
    given_out = [
        delivery(at, each.topic, each.message_id) for at, each in enumerate(events)
    ]  # fmt: skip
    stored = cost_us(batch, transaction_of(()))
    handed = cost_us(batch, transaction_of(given_out))
    alone = cost_us(batch_of(events[:1]), transaction_of(()))
    return [
        Measured("an event stored", stored, stored / EVENT_US),
        Measured("a message handed out", handed, handed / LIFE_US),
        Measured("a batch of one event", alone, alone / ALONE_US),
    ]


def main() -> None:
    """Measure and show."""
    for name, us, share in measure():
        print(f"{name}: {us:.3f} µs of telemetry, {share:.2%}")


if __name__ == "__main__":
    main()
