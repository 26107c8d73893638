"""A pipeline under test: real worker processes, real records in Kafka, and their effects in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from millpond.schemas import keys
from millpond.schemas.events import Event
from tests.support import given
from tests.support.replays import check_replay

PARTITIONS = 4
WAIT_S = 60.0  # for a condition to become true; generous, because machines are shared


async def until(condition: Callable[[], Awaitable[Any]], what: str | Callable[[], str]) -> Any:
    """Poll a condition, and return its first true answer."""
    deadline = time.monotonic() + WAIT_S
    while True:
        answer = await condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, (
            f"waited {WAIT_S:.0f} s for: {what if isinstance(what, str) else what()}"
        )
        await asyncio.sleep(0.05)


class Worker:
    """One `millpond worker` process."""

    def __init__(self, config: Path, log: Path, agent: str = "messages") -> None:
        self.log, self.ready = log, log.with_suffix(f".{time.monotonic_ns()}.ready")
        environment = {**os.environ, "MILLPOND_READY_FILE": str(self.ready)}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "millpond", "worker", agent, "--config", str(config)],
                stdout=output, stderr=output, env=environment,
            )  # fmt: skip

    async def until_ready(self) -> None:
        """Wait until the worker has loaded the partitions that it owns."""

        async def ready() -> bool:
            assert self.process.poll() is None, f"the worker ended:\n{self.log.read_text()}"
            return self.ready.exists()

        await until(ready, "a ready worker")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the end of the process, and return its exit code."""
        return await asyncio.to_thread(self.process.wait, WAIT_S)


class Pipeline:
    """The Kafka topics and Redis keys of one test, and the workers that it starts."""

    def __init__(self, app: str, bootstrap: str, redis_url: str, directory: Path) -> None:
        self.app, self.bootstrap, self.redis_url, self.directory = (
            app,
            bootstrap,
            redis_url,
            directory,
        )
        # Some tests kill their Redis. The client must then connect again.
        self.redis: Redis = Redis.from_url(redis_url, retry=Retry(ConstantBackoff(0.1), 50))
        self.workers: list[Worker] = []
        # True if a replay of the log must give the same Redis. False if the test wrote to Redis itself.
        self.replays_as_live = True
        self.producer = AIOKafkaProducer(bootstrap_servers=bootstrap, max_request_size=4 << 20)

    def configure(self, *rules: str, batch_records_max: int = 500) -> Path:
        """Write the workers' configuration."""
        config = self.directory / "millpond.toml"
        server = self.redis_url.removeprefix("redis://").partition("/")
        config.write_text(
            f'app = "{self.app}"\n[kafka]\nbootstrap_servers = ["{self.bootstrap}"]\n'
            f"partitions = {PARTITIONS}\n"
            f"[worker]\nbatch_records_max = {batch_records_max}\nsession_timeout_s = 6\n"
            f'[pool.pool1]\nserver = "{server[0]}"\ndatabase = {server[2] or 0}\n' + "".join(rules)
        )
        return config

    async def worker(self, agent: str = "messages") -> Worker:
        """Start one more worker, and wait until it is ready."""
        log = self.directory / f"worker-{len(self.workers)}.log"
        worker = Worker(self.directory / "millpond.toml", log, agent)
        self.workers.append(worker)
        await worker.until_ready()
        return worker

    async def publish(self, events: Iterable[Event]) -> None:
        """Produce events as a bridge does, and wait for Kafka's acknowledgements."""
        sent = [
            await self.producer.send(keys.MESSAGES_TOPIC, key=key, value=value)
            for key, value in map(given.key_and_value, events)
        ]
        await asyncio.gather(*sent)

    async def dead_letters(self) -> list[Any]:
        """All records in the dead-letter topic so far."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap, group_id="tests", enable_auto_commit=False,
            max_partition_fetch_bytes=8 << 20,
        )  # fmt: skip
        await consumer.start()
        try:
            parts = [TopicPartition(keys.DEAD_LETTERS_TOPIC, at) for at in range(PARTITIONS)]
            consumer.assign(parts)
            ends = await consumer.end_offsets(parts)
            dead_letters = []
            for part in parts:
                await consumer.seek_to_beginning(part)
                while await consumer.position(part) < ends[part]:
                    fetched = await consumer.getmany(part, timeout_ms=500)
                    dead_letters += fetched.get(part, [])
            return dead_letters
        finally:
            await consumer.stop()

    async def stop(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                await worker.ended()
        await self.producer.stop()
        await self.redis.aclose()


@contextlib.asynccontextmanager
async def running(
    app: str, bootstrap: str, redis_url: str, directory: Path
) -> AsyncIterator[Pipeline]:
    """A pipeline with new, empty topics and an empty Redis. Its workers end with the context.

    At the end a replay of the log must give the same Redis, unless the test has switched that off.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    topics = [
        NewTopic(
            name, PARTITIONS, 1,
            topic_configs={"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(4 << 20)},
        )
        for name in keys.TOPICS
    ]  # fmt: skip
    existing = set(await admin.list_topics())
    if existing & set(keys.TOPICS):
        await admin.delete_topics(list(existing & set(keys.TOPICS)))

        async def gone() -> bool:
            return not set(await admin.list_topics()) & set(keys.TOPICS)

        await until(gone, "the topics of the previous test to be gone")
    await admin.create_topics(topics)
    await admin.close()
    pipeline = Pipeline(app, bootstrap, redis_url, directory)
    await pipeline.redis.flushall()
    await pipeline.producer.start()
    try:
        yield pipeline
        if pipeline.replays_as_live and pipeline.workers:
            await check_replay(directory / "millpond.toml", redis_url)
    finally:
        await pipeline.stop()
