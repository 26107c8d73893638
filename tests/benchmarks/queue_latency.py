"""How long it takes from a publish event in Kafka until the command to deliver it is there, at a steady rate."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.events import DeliveriesSent, Event, Sent
from millpond.schemas.leases import parse_lease
from tests.benchmarks import scene
from tests.benchmarks.events import PARTITIONS, fill
from tests.benchmarks.latency import Latency
from tests.benchmarks.progress import until_applied
from tests.benchmarks.queues import APP, RULES, TOPICS, ack, joins, publish

RATE: Final = 1_000  # messages per second
WARM_UP_S: Final = 10.0
PATIENCE_S: Final = 30.0


def run(seconds: float) -> Latency:
    """Publish for so long; every message has to be handed out. A script plays the bridge, and acknowledges each."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        bootstrap = settings.bootstrap_servers[0]
        asyncio.run(fill(bootstrap, keys.MESSAGES_TOPIC, joins()))
        scene.configure(Path(name), APP, settings, scene.address(redis), rules=RULES)
        process = scene.millpond("worker", "worker", "queue", directory=Path(name))
        try:
            until_applied(process, redis, APP, "queue", TOPICS)
            ms = asyncio.run(_measure(bootstrap, int(RATE * (WARM_UP_S + seconds))))
        finally:
            process.kill()
    counted = ms[int(RATE * WARM_UP_S) :]
    percentiles = quantiles(counted, n=100)
    return Latency(percentiles[49], percentiles[98], len(counted))


async def _measure(bootstrap: str, messages: int) -> list[float]:
    """Milliseconds of each message, in the order of publishing."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=0)
    consumer = AIOKafkaConsumer(
        keys.DELIVERIES_TOPIC, bootstrap_servers=bootstrap, auto_offset_reset="earliest"
    )
    await producer.start()
    await consumer.start()
    published_at = [0.0] * messages
    try:
        async with asyncio.timeout(messages / RATE + PATIENCE_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(_publish(producer, published_at))
            handed_out_at = await tasks.create_task(_play_bridge(producer, consumer, messages))
    finally:
        await consumer.stop()
        await producer.stop()
    pairs = zip(published_at, handed_out_at, strict=True)
    return [(handed_out - published) * 1000 for published, handed_out in pairs]


async def _publish(producer: AIOKafkaProducer, published_at: list[float]) -> None:
    """Each message at its own moment, whatever became of those before."""
    loop = asyncio.get_running_loop()
    started = loop.time() + 1.0
    for number in range(len(published_at)):
        await asyncio.sleep(started + number / RATE - loop.time())
        published_at[number] = time.monotonic()
        await _send(producer, number % TOPICS % PARTITIONS, publish(number))


async def _play_bridge(
    producer: AIOKafkaProducer, consumer: AIOKafkaConsumer, messages: int
) -> list[float]:
    """When each message was handed out; it is reported as sent and acknowledged at once."""
    handed_out_at = [0.0] * messages
    left = messages
    while left:
        for records in (await consumer.getmany(timeout_ms=1_000)).values():
            now = time.monotonic()
            commands = [codec.decode_command(record.value) for record in records]
            delivers = [command for command in commands if isinstance(command, Deliver)]
            sent: dict[int, list[Sent]] = {}
            for each in delivers:
                number = int(each.message_id, 16)
                assert not handed_out_at[number], f"message {number} was handed out twice"
                handed_out_at[number] = now
                report = Sent(each.lease, each.client_id, each.message_id)
                sent.setdefault(parse_lease(each.lease).partition, []).append(report)
            for partition, reports in sent.items():
                told = DeliveriesSent(at=0, node="n", agent="queue", sent=tuple(reports))
                await _send(producer, partition, told)
            for each in delivers:
                number = int(each.message_id, 16)
                await _send(producer, number % TOPICS % PARTITIONS, ack(number))
            left -= len(delivers)
    return handed_out_at


async def _send(producer: AIOKafkaProducer, partition: int, event: Event) -> None:
    key, value = keys.record_key(event).encode(), codec.encode(event)
    await producer.send(keys.MESSAGES_TOPIC, value, key, partition)
