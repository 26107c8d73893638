"""Kafka as the driver sees it: the bounds of a partition, re-reading a range, producing. See `agents.ports.Log`.

While Kafka is down every call of the driver retries without limit, and logs each attempt.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from millpond.agents.ports import LogBounds, OutgoingRecord, Record
from millpond.pipeline.kafka.dead_letters import marks_alone
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.kafka.range_reader import RangeReader
from millpond.pipeline.kafka.retrying import persist
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.errors import LogRefused
from millpond.schemas.events import DeliveryFailed
from millpond.schemas.keys import Partition
from millpond.schemas.leases import parse_lease

logger = logging.getLogger(__name__)

# A record's topic, and the future that is done when Kafka has acknowledged the record.
Buffered: TypeAlias = tuple[str, asyncio.Future[Any]]


class KafkaLog:
    """The log of one worker process.

    Faust's consumer reads new records. This class reads ranges again, which is rare.
    """

    def __init__(
        self,
        producer: Producer,
        settings: KafkaSettings,
        group: str,
        run_records_max: int,
        on_dead_letter: Callable[[str], None] | None = None,
    ) -> None:
        """The committed offsets of `group` are read; the group is never joined.

        `on_dead_letter` gets the reason of each dead letter that this log makes itself.
        """
        self._producer, self._on_dead_letter = producer, on_dead_letter
        self._topic_name = settings.topic_name
        self._admin = AIOKafkaAdminClient(**settings.client_options())
        self._reader = RangeReader(settings, group, run_records_max)
        self._producing = asyncio.Lock()

    def of_partition(self) -> KafkaLog:
        """Return a log over the same connections, with an order of its own for what it produces.

        Each partition has one. So a record that waits for room in the producer delays only its own partition's outputs.
        """
        log = copy.copy(self)
        log._producing = asyncio.Lock()  # noqa: SLF001  of the same class
        return log

    async def start(self) -> None:
        """Connect. The owner of the producer starts and stops the producer."""
        await persist(self._admin.start)
        await self._reader.start()

    async def stop(self) -> None:
        """Disconnect."""
        await self._reader.stop()
        await self._admin.close()

    async def bounds(self, partition: Partition) -> LogBounds:
        return await persist(partial(self._bounds, partition))

    async def _bounds(self, partition: Partition) -> LogBounds:
        cluster = await self._admin.describe_cluster()
        described = await self._admin.describe_topics([self._topic_name(partition.topic)])
        extent = await self._reader.extent(partition)
        return LogBounds(str(cluster["cluster_id"]), len(described[0]["partitions"]), *extent)

    async def ends(self, topic: str, numbers: Sequence[int]) -> Mapping[int, int]:
        """Return the end offsets of these partitions, or nothing if Kafka does not answer. Does not retry."""
        try:
            return await self._reader.ends(topic, numbers)
        except (KafkaError, OSError):
            return {}

    async def read(
        self, partition: Partition, start: int, stop: int
    ) -> AsyncIterator[Sequence[Record]]:
        position = start
        while position < stop:
            run, position = await persist(partial(self._reader.run, partition, position, stop))
            if run:
                yield run

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        return asyncio.ensure_future(self._produce(records))

    async def _produce(self, records: Sequence[OutgoingRecord]) -> None:
        sent: list[Buffered] = []
        # `send` waits while the producer's buffer is full. Without the lock a later call could overtake this one then.
        async with self._producing:
            for record in records:
                sent += await self._send(record)
        results = await asyncio.gather(*(future for _, future in sent), return_exceptions=True)
        for (topic, _), result in zip(sent, results, strict=True):
            if isinstance(result, KafkaError):
                raise _refused(topic, result) from result
            if isinstance(result, BaseException):
                raise result

    async def _send(self, record: OutgoingRecord) -> list[Buffered]:
        """Send a record, and return what to wait for.

        A record that is too large for Kafka would fail at every attempt. An empty dead letter takes its place, with
        the reason. If the record is a command with a lease, its report follows.
        """
        try:
            return [await self._buffer(record)]
        except MessageSizeTooLargeError as error:
            topic = record.topic
            logger.error(  # noqa: TRY400  no traceback
                "a record for %s is too large for Kafka and becomes a dead letter: %s", topic, error
            )
            # A dead letter that is too large was counted when it was made.
            if self._on_dead_letter is not None and topic != keys.DEAD_LETTERS_TOPIC:
                self._on_dead_letter("too_large")
            letter = marks_alone(record, error)
            report = _too_large_report(record)
            stand_ins = [letter] if report is None else [report, letter]
            return [await self._buffer(each) for each in stand_ins]

    async def _buffer(self, record: OutgoingRecord) -> Buffered:
        topic, key, value, headers, partition = record
        try:
            return topic, await self._producer.send(topic, key, value, partition, headers)
        except MessageSizeTooLargeError:
            raise
        except KafkaError as error:
            raise _refused(topic, error) from error


def _refused(topic: str, error: KafkaError) -> LogRefused:
    return LogRefused(
        f"Kafka refused a record for {topic}: {error}:"
        " compare the topic with the settings, with `millpond kafka check`"
    )


def _too_large_report(record: OutgoingRecord) -> OutgoingRecord | None:
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
    return OutgoingRecord(keys.MESSAGES_TOPIC, key, codec.encode(failed), (), lease.partition)
