"""How long it takes from an MQTT publish until the message is stored, at a steady rate, through the embedded broker."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from aiomqtt import Client
from redis import Redis

from millpond.pipeline.stack.ports import HOST, free_port
from tests.benchmarks import scene
from tests.benchmarks.events import PAYLOAD, topic_name
from tests.benchmarks.scene import Process

RATE: Final = 500  # messages per second, of all clients together
CLIENTS: Final = 50
WARM_UP_S: Final = 10.0  # Kafka is a virtual machine that has just started
READY_TIMEOUT_S: Final = 60.0
# Kafka's topics as `millpond up` makes them.
KAFKA_PARTITIONS: Final = 24
MARK: Final = "number="  # in front of a message's number in its payload


class Latency(NamedTuple):
    """Milliseconds, of so many messages."""

    p50: float
    p99: float
    messages: int


def run(seconds: float) -> Latency:
    """Publish at QoS 1 for so long; every message has to arrive."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka", KAFKA_PARTITIONS) as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        directory, port = Path(name), free_port()
        bridge = f"[bridge]\nmqtt_port = {port}\nwebsocket_port = {free_port()}\n"
        scene.configure(directory, "bench-latency", settings, scene.address(redis), bridge)
        processes = [
            scene.millpond("bridge", "bridge", "embedded", directory=directory),
            scene.millpond("worker", "worker", "messages", directory=directory),
        ]
        try:
            _until_ready(processes)
            return _measure(redis, port, seconds)
        finally:
            for process in processes:
                process.kill()


def _until_ready(processes: list[Process]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    for process in processes:
        while not process.ready_file.exists():
            process.check()
            assert time.monotonic() < deadline, f"{process.name} does not get ready"
            time.sleep(0.1)


def _measure(redis: Redis, port: int, seconds: float) -> Latency:
    stored_at: dict[int, float] = {}
    messages = int(RATE * (WARM_UP_S + seconds))
    watcher = threading.Thread(target=_watch, args=(redis, messages, stored_at))
    watcher.start()
    published_at = asyncio.run(_publish(port, messages))
    watcher.join(timeout=10)
    assert len(stored_at) == messages, f"{messages - len(stored_at)} messages were not stored"
    counted = range(int(RATE * WARM_UP_S), messages)
    ms = [(stored_at[number] - published_at[number]) * 1000 for number in counted]
    percentiles = quantiles(ms, n=100)
    return Latency(percentiles[49], percentiles[98], len(ms))


def _watch(redis: Redis, messages: int, stored_at: dict[int, float]) -> None:
    """When Redis stored what, by its own clock, which is this machine's."""
    with redis.monitor() as monitor:  # type: ignore[no-untyped-call]
        for seen in monitor.listen():
            command = seen["command"]
            if command.startswith("HSET mqtt:msg:"):
                number = int(command.partition(MARK)[2].split(" ", 1)[0])
                stored_at.setdefault(number, seen["time"])
                if len(stored_at) == messages:
                    return


async def _publish(port: int, messages: int) -> dict[int, float]:
    """Clients that publish in turn, each message at its own moment, whatever became of those before."""
    published_at: dict[int, float] = {}

    async def client(first: int) -> None:
        async with (
            Client(HOST, port, identifier=f"bench-{first}") as mqtt,
            asyncio.TaskGroup() as tasks,
        ):
            for number in range(first, messages, CLIENTS):
                await asyncio.sleep(started + number / RATE - loop.time())
                tasks.create_task(publish(mqtt, number))

    async def publish(mqtt: Client, number: int) -> None:
        published_at[number] = time.time()
        payload = f"{MARK}{number} {PAYLOAD}"
        await mqtt.publish(topic_name(number % 1000), payload, qos=1)

    loop = asyncio.get_running_loop()
    started = loop.time() + 1.0  # by then everybody is connected
    async with asyncio.TaskGroup() as clients:
        for first in range(CLIENTS):
            clients.create_task(client(first))
    return published_at
