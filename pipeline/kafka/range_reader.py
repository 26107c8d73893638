"""Reads ranges of a topic again, of many partitions side by side, through one consumer.

A worker does this after a rebalance, and for all its partitions at once after Redis has lost its data.

Concepts:

- All partitions of the topic are assigned at the first read, and stay so. A later `assign` would drop the positions of
  the others, and resume them.
- A partition is *open* while a run of it is awaited. All others are paused.
- A partition *continues* at an offset, if its last run ended there and its range is not finished.

Invariants:

1. Only open partitions are fetched. A paused one costs nothing, and never makes an open one wait.
2. A partition has at most one fetch in memory, and none after the end of its range.

ON a run, one at a time for each partition:
1. If the partition does not continue at the wanted offset: ask for the start of its log, assign, seek.
2. Open the partition, wait for records, pause it.
3. At the end of the range, seek: this drops records that were fetched beyond.

ON an error or cancellation: the partition does not continue. So the next run begins with step 1.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from millpond.agents.ports import Record
from millpond.pipeline.kafka.retrying import started
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas.keys import Partition

# For one run. The records are in the log already, so it only ends where a range ends without a record.
POLL_TIMEOUT_MS: Final = 1_000
# Of one partition, if no record is larger. A worker with 24 partitions may hold 12 MiB while it rebuilds all.
FETCH_BYTES_MAX: Final = 512 * 1024
# Kafka holds a fetch back for so long if it finds no record. Requests for other partitions wait behind it.
FETCH_WAIT_MS: Final = 10


class RangeReader:
    """The consumer of one worker process for ranges, starts, ends and committed offsets."""

    def __init__(self, settings: KafkaSettings, group: str, run_records_max: int) -> None:
        """The committed offsets of `group` are read; the group is never joined."""
        self._options, self._group = settings.client_options(), group
        self._topic_name = settings.topic_name
        self._run_records_max = run_records_max
        self._consumer: Any = None
        self._turns: dict[TopicPartition, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._open: dict[TopicPartition, int] = {}  # → the offset that the run begins at
        self._continues: dict[TopicPartition, int] = {}  # → the offset behind its last run

    async def start(self) -> None:
        """Connect. Waits while Kafka is down."""
        self._consumer = await started(self._new_consumer)

    def _new_consumer(self) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=FETCH_BYTES_MAX,
            **self._options,
        )

    def _in_kafka(self, topic: str, number: int) -> TopicPartition:
        return TopicPartition(self._topic_name(topic), number)

    async def stop(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            await self._consumer.stop()

    async def extent(self, partition: Partition) -> tuple[int, int, int | None]:
        """Return start, end and committed offset of a partition."""
        asked = self._in_kafka(partition.topic, partition.number)
        start = (await self._consumer.beginning_offsets([asked]))[asked]
        end = (await self._consumer.end_offsets([asked]))[asked]
        return start, end, await self._consumer.committed(asked)

    async def ends(self, topic: str, numbers: Sequence[int]) -> dict[int, int]:
        """Return the end offsets of these partitions."""
        asked = [self._in_kafka(topic, number) for number in numbers]
        ends = await self._consumer.end_offsets(asked) if asked else {}
        return {partition.partition: end for partition, end in ends.items()}

    async def run(
        self, partition: Partition, start: int, stop: int
    ) -> tuple[Sequence[Record], int]:
        """Read the next run. Return it with the offset to continue at.

        Offsets without a record are skipped: deleted by retention, or taken by the marker of a transaction.

        Raises:
            KafkaError, OSError: Kafka does not answer. The call may be repeated.
        """
        wanted = self._in_kafka(partition.topic, partition.number)
        async with self._turns[wanted]:
            if self._continues.pop(wanted, None) != start:
                first = (await self._consumer.beginning_offsets([wanted]))[wanted]
                if first >= stop:
                    return (), stop
                start = max(start, first)
                self._assign(wanted)
                self._consumer.seek(wanted, start)
            records, position = await self._fetched(wanted, start)
            if position < stop:
                self._continues[wanted] = position
            else:
                self._consumer.seek(wanted, position)
        return [
            Record(record.offset, record.timestamp, record.key, record.value)
            for record in records
            if record.offset < stop
        ], position

    async def _fetched(self, wanted: TopicPartition, start: int) -> tuple[Sequence[Any], int]:
        """Wait for records of an assigned partition. Return them with the offset behind them."""
        consumer = self._consumer
        self._open[wanted] = start
        consumer.resume(wanted)
        try:
            fetched = await consumer.getmany(
                wanted, timeout_ms=POLL_TIMEOUT_MS, max_records=self._run_records_max
            )
            return fetched.get(wanted, ()), await consumer.position(wanted)
        finally:
            del self._open[wanted]
            consumer.pause(wanted)

    def _assign(self, wanted: TopicPartition) -> None:
        """Assign all partitions of a topic, unless they are: paused, and with a position, so that nothing is fetched.

        A second topic, or a new partition of the first one, does not disturb runs that are awaited.
        """
        consumer = self._consumer
        assigned = consumer.assignment()
        if wanted in assigned:
            return
        # The metadata has the topic: its start was asked for.
        numbers = consumer.partitions_for_topic(wanted.topic) or ()
        partitions = sorted(
            {*assigned, wanted, *(TopicPartition(wanted.topic, n) for n in numbers)}
        )
        consumer.assign(partitions)
        self._continues.clear()
        for partition in partitions:
            consumer.seek(partition, self._open.get(partition, 0))
            if partition not in self._open:
                consumer.pause(partition)
