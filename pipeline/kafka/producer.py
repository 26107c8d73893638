"""The Kafka producer of workers and bridges: idempotent, acknowledged by all replicas, in order for each key.

What it adds to aiokafka's producer, and why:

1. **A buffered record never expires.** aiokafka drops a batch that finds no leader for 40 s. Later batches of the same
   key would then overtake it. Here it waits without limit. The publish behind it is not acknowledged until then.
2. **A full buffer makes `send` wait.** This is how back-pressure reaches the caller.
3. **A refused record does not stop its partition.** See `_renew_if_refused`.
4. **A record can have a batch of its own.** Kafka refuses a whole batch because of one record, and the producer is shared.
   Only the answer to a batch of one record is an answer about that record. See `send_alone`.
5. **Topics get their names in Kafka.** `send` and `send_alone` take the names of `schemas/keys.py`.

1 and 3 touch private parts of aiokafka. tests/contracts/test_faust.py watches those of 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    ProducerClosed,
    ProducerFenced,
    RecordListTooLargeError,
)
from aiokafka.producer.transaction_manager import NO_PRODUCER_EPOCH, NO_PRODUCER_ID, PidAndEpoch
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from millpond.pipeline.kafka.partitioning import partition_of
from millpond.pipeline.settings import KafkaSettings

# A record waits this long for others to share its request. Kafka takes about as long to acknowledge one.
LINGER_MS: Final = 1
BATCH_BYTES_MAX: Final = 256 * 1024
NEVER_S: Final = float("inf")
# About a record that was sent alone, these are for ever: the producer's own limit, and two answers of Kafka.
TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)


class Producer:
    """Sends records. The module's docstring says what it adds to aiokafka's producer."""

    def __init__(self, settings: KafkaSettings) -> None:
        """`start` connects.

        Raises:
            ConfigError: A certificate, key or password file is missing or cannot be used.
        """
        self._options, self._topic_name = settings.client_options(), settings.topic_name
        self.message_bytes_max = settings.message_bytes_max
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect."""
        self._producer = AIOKafkaProducer(
            acks="all",
            enable_idempotence=True,
            linger_ms=LINGER_MS,
            max_batch_size=BATCH_BYTES_MAX,
            max_request_size=self.message_bytes_max,
            **self._options,
        )
        # Without this, aiokafka drops a batch after request_timeout_ms without a leader, 40 s by default.
        self._producer._message_accumulator._batch_ttl = NEVER_S  # noqa: SLF001
        await self._producer.start()

    async def stop(self) -> None:
        """Send the buffered records and disconnect."""
        if self._producer is not None:
            await self._producer.stop()

    async def flush(self) -> None:
        """Wait until Kafka has acknowledged or refused every record sent so far."""
        assert self._producer is not None, "start() comes first"
        await self._producer.flush()

    async def why_unreachable(self, timeout_s: float) -> str | None:
        """Ask Kafka for metadata. Return why it does not answer within `timeout_s`, or None if it answers."""
        if self._producer is None:
            return "Kafka is not connected yet"
        try:
            async with asyncio.timeout(timeout_s):
                await self._producer.client.fetch_all_metadata()
        except TimeoutError:
            return f"Kafka has not answered within {timeout_s:g} s"
        except (KafkaError, OSError) as error:
            return f"Kafka does not answer: {error}"
        return None

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> asyncio.Future[Any]:
        """Buffer one record; wait while the buffer is full. The future is done when Kafka has acknowledged the record.

        Raises:
            MessageSizeTooLargeError: The record is larger than `message_bytes_max`.
        """
        assert self._producer is not None, "start() comes first"
        if key is None and value is None:
            # aiokafka asserts that a record has a key or value. Kafka would also take a record with only headers.
            value = b""
        while True:
            # Raised after 40 s, when the buffer stayed full or the topic's metadata did not come: try again.
            with contextlib.suppress(KafkaTimeoutError):
                acknowledged: asyncio.Future[Any] = await self._producer.send(
                    self._topic_name(topic),
                    value=value,
                    key=key,
                    partition=partition,
                    headers=list(headers),
                )
                acknowledged.add_done_callback(self._renew_if_refused)
                return acknowledged

    async def send_alone(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Produce one record in a batch of its own, and wait until Kafka has it.

        Raises:
            KafkaError: Kafka refuses this record. One of `TOO_LARGE`: it would do so at every attempt.
        """
        assert self._producer is not None, "start() comes first"
        if key is None and value is None:
            value = b""
        size = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, list(headers))
        if size > self.message_bytes_max:
            raise MessageSizeTooLargeError(
                f"a record of {size} bytes, and the limit is {self.message_bytes_max}"
            )
        acknowledged = None
        while acknowledged is None:
            # As in `send`.
            with contextlib.suppress(KafkaTimeoutError):
                name = self._topic_name(topic)
                numbers = sorted(await self._producer.partitions_for(name))
                batch = self._producer.create_batch()
                batch.append(timestamp=None, key=key, value=value, headers=list(headers))
                batch.close()
                acknowledged = await self._producer.send_batch(
                    batch, name, partition=_number(key, partition, numbers)
                )
        acknowledged.add_done_callback(self._renew_if_refused)
        await acknowledged

    def _renew_if_refused(self, acknowledged: asyncio.Future[Any]) -> None:
        """Take a new producer id after Kafka refused a record.

        An idempotent producer numbers its batches for each partition. A refused batch leaves a gap in the numbers, and
        Kafka would refuse everything behind the gap. A new id starts at 0 in every partition. Batches on their way keep
        the old id and numbers. There is at most one for each partition, so the new numbers overtake nothing.
        """
        if acknowledged.cancelled() or acknowledged.exception() is None:
            return
        assert self._producer is not None, "it has sent"
        numbers = self._producer._txn_manager  # noqa: SLF001  aiokafka has no public way
        numbers._pid_and_epoch = PidAndEpoch(NO_PRODUCER_ID, NO_PRODUCER_EPOCH)  # noqa: SLF001
        numbers._pid_waiter = asyncio.get_running_loop().create_future()  # noqa: SLF001
        numbers._sequence_numbers.clear()  # noqa: SLF001


def _number(key: bytes | None, partition: int | None, numbers: Sequence[int]) -> int:
    """The partition of a record: the one that is named, that of the key, or any of `numbers`."""
    if partition is not None:
        return partition
    if key is None:
        return random.choice(numbers)  # noqa: S311  no secret
    return partition_of(key, len(numbers))


def has_ended(error: BaseException) -> bool:
    """True if the producer raises this for every record from now on: the process must start again."""
    # aiokafka's sender ends with a plain KafkaError.
    return type(error) is KafkaError or isinstance(error, ProducerClosed | ProducerFenced)
