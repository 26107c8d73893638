"""Kafka in memory, for simulations and tests: one append-only list for each partition.

tests/contracts/test_logs.py holds `MemoryLog` and `KafkaLog` to one contract.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence

from millpond.agents.ports import LogBounds, OutgoingRecord, Record
from millpond.pipeline.kafka.partitioning import partition_of
from millpond.schemas.keys import Partition


class MemoryLog:
    """All logs of one cluster. `now_ms` is the clock that sets the append time of records."""

    def __init__(
        self, now_ms: Callable[[], int], partition_count: int = 1, run_records_max: int = 100
    ) -> None:
        """Every topic has `partition_count` partitions, empty at first."""
        self.now_ms, self.partition_count, self.run_records_max = (
            now_ms,
            partition_count,
            run_records_max,
        )
        self.cluster_id = "memory"
        self.records: dict[tuple[str, int], list[Record]] = defaultdict(list)
        self.started_at: dict[tuple[str, int], int] = defaultdict(
            int
        )  # the first offset that retention left
        self.committed: dict[Partition, int] = {}
        self.produced: list[OutgoingRecord] = []

    def append(self, topic: str, number: int, key: bytes | None, value: bytes | None) -> Record:
        """Append one record and return it."""
        log = self.records[topic, number]
        offset = log[-1].offset + 1 if log else self.started_at[topic, number]
        record = Record(offset, self.now_ms(), key, value)
        log.append(record)
        return record

    def forget(self, topic: str, number: int, before: int) -> None:
        """Delete the records below offset `before`, as retention does."""
        place = topic, number
        self.records[place] = [record for record in self.records[place] if record.offset >= before]
        self.started_at[place] = max(self.started_at[place], before)

    async def bounds(self, partition: Partition) -> LogBounds:
        place = partition.topic, partition.number
        log = self.records[place]
        start = self.started_at[place]
        end = log[-1].offset + 1 if log else start
        committed = self.committed.get(partition)
        return LogBounds(self.cluster_id, self.partition_count, start, end, committed)

    async def read(
        self, partition: Partition, start: int, stop: int
    ) -> AsyncIterator[Sequence[Record]]:
        log = self.records[partition.topic, partition.number]
        wanted = [record for record in log if start <= record.offset < stop]
        for first in range(0, len(wanted), self.run_records_max):
            yield wanted[first : first + self.run_records_max]

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        for record in records:
            self.produced.append(record)
            number = record.partition
            if number is None:
                number = partition_of(record.key or b"", self.partition_count)
            self.append(record.topic, number, record.key, record.value)
        return _Acknowledged()


class _Acknowledged(Awaitable[None]):
    """An acknowledgement that is already there. It may be awaited never, once or several times."""

    def __await__(self) -> Generator[None, None, None]:
        return None
        yield
