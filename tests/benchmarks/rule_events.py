"""The bridge that reads EMQX's rule events: how many publishes one process makes canonical in a second."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from millpond.schemas import keys
from tests.benchmarks import scene
from tests.benchmarks.events import BATCH_BYTES_MAX, PARTITIONS, PAYLOAD, event
from tests.benchmarks.progress import POLL_S, STALL_S
from tests.benchmarks.table import progress

EVENTS: Final = 200_000
START_SHARE: Final = 0.05  # by then the bridge is up
SOURCE: Final = "emqx-messages"
RAW_PAYLOAD: Final = b64encode(PAYLOAD.encode()).decode()


def rate() -> float:
    """Events per second, from the sink's topic into ours."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
    ):
        bootstrap = settings.bootstrap_servers[0]
        progress(f"writing {EVENTS:,} rule events into Kafka")
        asyncio.run(_fill(bootstrap))
        scene.configure(Path(name), "bench-rules", settings, "127.0.0.1:6379")
        process = scene.millpond(
            "bridge", "bridge", "emqx-kafka", "--topics", SOURCE, directory=Path(name)
        )
        try:
            return asyncio.run(_rate(bootstrap, process))
        finally:
            process.kill()


def rule(number: int) -> bytes:
    """The benchmarks' publish with this number, as EMQX's sink writes it."""
    told = event(number)
    return json.dumps({
        "event": "message.publish", "id": told.message_id.upper(), "clientid": told.client_id,
        "username": "undefined", "payload": PAYLOAD, "payload_b64": RAW_PAYLOAD,
        "peerhost": "10.1.0.7", "topic": told.topic, "qos": 1,
        "flags": {"retain": False, "dup": False}, "pub_props": {"User-Property": {}},
        "publish_received_at": told.published_at, "timestamp": told.at, "node": told.node,
        "metadata": {"rule_id": "millpond"}, "client_attrs": {},
    }).encode()  # fmt: skip


async def _fill(bootstrap: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(SOURCE, PARTITIONS, 1)])
    await admin.close()
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, linger_ms=5, max_batch_size=BATCH_BYTES_MAX
    )
    await producer.start()
    try:
        for number in range(EVENTS):
            await producer.send(SOURCE, rule(number), partition=number % PARTITIONS)
    finally:
        await producer.stop()


async def _rate(bootstrap: str, process: scene.Process) -> float:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await consumer.start()
    parts = [TopicPartition(keys.MESSAGES_TOPIC, number) for number in range(PARTITIONS)]

    async def until(number: int) -> tuple[float, int]:
        progressed_at, before = time.monotonic(), -1
        while True:
            done, now = sum((await consumer.end_offsets(parts)).values()), time.monotonic()
            if done >= number:
                return now, done
            if done > before:
                progressed_at, before = now, done
            process.check()
            assert now - progressed_at < STALL_S, f"nothing told for {STALL_S:.0f} s"
            await asyncio.sleep(POLL_S)

    try:
        first_at, first = await until(int(EVENTS * START_SHARE))
        last_at, last = await until(EVENTS)
    finally:
        await consumer.stop()
    assert last == EVENTS, "something was told twice"
    return (last - first) / (last_at - first_at)
