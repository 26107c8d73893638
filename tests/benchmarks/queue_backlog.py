"""What a backlog costs: how soon its first messages are handed out, and how much of it the worker holds in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from millpond.pipeline.operate.lag import LagReader
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import codec, keys
from millpond.schemas.events import Event
from tests.benchmarks import scene
from tests.benchmarks.events import fill
from tests.benchmarks.progress import until_applied
from tests.benchmarks.queues import APP, RULES, TOPICS, joins, publish

PATIENCE_S: Final = 30.0


class Backlog(NamedTuple):
    """Seconds from the join's being in Kafka until the first command is; MiB of the worker then."""

    seconds: float
    rss: float


def run(stored: int) -> Backlog:
    """So many messages wait in one topic, stored by a worker that is no more; then its first consumer comes."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        bootstrap = settings.bootstrap_servers[0]
        asyncio.run(fill(bootstrap, keys.MESSAGES_TOPIC, _published(stored)))
        scene.configure(Path(name), APP, settings, scene.address(redis), rules=RULES)
        process = scene.millpond("worker", "worker", "queue", directory=Path(name))
        try:
            until_applied(process, redis, APP, "queue", stored)
            _until(lambda: asyncio.run(_uncommitted(settings)) == 0, "its commit")
        finally:
            process.kill()
        # Another one, whose memory is not that of having stored them.
        process = scene.millpond("successor", "worker", "queue", directory=Path(name))
        try:
            _until(process.ready_file.exists, "the successor to be ready")
            seconds = asyncio.run(_first_command(bootstrap))
            rss = psutil.Process(process.pid).memory_info().rss / 2**20
        finally:
            process.kill()
    return Backlog(seconds, rss)


async def _uncommitted(settings: KafkaSettings) -> int:
    async with LagReader(settings, APP) as offsets:
        (found,) = await offsets.of(["queue"])
    return found.uncommitted


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)


def _published(stored: int) -> Iterator[tuple[int, Event]]:
    for number in range(stored):
        yield 0, publish(number * TOPICS)  # all in the first topic


async def _first_command(bootstrap: str) -> float:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    consumer = AIOKafkaConsumer(
        keys.DELIVERIES_TOPIC, bootstrap_servers=bootstrap, auto_offset_reset="earliest"
    )
    await producer.start()
    await consumer.start()
    try:
        _, joined = next(joins())
        key, value = keys.record_key(joined).encode(), codec.encode(joined)
        await producer.send_and_wait(keys.MESSAGES_TOPIC, value, key, 0)
        started = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            await consumer.getone()
        return time.monotonic() - started
    finally:
        await consumer.stop()
        await producer.stop()
