"""The two logs of the contract suite, with what other processes do to a log: append, retention, commit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.records_to_delete import RecordsToDelete

from millpond.agents.ports import Log
from millpond.pipeline.kafka.log import KafkaLog
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas.keys import Partition, group_id
from tests.support.workers import until

PARTITION_COUNT = 3
RUN_RECORDS_MAX = 5
MESSAGE_BYTES_MAX = 1 << 20
PREFIX = "plant1."  # the real log has its topics under other names in Kafka


class ConsumedRecord(NamedTuple):
    """A record as a consumer sees it."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


class World(Protocol):
    """A log whose topic has `PARTITION_COUNT` empty partitions."""

    app: str

    @property
    def log(self) -> Log:
        """The log itself."""

    @property
    def fetching(self) -> set[int]:
        """The partitions whose records are fetched now."""

    async def append(self, partition: Partition, values: Sequence[bytes]) -> None:
        """Append these values, as another producer does."""

    async def append_and_leave_a_hole(self, partition: Partition, values: Sequence[bytes]) -> None:
        """Append these values, then leave an offset without a record, then append one more."""

    async def forget(self, partition: Partition, before: int) -> None:
        """Delete the records below `before`, as retention does."""

    async def commit(self, partition: Partition, offset: int) -> None:
        """Commit an offset of the agent's group."""

    async def consume(self, topic: str) -> list[list[ConsumedRecord]]:
        """All records of a topic, one list for each partition."""


class MemoryWorld:
    """The world of a `MemoryLog`."""

    def __init__(self, app: str) -> None:
        self.app = app
        self.log = MemoryLog(lambda: int(time.time() * 1_000), PARTITION_COUNT, RUN_RECORDS_MAX)

    @property
    def fetching(self) -> set[int]:
        return set()

    async def append(self, partition: Partition, values: Sequence[bytes]) -> None:
        for value in values:
            self.log.append(partition.topic, partition.number, b"key", value)

    async def append_and_leave_a_hole(self, partition: Partition, values: Sequence[bytes]) -> None:
        await self.append(partition, [*values, b"hole", b"after it"])
        del self.log.records[partition.topic, partition.number][-2]

    async def forget(self, partition: Partition, before: int) -> None:
        self.log.forget(partition.topic, partition.number, before)

    async def commit(self, partition: Partition, offset: int) -> None:
        self.log.committed[partition] = offset

    async def consume(self, topic: str) -> list[list[ConsumedRecord]]:
        headers = {sent.value: sent.headers for sent in self.log.produced if sent.topic == topic}
        return [
            [
                ConsumedRecord(record.key, record.value, headers[record.value])
                for record in self.log.records[topic, number]
            ]
            for number in range(PARTITION_COUNT)
        ]


class KafkaWorld:
    """The world of a `KafkaLog` on a real Kafka. It creates `topic` for itself."""

    def __init__(self, app: str, bootstrap: str, topic: str) -> None:
        self.app, self._bootstrap, self._topic = app, bootstrap, topic
        self._admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        settings = KafkaSettings(
            bootstrap_servers=(bootstrap,), message_bytes_max=MESSAGE_BYTES_MAX, topic_prefix=PREFIX
        )
        self._options, self._topic_name = settings.client_options(), settings.topic_name
        self._producer = Producer(settings)
        group = group_id(app, "messages")
        self.log = KafkaLog(self._producer, settings, group, RUN_RECORDS_MAX)

    async def start(self) -> None:
        await self._admin.start()
        config = {"message.timestamp.type": "LogAppendTime"}
        await self._admin.create_topics(
            [NewTopic(self._topic_name(self._topic), PARTITION_COUNT, 1, topic_configs=config)]
        )
        await self._producer.start()
        await self.log.start()

    def _place(self, topic: str, number: int) -> TopicPartition:
        return TopicPartition(self._topic_name(topic), number)

    async def stop(self) -> None:
        await self.log.stop()
        await self._producer.stop()
        await self._admin.close()

    @property
    def fetching(self) -> set[int]:
        consumer = self.log._reader._consumer
        return {place.partition for place in consumer.assignment() - consumer.paused()}

    @contextlib.asynccontextmanager
    async def _writer(self, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
        writer = AIOKafkaProducer(**self._options, **options)
        await writer.start()
        try:
            yield writer
        finally:
            await writer.stop()

    async def _write(
        self, writer: AIOKafkaProducer, partition: Partition, values: Sequence[bytes]
    ) -> None:
        sent = [
            await writer.send(self._topic_name(partition.topic), value, b"key", partition.number)
            for value in values
        ]
        await asyncio.gather(*sent)

    async def append(self, partition: Partition, values: Sequence[bytes]) -> None:
        async with self._writer() as writer:
            await self._write(writer, partition, values)

    async def append_and_leave_a_hole(self, partition: Partition, values: Sequence[bytes]) -> None:
        """The marker at the end of a transaction takes an offset, and no consumer sees it."""
        end = (await self.log.bounds(partition)).end + len(values)
        async with self._writer(transactional_id=self._topic) as writer, writer.transaction():
            await self._write(writer, partition, values)

        async def marked() -> bool:
            return (await self.log.bounds(partition)).end > end

        await until(marked, "the end of the transaction")
        await self.append(partition, [b"after it"])

    async def forget(self, partition: Partition, before: int) -> None:
        place = self._place(partition.topic, partition.number)
        await self._admin.delete_records({place: RecordsToDelete(before)})

    async def commit(self, partition: Partition, offset: int) -> None:
        place = self._place(partition.topic, partition.number)
        consumer = AIOKafkaConsumer(
            group_id=group_id(self.app, partition.agent), enable_auto_commit=False, **self._options
        )
        await consumer.start()
        consumer.assign([place])
        await consumer.commit({place: offset})
        await consumer.stop()

    async def consume(self, topic: str) -> list[list[ConsumedRecord]]:
        consumer = AIOKafkaConsumer(auto_offset_reset="earliest", **self._options)
        await consumer.start()
        found: list[list[ConsumedRecord]] = []
        for number in range(PARTITION_COUNT):
            place = self._place(topic, number)
            consumer.assign([place])
            end = (await consumer.end_offsets([place]))[place]
            records: list[ConsumedRecord] = []
            while await consumer.position(place) < end:
                fetched = await consumer.getmany(place, timeout_ms=500)
                records += [
                    ConsumedRecord(read.key, read.value, read.headers)
                    for read in fetched.get(place, ())
                ]
            found.append(records)
        await consumer.stop()
        return found
