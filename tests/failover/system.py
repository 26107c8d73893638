"""A whole Millpond under load: publishers, queue consumers and pubsub readers that are ordinary MQTT clients (paho).

A publisher counts a message when the broker acknowledged it, and publishes it again otherwise. At the end every
acknowledged message is where it should be, and none is in two places.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import aiomqtt

from millpond.pipeline.stack.ports import HOST, free_port
from tests.support import given
from tests.support.embedded_bridge import NODE

TOPICS = 5  # of each kind, one publisher for each
PARTITIONS = 4
AGENTS = ("sessions", "messages", "queue", "pubsub")
KINDS = ("store", "queue", "pubsub")
RULES = (
    given.store("store/#"),
    given.queue("queue/#", max_inflight=32, ack_timeout_s=5),
    given.pubsub("pubsub/#", max_inflight=32, ack_timeout_s=5, start="earliest"),
)
END_S = 180.0  # for everything to arrive, when nothing fails any more
PUBLISH_TIMEOUT_S = 15.0
RETRY_S = 0.2


class System:
    """The processes of Millpond, and the clients."""

    def __init__(
        self, directory: Path, kafka: Sequence[str], pool: str, replication_factor: int
    ) -> None:
        """`pool` is the table of the Redis pool in the settings file, without its head."""
        self.port = free_port()
        self._directory, self._config = directory, directory / "millpond.toml"
        servers = ", ".join(f'"{each}"' for each in kafka)
        self._config.write_text(
            f'app = "failover"\n[kafka]\nbootstrap_servers = [{servers}]\npartitions = {PARTITIONS}\n'
            f"replication_factor = {replication_factor}\n"
            f"min_insync_replicas = {max(1, replication_factor - 1)}\n"
            "[worker]\nsession_timeout_s = 6\n"
            f'[bridge]\nnode = "{NODE}"\nmqtt_port = {self.port}\nwebsocket_port = {free_port()}\n'
            f"[pool.pool1]\n{pool}\n" + "".join(RULES)
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self.acknowledged: dict[str, list[str]] = defaultdict(list)  # topic → payloads, in order
        self.consumed: Counter[str] = Counter()  # payloads of the queues
        self.read: dict[str, dict[str, list[str]]] = {}  # reader → topic → payloads, in order

    # -- processes

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "millpond", *arguments, "--config", str(self._config)]

    async def start(self) -> None:
        made = await asyncio.to_thread(
            subprocess.run, self._command("kafka", "init"), capture_output=True, text=True, check=False
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        names = [("bridge", "embedded"), *(("worker", agent) for agent in AGENTS)]
        for arguments in names:
            name = "-".join(arguments)
            ready = self._directory / f"{name}.ready"
            with (self._directory / f"{name}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        self._command(*arguments), stdout=log, stderr=log,
                        env={**os.environ, "MILLPOND_READY_FILE": str(ready)},
                    )
                )  # fmt: skip
        for arguments in names:
            ready = self._directory / f"{'-'.join(arguments)}.ready"
            await self.until(partial(_exists, ready), ready.name)

    def check(self) -> None:
        """Check that every process runs and has logged no traceback."""
        for process in self._processes:
            assert process.poll() is None, self.said()
        assert "Traceback" not in self.said(), self.said()

    def said(self) -> str:
        return "\n".join(
            f"{log.name}:\n{log.read_text(errors='replace')[-3_000:]}"
            for log in self._directory.glob("*.log")
        )

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    async def until(self, condition: Callable[[], Awaitable[object]], what: str) -> None:
        """Wait for a condition."""
        try:
            async with asyncio.timeout(END_S):
                while not await condition():
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"waited {END_S:g} s for: {what}\n{self.said()}") from None

    # -- clients

    def _client(self, name: str, *, clean: bool = True) -> aiomqtt.Client:
        return aiomqtt.Client(
            HOST, self.port, identifier=name, clean_session=clean,
            protocol=aiomqtt.ProtocolVersion.V311, timeout=PUBLISH_TIMEOUT_S,
        )  # fmt: skip

    async def publish(self, topic: str, count: int, interval_s: float) -> None:
        """Publish payloads `{topic} {number}` one after the other, each until it is acknowledged."""
        number = 0
        while number < count:
            with contextlib.suppress(aiomqtt.MqttError):
                async with self._client(f"publisher {topic}") as client:
                    while number < count:
                        payload = f"{topic} {number}"
                        await client.publish(topic, payload, qos=1)
                        self.acknowledged[topic].append(payload)
                        number += 1
                        await asyncio.sleep(interval_s)
            await asyncio.sleep(RETRY_S)

    async def consume(self, name: str) -> None:
        """Take messages of all queues, until cancelled."""
        while True:
            with contextlib.suppress(aiomqtt.MqttError):
                async with self._client(name, clean=False) as client:
                    await client.subscribe("queue/#", qos=1)
                    async for message in client.messages:
                        self.consumed[bytes(message.payload).decode()] += 1
            await asyncio.sleep(RETRY_S)

    async def follow(self, name: str) -> None:
        """Read all pubsub topics, until cancelled."""
        read = self.read[name] = defaultdict(list)
        while True:
            with contextlib.suppress(aiomqtt.MqttError):
                async with self._client(name, clean=False) as client:
                    await client.subscribe("pubsub/#", qos=1)
                    async for message in client.messages:
                        payload = bytes(message.payload).decode()
                        read[message.topic.value].append(payload)
            await asyncio.sleep(RETRY_S)


async def _exists(path: Path) -> bool:
    return path.exists()


@contextlib.asynccontextmanager
async def running(
    directory: Path, kafka: Sequence[str], pool: str, *, replication_factor: int = 1
) -> AsyncIterator[System]:
    """A system that has started, during the block."""
    system = System(directory, kafka, pool, replication_factor)
    try:
        await system.start()
        yield system
        system.check()
    finally:
        system.stop()


async def survive(
    system: System,
    fail: Callable[[], Awaitable[None]],
    stored: Callable[[str], Awaitable[Counter[str]]],
    *,
    messages: int = 200,
    interval_s: float = 0.1,
) -> None:
    """Let servers fail under load, and check what became of every message.

    Args:
        system: A system that runs.
        fail: Lets servers fail, and mends them.
        stored: Returns the payloads in a topic's index.
        messages: How many are published to each topic.
        interval_s: Between two publishes of one publisher. All of them should take longer than `fail`.
    """
    clients = [
        *(asyncio.create_task(system.consume(f"consumer {number}")) for number in range(3)),
        *(asyncio.create_task(system.follow(f"reader {number}")) for number in range(2)),
    ]
    topics = {kind: [f"{kind}/{number}" for number in range(TOPICS)] for kind in KINDS}
    publishers = [
        asyncio.create_task(system.publish(topic, messages, interval_s))
        for kind in KINDS
        for topic in topics[kind]
    ]
    try:
        await fail()
        await asyncio.gather(*publishers)
        for topic, payloads in system.acknowledged.items():
            await _check(system, topic, payloads, stored)
    finally:
        for task in [*clients, *publishers]:
            task.cancel()
        await asyncio.gather(*clients, *publishers, return_exceptions=True)


async def _check(
    system: System,
    topic: str,
    published: Sequence[str],
    stored: Callable[[str], Awaitable[Counter[str]]],
) -> None:
    """Wait until each message of a topic is where it should be."""
    if topic.startswith("queue/"):

        async def drained() -> bool:
            return not await stored(topic)

        await system.until(drained, f"nothing left in {topic}")
        assert set(published) <= set(system.consumed)
        return

    async def complete() -> bool:
        return set(published) == set(await stored(topic))

    await system.until(complete, f"all messages of {topic}")
    for reader, read in system.read.items():
        if topic.startswith("pubsub/"):

            async def arrived(read: dict[str, list[str]] = read) -> bool:
                return set(published) == set(read[topic])

            await system.until(arrived, f"all messages of {topic} at {reader}")
            assert list(dict.fromkeys(read[topic])) == list(published), (reader, topic)
