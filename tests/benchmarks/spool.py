"""How fast events come into the spool of a bridge while Kafka does not answer, and out of it; and what that costs.

As a program: `python -m tests.benchmarks.spool BOOTSTRAP DIRECTORY EVENTS` is the bridge's part: it prints one line of
JSON after each phase, and goes on when a line comes back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import psutil
import uvloop

from millpond.pipeline.brokers.spool.directory import Spool
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.kafka import topics
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys
from tests.benchmarks.events import event
from tests.benchmarks.table import progress
from tests.support import servers

SPOOL_BYTES_MAX: Final = 4 * 1024**3
DIRECT: Final = 50_000  # events while Kafka answers
AT_ONCE: Final = 500  # events that wait for their answer
DISK_BYTES: Final = 2_000  # per event: Kafka's and the spool's
KAFKA_PARTITIONS: Final = 24


class Result(NamedTuple):
    """Events per second, of each way; RSS in MiB after a first tenth in the spool, and at most after it."""

    direct: float
    spooled: float
    drained: float
    rss_first: float
    rss_most: float


def room(directory: Path, events: int) -> str | None:
    """Why this machine cannot do it, or None."""
    if psutil.disk_usage(str(directory)).free < events * DISK_BYTES:
        return f"needs {events * DISK_BYTES / 2**30:.0f} GiB of disk"
    return None


def run(events: int) -> Result:
    """So many events while Kafka is paused."""
    with TemporaryDirectory() as name:
        kafka = servers.kafka_server(Path(name) / "kafka").start()
        try:
            settings = KafkaSettings(
                bootstrap_servers=(kafka.address,), partitions=KAFKA_PARTITIONS
            )
            asyncio.run(topics.create(settings))
            with subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.spool", kafka.address, name, str(events)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) as bridge:  # fmt: skip
                direct = _phase(bridge)
                kafka.pause()
                spooled = _phase(bridge)
                kafka.resume()
                drained = _phase(bridge)
        finally:
            kafka.kill()
    most = max(spooled["rss_most"], drained["rss_most"])
    return Result(
        direct["rate"], spooled["rate"], drained["rate"], spooled["rss_first"], most
    )  # fmt: skip


def _phase(bridge: subprocess.Popen[bytes]) -> dict[str, float]:
    assert bridge.stdin is not None
    assert bridge.stdout is not None
    bridge.stdin.write(b"\n")
    bridge.stdin.flush()
    line = bridge.stdout.readline()
    progress(f"spool: {line.decode().strip()}")
    found: dict[str, float] = json.loads(line)
    return found


# -- the bridge's part


async def _bridge(bootstrap: str, directory: Path, events: int) -> None:
    producer = Producer(KafkaSettings(bootstrap_servers=(bootstrap,)))
    spool = Spool(directory / "spool", SPOOL_BYTES_MAX)
    spool.open()
    durable_producer = DurableProducer(producer, spool)
    running = asyncio.create_task(durable_producer.run())
    await durable_producer.connected.wait()
    await _told()
    _tell(rate=await _enter(durable_producer, DIRECT))
    await _told()
    while not durable_producer.spooling:  # the first ones wait for the patience
        await _enter(durable_producer, AT_ONCE)
    first = events // 10
    begun = time.monotonic()
    await _enter(durable_producer, first)
    rss_first = _rss()
    most = asyncio.create_task(_most())
    await _enter(durable_producer, events - first)
    rate = events / (time.monotonic() - begun)
    _tell(rate=rate, rss_first=rss_first, rss_most=_stopped(most), bytes=durable_producer.depth[1],
          file=spool.own.path.stat().st_size)  # fmt: skip
    await _told()
    begun, depth = time.monotonic(), durable_producer.depth[0]
    most = asyncio.create_task(_most())
    while durable_producer.depth[0]:
        await asyncio.sleep(0.05)
    _tell(rate=depth / (time.monotonic() - begun), rss_most=_stopped(most))
    assert not durable_producer.lost, durable_producer.lost
    running.cancel()
    await durable_producer.close()
    await producer.stop()


async def _enter(durable_producer: DurableProducer, events: int) -> float:
    """Events per second."""
    begun, free = time.monotonic(), asyncio.Semaphore(AT_ONCE)
    for number in range(events):
        await free.acquire()
        kept = durable_producer.enter(keys.MESSAGES_TOPIC, event(number), hook="message.publish")
        kept.add_done_callback(lambda _: free.release())
    for _ in range(AT_ONCE):
        await free.acquire()
    return events / (time.monotonic() - begun)


_peaks: list[float] = []


async def _most() -> None:
    _peaks[:] = [_rss()]
    while True:
        _peaks[0] = max(_peaks[0], _rss())
        await asyncio.sleep(0.1)


def _stopped(task: asyncio.Task[None]) -> float:
    task.cancel()
    return _peaks[0]


def _rss() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)


async def _told() -> None:
    await asyncio.to_thread(sys.stdin.readline)


def _tell(**found: Any) -> None:
    print(json.dumps({name: round(value, 1) for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    logging.disable()  # of a client whose Kafka goes away
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_bridge(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
