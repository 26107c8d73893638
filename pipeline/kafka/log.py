"""Kafka as the driver sees it: the bounds of a partition, re-reading a range, producing. See `agents.ports.Log`.

While Kafka is down every call of the driver retries without limit, and logs each attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from millpond.agents.ports import LogBounds, OutgoingRecord, Record
from millpond.pipeline.kafka.producer import Producer
from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.events import DeliveryFailed
from millpond.schemas.keys import Partition
from millpond.schemas.leases import parse_lease

logger = logging.getLogger(__name__)

RETRY_INTERVAL_S: Final = 0.5
POLL_TIMEOUT_MS: Final = 1_000

Answer = TypeVar("Answer")


class KafkaLog:
    """The log of one worker process.

    Faust's consumer reads new records. This class reads ranges again, which is rare: one consumer serves all partitions
    in turn. `_reading` gives it to one partition at a time. `_producing` keeps the order of concurrent `produce` calls.
    """

    def __init__(
        self, producer: Producer, client_options: dict[str, Any], group: str, run_records_max: int
    ) -> None:
        """The committed offsets of `group` are read; the group is never joined."""
        self._producer, self._run_records_max = producer, run_records_max
        self._admin = AIOKafkaAdminClient(**client_options)
        self._reader = AIOKafkaConsumer(
            group_id=group, enable_auto_commit=False, auto_offset_reset="none", **client_options
        )
        self._reading, self._producing = asyncio.Lock(), asyncio.Lock()

    async def start(self) -> None:
        """Connect. The owner of the producer starts and stops the producer."""
        await persist(self._admin.start)
        await persist(self._reader.start)

    async def stop(self) -> None:
        """Disconnect."""
        await self._reader.stop()
        await self._admin.close()

    async def bounds(self, partition: Partition) -> LogBounds:
        return await persist(lambda: self._bounds(partition))

    async def _bounds(self, partition: Partition) -> LogBounds:
        topic_partition = TopicPartition(partition.topic, partition.number)
        cluster = await self._admin.describe_cluster()
        described = await self._admin.describe_topics([partition.topic])
        async with self._reading:
            start = (await self._reader.beginning_offsets([topic_partition]))[topic_partition]
            end = (await self._reader.end_offsets([topic_partition]))[topic_partition]
            committed = await self._reader.committed(topic_partition)
        return LogBounds(
            str(cluster["cluster_id"]), len(described[0]["partitions"]), start, end, committed
        )

    async def ends(self, topic: str, numbers: Sequence[int]) -> Mapping[int, int]:
        """Return the end offsets of these partitions, or nothing if Kafka does not answer. Does not retry."""
        partitions = [TopicPartition(topic, number) for number in numbers]
        try:
            ends = await self._reader.end_offsets(partitions) if partitions else {}
        except (KafkaError, OSError):
            return {}
        return {partition.partition: end for partition, end in ends.items()}

    async def read(
        self, partition: Partition, start: int, stop: int
    ) -> AsyncIterator[Sequence[Record]]:
        position = start
        while position < stop:
            run, position = await persist(partial(self._read_run, partition, position, stop))
            if run:
                yield run

    async def _read_run(
        self, partition: Partition, start: int, stop: int
    ) -> tuple[Sequence[Record], int]:
        """Read the next run. Return it with the offset to continue at.

        Offsets without a record are skipped: deleted by retention, or taken by the marker of a transaction.
        """
        topic_partition = TopicPartition(partition.topic, partition.number)
        reader = self._reader
        async with self._reading:
            self._assign(topic_partition)
            first = (await reader.beginning_offsets([topic_partition]))[topic_partition]
            if first >= stop:
                return (), stop
            reader.seek(topic_partition, max(start, first))
            reader.resume(topic_partition)
            fetched = await reader.getmany(
                topic_partition, timeout_ms=POLL_TIMEOUT_MS, max_records=self._run_records_max
            )
            position = await reader.position(topic_partition)
            reader.pause(topic_partition)
        records = fetched.get(topic_partition, [])
        run = [
            Record(record.offset, record.timestamp, record.key, record.value)
            for record in records
            if record.offset < stop
        ]
        return run, position

    def _assign(self, partition: TopicPartition) -> None:
        """Assign the partition, and keep the others assigned and paused: a new assignment costs a second."""
        assigned = self._reader.assignment()
        if partition not in assigned:
            self._reader.assign([*assigned, partition])

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        return asyncio.ensure_future(self._produce(records))

    async def _produce(self, records: Sequence[OutgoingRecord]) -> None:
        # `send` waits while the producer's buffer is full. Without the lock a later call could overtake this one then.
        async with self._producing:
            acknowledgements = [await self._send(record) for record in records]
        await asyncio.gather(*acknowledgements)

    async def _send(self, record: OutgoingRecord) -> asyncio.Future[Any]:
        """Send a record, and return the future of its acknowledgement.

        A record that is too large for Kafka would fail at every attempt. An empty dead letter takes its place, with
        the reason. The future is then that of the dead letter.
        """
        topic, key, value, headers, partition = record
        try:
            return await self._producer.send(topic, key, value, partition, headers)
        except MessageSizeTooLargeError as error:
            logger.error(  # noqa: TRY400  no traceback
                "a record for %s is too large for Kafka and becomes a dead letter: %s", topic, error
            )
            reason = f"for {topic}, but too large: {error}".encode()
            headers = (*headers, ("not-produced", reason))
            report = _too_large_report(record)
            if report is not None:
                await self._producer.send(*report)
            return await self._producer.send(keys.DEAD_LETTERS_TOPIC, key, b"", None, headers)


def _too_large_report(record: OutgoingRecord) -> tuple[str, bytes, bytes, int] | None:
    """Return the report that a `deliver` command is too large; None if the record is no command with a lease.

    No bridge ever sees the command, so no bridge reports on it. The report makes the agent give the message up.
    """
    if record.topic != keys.DELIVERIES_TOPIC:
        return None
    command = codec.decode_command(record.value)
    if not isinstance(command, Deliver) or not command.lease:
        return None
    lease = parse_lease(command.lease)
    failed = DeliveryFailed(
        at=0, node=keys.AGENT_NODE, agent=lease.agent, lease=command.lease,
        client_id=command.client_id, message_id=command.message_id, reason="too_large",
    )  # fmt: skip
    key = keys.record_key(failed).encode()
    return keys.MESSAGES_TOPIC, key, codec.encode(failed), lease.partition


async def persist(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Call until Kafka answers, and return the answer. Logs and retries every error, without limit."""
    while True:
        try:
            return await call()
        except (KafkaError, OSError) as error:
            logger.warning("Kafka: %r; trying again", error)
            await asyncio.sleep(RETRY_INTERVAL_S)
