"""Orders of an operator. Each is an event in `mqtt.messages`, and the worker that owns the topic applies it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import Final, TypeAlias

from aiokafka.errors import KafkaError

from millpond.pipeline.kafka.answers import started
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import codec, keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import OperatorDrop, OperatorRequeue, OperatorRewind

OperatorEvent: TypeAlias = OperatorRequeue | OperatorDrop | OperatorRewind

WRITTEN_AT_ONCE: Final = 1_000  # orders of one batch
ACKNOWLEDGED_TIMEOUT_S: Final = 15.0  # for a batch; Kafka elects a new leader in less
STOP_TIMEOUT_S: Final = 1.0  # all that was sent is acknowledged, or given up


async def write(settings: KafkaSettings, orders: Iterable[OperatorEvent]) -> int:
    """Write orders in batches, and return how many. Kafka has acknowledged all of them.

    Raises:
        ConfigError: Kafka refuses the settings of the connection. Nothing was written.
        MillpondError: Kafka cannot be reached, and nothing was written. Or it did not acknowledge a batch. The message counts the orders that it acknowledged before.
    """
    producer = Producer(settings)
    written, remaining = 0, iter(orders)
    try:
        await started(settings, producer.start())
        while batch := list(islice(remaining, WRITTEN_AT_ONCE)):
            async with asyncio.timeout(ACKNOWLEDGED_TIMEOUT_S):
                await _write_batch(producer, batch)
            written += len(batch)
    except (KafkaError, TimeoutError) as error:
        reason = str(error) or f"no acknowledgement for {ACKNOWLEDGED_TIMEOUT_S:g} s"
        raise MillpondError(
            f"Kafka at {', '.join(settings.bootstrap_servers)} acknowledged {written} orders and then failed: {reason}; repeat the command when Kafka works again:"
            " it finds only the dead letters that are left"
        ) from error
    finally:
        # The stop of a producer waits for Kafka without end.
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await producer.stop()
    return written


async def _write_batch(producer: Producer, batch: Iterable[OperatorEvent]) -> None:
    acknowledged = []
    for event in batch:
        key, value = keys.record_key(event).encode(), codec.encode(event)
        acknowledged.append(await producer.send(keys.MESSAGES_TOPIC, key, value))
    await asyncio.gather(*acknowledged)
