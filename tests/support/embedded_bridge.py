"""The embedded broker's bridge under test: a real process, real connections to it, and what it writes to a real Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from millpond.pipeline.kafka import topics
from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.schemas import codec, keys
from millpond.schemas.events import ClientDisconnected, Event, MessagePublished
from tests.support import given
from tests.support.mqtt import Client, Will
from tests.support.workers import PARTITIONS, WAIT_S, until

NODE = "bridge@test"
MESSAGE_BYTES_MAX = 2 * 1024 * 1024
READ = (keys.CLIENTS_TOPIC, keys.MESSAGES_TOPIC)

E = TypeVar("E")


class Record(NamedTuple):
    topic: str
    partition: int
    key: str
    event: Event


async def make_topics(bootstrap: str) -> None:
    """All topics, empty."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    existing = set(await admin.list_topics()) & set(keys.TOPICS)
    if existing:
        await admin.delete_topics(list(existing))

        async def gone() -> bool:
            return not set(await admin.list_topics()) & set(keys.TOPICS)

        await until(gone, "the topics of the test before to be gone")
    await admin.close()
    await topics.create(
        KafkaSettings(
            bootstrap_servers=(bootstrap,), partitions=PARTITIONS, message_bytes_max=MESSAGE_BYTES_MAX
        )
    )  # fmt: skip


class Bridge:
    """One `millpond bridge embedded` process on free ports."""

    def __init__(
        self, bootstrap: str, directory: Path, *rules: str, sync_interval_s: int = 300,
        port: int | None = None, app: str = "millpond",
    ) -> None:  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        self.bootstrap, self.app, self.log = bootstrap, app, directory / "bridge.log"
        self.port, self.websocket_port = port or free_port(), free_port()
        self._ready = directory / "bridge.ready"
        self._clients: list[Client] = []
        config = directory / "millpond.toml"
        config.write_text(
            f'app = "{app}"\n[kafka]\nbootstrap_servers = ["{bootstrap}"]\npartitions = {PARTITIONS}\n'
            f"message_bytes_max = {MESSAGE_BYTES_MAX}\n"
            f'[bridge]\nnode = "{NODE}"\nmqtt_port = {self.port}\n'
            f"websocket_port = {self.websocket_port}\nsync_interval_s = {sync_interval_s}\n" + given.POOL + "".join(rules or [given.store()])
        )  # fmt: skip
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "millpond", "bridge", "embedded", "--config", str(config)],
                stdout=output, stderr=output,
                env={**os.environ, "MILLPOND_READY_FILE": str(self._ready)},
            )  # fmt: skip

    def until_ready(self) -> Bridge:
        deadline = time.monotonic() + WAIT_S
        while not self._ready.exists():
            assert self.process.poll() is None, f"the bridge ended:\n{self.said()}"
            assert time.monotonic() < deadline, f"the bridge is not ready:\n{self.said()}"
            time.sleep(0.05)
        return self

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    async def until_said(self, words: str) -> None:
        async def told() -> bool:
            return words in self.said()

        await until(told, f"the bridge to say {words!r}")

    async def until_listening_to(self, number: signal.Signals) -> None:
        """It has a handler for this signal, which would end it before."""

        async def listening() -> bool:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            (caught,) = re.findall(r"^SigCgt:\s+([0-9a-f]+)", status, re.MULTILINE)
            return bool(int(caught, 16) >> (number - 1) & 1)

        await until(listening, f"the bridge to listen to {number.name}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Its exit code."""
        return await asyncio.to_thread(self.process.wait, WAIT_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)

    async def connect(
        self, client_id: str, *, clean: bool = True, keep_alive_s: int = 0, will: Will | None = None,
        username: str | None = None,
    ) -> Client:  # fmt: skip
        client = await self.open()
        await client.connect(
            client_id, clean=clean, keep_alive_s=keep_alive_s, will=will, username=username
        )
        return client

    async def open(self) -> Client:
        """A connection on which nothing has been said."""
        self._clients.append(await Client.open(self.port))
        return self._clients[-1]

    def let_go(self) -> None:
        """Whoever is still connected goes with the test."""
        while self._clients:
            self._clients.pop().vanish()


def running(bootstrap: str, directory: Path, *rules: str) -> Iterator[Bridge]:
    """A bridge with empty topics for the tests of a module; it has nothing to complain of in its own code."""
    asyncio.run(make_topics(bootstrap))
    bridge = Bridge(bootstrap, directory, *rules)
    try:
        yield bridge.until_ready()
        before, found, after = bridge.said().partition("Traceback")
        assert not found, before[-1_000:] + found + after[:3_000]
    finally:
        bridge.kill()


class Log:
    """What the bridge has written to Kafka since this was opened, as far as it was read."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self.records: list[Record] = []

    async def _read(self) -> None:
        fetched = await self._consumer.getmany(timeout_ms=200)
        for partition, records in fetched.items():
            self.records += [
                Record(partition.topic, partition.partition, record.key.decode(), event)
                for record in records
                for event in [codec.decode(record.value)]
            ]

    async def until(self, condition: Callable[[], Any], what: str) -> Any:
        """The condition's first true answer, reading on as long as there is none."""
        deadline = time.monotonic() + WAIT_S
        while not (answer := condition()):
            assert time.monotonic() < deadline, (
                f"waited {WAIT_S:.0f} s for: {what}\n{self.records[-20:]}"
            )
            await self._read()
        return answer

    def of_client(self, client_id: str) -> list[Record]:
        return [r for r in self.records if r.topic == keys.CLIENTS_TOPIC and r.key == client_id]

    def kinds(self, client_id: str) -> list[str]:
        """The types of what happened to a client, in order."""
        return [type(record.event).__name__ for record in self.of_client(client_id)]

    async def until_kinds(self, client_id: str, *kinds: type[Event]) -> list[Event]:
        """The events of a client, which are of these types in this order, and no more."""
        names = [kind.__name__ for kind in kinds]
        await self.until(
            lambda: len(self.kinds(client_id)) >= len(names), f"{names} of {client_id!r}"
        )
        assert self.kinds(client_id) == names
        return [record.event for record in self.of_client(client_id)]

    def published(self, topic: str) -> list[MessagePublished]:
        return [
            record.event for record in self.records
            if isinstance(record.event, MessagePublished) and record.key == topic
        ]  # fmt: skip

    def payloads(self, topic: str) -> list[bytes]:
        return [codec.payload_bytes(event) for event in self.published(topic)]

    async def until_published(self, topic: str, count: int) -> list[MessagePublished]:
        """The publishes of a topic: this many, and no more."""
        await self.until(lambda: len(self.published(topic)) >= count, f"{count} of {topic!r}")
        found = self.published(topic)
        assert len(found) == count
        return found

    def of_type(self, kind: type[E], key: str) -> list[E]:
        return [r.event for r in self.records if isinstance(r.event, kind) and r.key == key]


@contextlib.asynccontextmanager
async def reading(bootstrap: str, *, from_start: bool = False) -> AsyncIterator[Log]:
    """What is written from now on, or all that there is."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, enable_auto_commit=False, max_partition_fetch_bytes=4 << 20
    )
    await consumer.start()
    try:
        parts = [TopicPartition(name, number) for name in READ for number in range(PARTITIONS)]
        consumer.assign(parts)
        if from_start:
            await consumer.seek_to_beginning(*parts)
        else:
            for part, offset in (await consumer.end_offsets(parts)).items():
                consumer.seek(part, offset)
        yield Log(consumer)
    finally:
        await consumer.stop()


def url(bridge: Bridge) -> dict[str, Any]:
    """How aiomqtt connects over WebSocket."""
    return {
        "hostname": HOST, "port": bridge.websocket_port, "transport": "websockets",
        "websocket_path": "/",
    }  # fmt: skip


async def reason_of_end(log: Log, client_id: str) -> str:
    """Why a client's one connection ended."""

    def ended() -> list[ClientDisconnected]:
        return log.of_type(ClientDisconnected, client_id)

    (event,) = await log.until(ended, f"{client_id!r} to be disconnected")
    return str(event.reason)
