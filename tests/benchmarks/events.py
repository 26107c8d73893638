"""The events of the benchmarks, and how they come into Kafka."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from aiokafka import AIOKafkaProducer

from schemas import codec, keys
from schemas.events import MessagePublished

PARTITIONS: Final = 4  # two cores: more partitions are only smaller batches
TOPICS: Final = 1_000
# With the ids and names around it, about 200 bytes of a message; as canonical JSON a record is twice that.
PAYLOAD: Final = (
    '{"temperature":21.5,"humidity":40,"battery":3.71,"state":"running","note":"as usual"}'
)
FIRST_MS: Final = 1_700_000_000_000

# What is buffered for Kafka at once, and how large a batch of it is: generous, so that filling a topic takes seconds.
BATCH_BYTES_MAX: Final = 900_000
BATCHES_UNDER_WAY_MAX: Final = 16


def topic_name(number: int) -> str:
    return f"bench/device-{number:07d}/state"


def event(number: int, topics: int = TOPICS) -> MessagePublished:
    """The event with this number; topics take turns."""
    device = number % topics
    at = FIRST_MS + number
    return MessagePublished(
        at=at,
        node="emqx@10.0.0.1",
        message_id=f"{number:032x}",
        topic=topic_name(device),
        qos=1,
        retain=False,
        client_id=f"device-{device:07d}",
        payload=PAYLOAD,
        published_at=at,
    )


async def fill(bootstrap: str, events: int, topics: int = TOPICS) -> None:
    """Write events into Kafka, an MQTT topic always into the same partition."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, max_batch_size=BATCH_BYTES_MAX, linger_ms=5
    )
    await producer.start()
    try:
        under_way: deque[Any] = deque()
        batches = [producer.create_batch() for _ in range(PARTITIONS)]

        async def send(partition: int) -> None:
            batch = batches[partition]
            if batch.record_count():
                under_way.append(
                    await producer.send_batch(batch, keys.MESSAGES_TOPIC, partition=partition)
                )
                batches[partition] = producer.create_batch()
            while len(under_way) > BATCHES_UNDER_WAY_MAX:
                await under_way.popleft()

        for number in range(events):
            published = event(number, topics)
            partition = number % topics % PARTITIONS
            key, value = published.topic.encode(), codec.encode(published)
            if batches[partition].append(key=key, value=value, timestamp=None) is None:
                await send(partition)
                batches[partition].append(key=key, value=value, timestamp=None)
        for partition in range(PARTITIONS):
            await send(partition)
        await asyncio.gather(*under_way)
    finally:
        await producer.stop()
