"""What operators order: a record each, which the owner of the topic carries out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import Final, TypeAlias

from aiokafka.errors import KafkaError

from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import codec, keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import OperatorDrop, OperatorRequeue, OperatorRewind

OperatorEvent: TypeAlias = OperatorRequeue | OperatorDrop | OperatorRewind

WRITTEN_AT_ONCE: Final = 1_000  # orders that wait for Kafka's acknowledgement
ACKNOWLEDGED_TIMEOUT_S: Final = 60.0  # Kafka elects a new leader in less
STOP_TIMEOUT_S: Final = 5.0


async def write(settings: KafkaSettings, orders: Iterable[OperatorEvent]) -> int:
    """Write orders one after the other; how many. All are acknowledged by Kafka.

    Raises:
        ConfigError: Kafka cannot be reached; nothing was written.
        MillpondError: Kafka did not take them all; it says how many it did.
    """
    producer = Producer(settings.client_options(), settings.message_bytes_max)
    written, waiting = 0, iter(orders)
    try:
        try:
            await producer.start()
        except KafkaError as error:
            raise await unreachable(settings) from error
        while some := list(islice(waiting, WRITTEN_AT_ONCE)):
            async with asyncio.timeout(ACKNOWLEDGED_TIMEOUT_S):
                await _write_some(producer, some)
            written += len(some)
    except (KafkaError, TimeoutError) as error:
        reason = str(error) or f"no acknowledgement for {ACKNOWLEDGED_TIMEOUT_S:g} s"
        raise MillpondError(
            f"Kafka took {written} orders and then no more: {reason}; once it is well, give the same command again:"
            " what was carried out is no dead letter any more"
        ) from error
    finally:
        # Its stop waits for Kafka for ever.
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await producer.stop()
    return written


async def _write_some(producer: Producer, some: Iterable[OperatorEvent]) -> None:
    acknowledged = []
    for event in some:
        key, value = keys.record_key(event).encode(), codec.encode(event)
        acknowledged.append(await producer.send(keys.MESSAGES_TOPIC, key, value))
    await asyncio.gather(*acknowledged)
