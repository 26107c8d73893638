"""Whether a worker's memory stays as it is, however much and however many topics it has seen."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import psutil
from redis import Redis

from millpond.schemas import keys
from tests.benchmarks import scene
from tests.benchmarks.events import fill, publishes
from tests.benchmarks.scene import Process
from tests.benchmarks.table import progress

TOPICS: Final = 1_000_000
SAMPLE_INTERVAL_S: Final = 0.1
SAMPLES: Final = 20  # of which the median counts: a batch comes and goes
STALL_S: Final = 60.0
PROGRESS_S: Final = 30.0
# Per event: what Redis holds of it, and what Kafka and Redis write of it to disk.
REDIS_BYTES: Final = 700
DISK_BYTES: Final = 1_000


class Memory(NamedTuple):
    """RSS in MiB after a first part of the events, and after all of them."""

    first: float
    last: float
    rate: float  # messages per second, of the whole


def room(directory: Path, events: int) -> str | None:
    """Why this machine cannot do it, or None."""
    memory, disk = psutil.virtual_memory().available, psutil.disk_usage(str(directory)).free
    if memory < events * REDIS_BYTES:
        return f"needs {events * REDIS_BYTES / 2**30:.0f} GiB of memory"
    if disk < events * DISK_BYTES:
        return f"needs {events * DISK_BYTES / 2**30:.0f} GiB of disk"
    return None


def run(first: int, last: int) -> Memory:
    """Events over a million topics, waiting in Kafka, and one worker."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        progress(f"memory: writing {last:,} events into Kafka")
        publishes_ = publishes(last, TOPICS)
        asyncio.run(fill(settings.bootstrap_servers[0], keys.MESSAGES_TOPIC, publishes_))
        scene.configure(Path(name), "bench-memory", settings, scene.address(redis))
        process = scene.millpond("worker", "worker", "messages", directory=Path(name))
        try:
            return _watch(process, redis, first, last)
        finally:
            process.kill()


def _watch(process: Process, redis: Redis, first: int, last: int) -> Memory:
    worker, sizes = psutil.Process(process.pid), dict[int, float]()
    samples: deque[float] = deque(maxlen=SAMPLES)
    started = progressed_at = told_at = time.monotonic()
    before = 0
    while last not in sizes:
        process.check()
        samples.append(worker.memory_info().rss / 2**20)
        now, stored = time.monotonic(), _stored(redis.dbsize())
        for goal in (first, last):
            if stored >= goal:
                sizes.setdefault(goal, median(samples))
        if stored > before:
            progressed_at, before = now, stored
        assert now - progressed_at < STALL_S, f"nothing stored for {STALL_S:.0f} s"
        if now - told_at >= PROGRESS_S:
            told_at = now
            progress(f"memory: {stored:,} stored, RSS {samples[-1]:.0f} MiB")
        time.sleep(SAMPLE_INTERVAL_S)
    return Memory(sizes[first], sizes[last], last / (now - started))


def _stored(size: int) -> int:
    """Messages among so many keys: until every topic has its index, each message brought two."""
    return size - min(size // 2, TOPICS)
