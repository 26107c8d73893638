"""The bridge `emqx-kafka` under test as a real process, and the rule events that EMQX would write to a real Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from millpond.schemas.keys import rule_events_group_id
from tests.support import given
from tests.support.workers import PARTITIONS, WAIT_S, until

NODE = "emqx@127.0.0.1"
SOURCE_PARTITIONS = 3
FIRST_MS = 1_700_000_000_000


def publish(number: int, topic: str = "t/a", **fields: Any) -> dict[str, Any]:
    """A rule's `message.publish`, as the documented SQL writes it."""
    return {
        "event": "message.publish", "id": f"{number:032X}", "clientid": "c_pub",
        "username": "undefined", "payload": f"{number}", "payload_b64": base64_text(number),
        "peerhost": "192.168.0.10", "topic": topic, "qos": 1,
        "flags": {"retain": False, "dup": False}, "pub_props": {"User-Property": {}},
        "publish_received_at": FIRST_MS + number, "timestamp": FIRST_MS + number + 1, "node": NODE,
        "metadata": {"rule_id": "millpond"}, **fields,
    }  # fmt: skip


def base64_text(number: int) -> str:
    """The payload of a publish, as `base64_encode(payload)`."""
    return b64encode(str(number).encode()).decode()


def acked(number: int, topic: str = "t/a", client: str = "c_sub") -> dict[str, Any]:
    """A rule's `message.acked` of that publish."""
    return {
        **publish(number, topic), "event": "message.acked", "clientid": client,
        "from_clientid": "c_pub", "from_username": "undefined", "puback_props": {},
        "timestamp": FIRST_MS + number + 5,
    }  # fmt: skip


def delivered(number: int, topic: str = "t/a", client: str = "c_sub") -> dict[str, Any]:
    """A rule's `message.delivered` of that publish."""
    return {**acked(number, topic, client), "event": "message.delivered"}


def connected(client: str, at_s: int, port: int, *, clean: bool = True) -> dict[str, Any]:
    """A rule's `client.connected`."""
    at = FIRST_MS + at_s * 1000
    return {
        "event": "client.connected", "clientid": client, "username": "undefined",
        "mountpoint": "undefined", "peername": f"192.168.0.11:{port}", "proto_name": "MQTT",
        "proto_ver": 5, "keepalive": 60, "clean_start": clean, "expiry_interval": 0,
        "conn_props": {}, "connected_at": at, "timestamp": at + 1, "node": NODE,
    }  # fmt: skip


def disconnected(client: str, at_s: int, port: int, reason: str = "normal") -> dict[str, Any]:
    """A rule's `client.disconnected`."""
    at = FIRST_MS + at_s * 1000
    return {
        "event": "client.disconnected", "reason": reason, "clientid": client,
        "username": "undefined", "peername": f"192.168.0.11:{port}", "disconn_props": {},
        "disconnected_at": at, "timestamp": at + 1, "node": NODE,
    }  # fmt: skip


def subscribed(client: str, topic_filter: str, at_s: int) -> dict[str, Any]:
    """A rule's `session.subscribed`."""
    return {
        "event": "session.subscribed", "clientid": client, "username": "undefined",
        "peerhost": "192.168.0.11", "topic": topic_filter, "qos": 1, "sub_props": {},
        "timestamp": FIRST_MS + at_s * 1000, "node": NODE,
    }  # fmt: skip


async def make_sources(bootstrap: str, *names: str) -> None:
    """The topics that EMQX's sinks write to."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, SOURCE_PARTITIONS, 1) for name in names])
    finally:
        await admin.close()


class Emqx:
    """An EMQX, as far as its sinks write to Kafka."""

    def __init__(self, bootstrap: str) -> None:
        self.producer = AIOKafkaProducer(bootstrap_servers=bootstrap, max_request_size=4 << 20)

    async def tell(self, topic: str, *rules: dict[str, Any] | bytes | None, partition: int) -> None:
        """Write rule events, in this order."""
        sent = [
            await self.producer.send(
                topic, key=b"k", partition=partition,
                value=json.dumps(rule).encode() if isinstance(rule, dict) else rule,
            )
            for rule in rules
        ]  # fmt: skip
        await asyncio.gather(*sent)


@contextlib.asynccontextmanager
async def emqx(bootstrap: str) -> AsyncIterator[Emqx]:
    """An EMQX that writes."""
    broker = Emqx(bootstrap)
    await broker.producer.start()
    try:
        yield broker
    finally:
        await broker.producer.stop()


class KafkaBridge:
    """One `millpond bridge emqx-kafka` process."""

    def __init__(
        self, bootstrap: str, directory: Path, app: str, sources: Sequence[str],
        rules: Sequence[str] = (), *, message_bytes_max: int = 4 << 20,
    ) -> None:  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        self.app, self.bootstrap, self.log = app, bootstrap, directory / "emqx-kafka.log"
        self._ready = directory / f"{time.monotonic_ns()}.ready"
        config = directory / "emqx-kafka.toml"
        config.write_text(
            f'app = "{app}"\n[kafka]\nbootstrap_servers = ["{bootstrap}"]\n'
            f"partitions = {PARTITIONS}\nmessage_bytes_max = {message_bytes_max}\n"
            "[worker]\nsession_timeout_s = 6\n" + given.POOL + "".join(rules or [given.store()])
        )
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "millpond", "bridge", "emqx-kafka",
                    "--topics", ",".join(sources), "--config", str(config),
                ],
                stdout=output, stderr=output,
                env={**os.environ, "MILLPOND_READY_FILE": str(self._ready)},
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    async def until_ready(self) -> KafkaBridge:
        async def ready() -> bool:
            assert self.process.poll() is None, f"the bridge ended:\n{self.said()}"
            return self._ready.exists()

        await until(ready, "a ready bridge")
        return self

    async def until_committed(self, *sources: str) -> None:
        """Wait until the bridge has committed all source records."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap, group_id=rule_events_group_id(self.app),
            enable_auto_commit=False,
        )  # fmt: skip
        await consumer.start()
        try:
            parts = [
                TopicPartition(name, at) for name in sources for at in range(SOURCE_PARTITIONS)
            ]
            ends = await consumer.end_offsets(parts)

            async def committed() -> bool:
                return all([(await consumer.committed(at) or 0) == ends[at] for at in parts])

            await until(committed, f"all of {sources} to be committed\n{self.said()}")
        finally:
            await consumer.stop()

    async def ended(self) -> int:
        """Its exit code."""
        return await asyncio.to_thread(self.process.wait, WAIT_S)

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    def kill(self) -> None:
        """kill -9."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)
