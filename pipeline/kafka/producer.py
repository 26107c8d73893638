"""The one Kafka producer of workers and bridges: idempotent, acknowledged by all replicas, in order per key."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError
from aiokafka.producer.transaction_manager import NO_PRODUCER_EPOCH, NO_PRODUCER_ID, PidAndEpoch

# Records wait this long for company. Kafka acknowledges in about as long; more would only be felt.
LINGER_MS: Final = 1
BATCH_BYTES_MAX: Final = 256 * 1024
# A record that the buffer has taken waits for Kafka for ever: what it came from is not acknowledged until then.
NEVER_S: Final = float("inf")


class Producer:
    """Sends records; `send` waits while the buffer is full, which is how back-pressure reaches a caller."""

    def __init__(self, client_options: dict[str, Any], message_bytes_max: int) -> None:
        """`client_options` are those of every aiokafka client; nothing is opened before `start`."""
        self._options = client_options
        self.message_bytes_max = message_bytes_max
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
        # aiokafka drops a batch that found no leader for request_timeout_ms, and with it the order of a key.
        self._producer._message_accumulator._batch_ttl = NEVER_S  # noqa: SLF001
        await self._producer.start()

    async def stop(self) -> None:
        """Send what is buffered and disconnect."""
        if self._producer is not None:
            await self._producer.stop()

    async def complaint(self, timeout_s: float) -> str | None:
        """Why Kafka does not answer; None if it does, within `timeout_s`."""
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
        """Buffer one record, waiting while the buffer is full; the future is done when Kafka has acknowledged it.

        Raises:
            MessageSizeTooLargeError: the record is larger than `message_bytes_max`.
        """
        assert self._producer is not None, "start() comes first"
        if key is None and value is None:
            value = b""  # aiokafka's assertion; Kafka itself would take a record of headers alone
        while True:
            with contextlib.suppress(
                KafkaTimeoutError
            ):  # the buffer stayed full, or no metadata yet
                acknowledged: asyncio.Future[Any] = await self._producer.send(
                    topic, value=value, key=key, partition=partition, headers=list(headers)
                )
                acknowledged.add_done_callback(self._answered)
                return acknowledged

    def _answered(self, acknowledged: asyncio.Future[Any]) -> None:
        """A record that Kafka refused left a gap in its partition's sequence, and Kafka would refuse everything after
        the gap: go on as a new producer. Batches under way keep their numbers, and one is under way per partition.
        """
        if acknowledged.cancelled() or acknowledged.exception() is None:
            return
        assert self._producer is not None, "it has sent"
        numbers = self._producer._txn_manager  # noqa: SLF001  aiokafka has no way to
        numbers._pid_and_epoch = PidAndEpoch(NO_PRODUCER_ID, NO_PRODUCER_EPOCH)  # noqa: SLF001
        numbers._pid_waiter = asyncio.get_running_loop().create_future()  # noqa: SLF001
        numbers._sequence_numbers.clear()  # noqa: SLF001
