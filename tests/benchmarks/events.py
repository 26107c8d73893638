"""The events of the benchmarks, and how they come into Kafka."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

from aiokafka import AIOKafkaProducer

from millpond.schemas import codec, keys
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    Event,
    MessagePublished,
    SessionCreated,
    SessionSubscribed,
)

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


def publishes(events: int, topics: int = TOPICS) -> Iterator[tuple[int, Event]]:
    """Publishes, each with its partition: that of its MQTT topic."""
    for number in range(events):
        yield number % topics % PARTITIONS, event(number, topics)


def connects_and_disconnects(clients: int) -> Iterator[tuple[int, Event]]:
    """Every client connects, then every client disconnects."""
    node = "emqx@10.0.0.1"
    for number in range(clients):
        connected = ClientConnected(
            at=FIRST_MS + number, client_id=client_name(number), connection_id=peer(number),
            connected_at=FIRST_MS + number, node=node,
        )  # fmt: skip
        yield number % PARTITIONS, connected
    for number in range(clients):
        at = FIRST_MS + clients + number
        disconnected = ClientDisconnected(
            at=at,
            client_id=client_name(number),
            connection_id=peer(number),
            reason="normal",
            node=node,
        )
        yield number % PARTITIONS, disconnected


def registrations(clients: int) -> Iterator[tuple[int, Event]]:
    """Every client begins a session, connects and subscribes to one filter."""
    for number in range(clients):
        fields: dict[str, Any] = {
            "at": FIRST_MS + number, "node": "emqx@10.0.0.1", "client_id": client_name(number),
        }  # fmt: skip
        for told in (
            SessionCreated(**fields),
            ClientConnected(**fields, connection_id=peer(number), connected_at=FIRST_MS + number),
            SessionSubscribed(**fields, topic_filter=topic_name(number), qos=1),
        ):
            yield number % PARTITIONS, told


def client_name(number: int) -> str:
    return f"device-{number:07d}"


def peer(number: int) -> str:
    """The identity of a client's connection."""
    return f"emqx@10.0.0.1/10.1.{number // 60_000}.7:{number % 60_000 + 1_024}"


async def fill(bootstrap: str, topic: str, events: Iterable[tuple[int, Event]]) -> None:
    """Write events into Kafka, each into its partition."""
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
                under_way.append(await producer.send_batch(batch, topic, partition=partition))
                batches[partition] = producer.create_batch()
            while len(under_way) > BATCHES_UNDER_WAY_MAX:
                await under_way.popleft()

        for partition, told in events:
            key, value = keys.record_key(told).encode(), codec.encode(told)
            if batches[partition].append(key=key, value=value, timestamp=None) is None:
                await send(partition)
                batches[partition].append(key=key, value=value, timestamp=None)
        for partition in range(PARTITIONS):
            await send(partition)
        await asyncio.gather(*under_way)
    finally:
        await producer.stop()
