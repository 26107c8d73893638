"""The queue agent: whole lives of messages, from publish to deleted, by one worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from redis import Redis

from millpond.pipeline.stores.redis.packing import BODY_FIELDS
from millpond.schemas import keys
from millpond.schemas.events import (
    DeliveriesSent,
    Event,
    MessageAcked,
    MessagePublished,
    Sent,
    SubscriberJoined,
)
from millpond.schemas.keys import Partition
from millpond.schemas.leases import lease_name
from tests.benchmarks import limit, scene
from tests.benchmarks.events import FIRST_MS, PARTITIONS, PAYLOAD, fill
from tests.benchmarks.progress import until_applied
from tests.support import given

APP: Final = "bench-queue"
TOPICS: Final = 1_000
CHUNK: Final = 1_000  # messages of a partition between their publishes, the reports and the acks: two batches each
START_SHARE: Final = 0.1
RULES: Final = given.queue("bench/#", expired_time=3_600)


def topic_name(number: int) -> str:
    return f"bench/device-{number:07d}/jobs"


def joins() -> Iterator[tuple[int, Event]]:
    """One consumer on each topic."""
    for number in range(TOPICS):
        joined = SubscriberJoined(
            at=FIRST_MS, node="emqx@10.0.0.1", client_id=f"worker-{number:07d}",
            topic_filter=topic_name(number), qos=1, session=1, source_offset=1,
        )  # fmt: skip
        yield number % PARTITIONS, joined


def lives(messages: int) -> Iterator[tuple[int, Event]]:
    """The log that a bridge would write for so many messages.

    Which lease a message gets is known beforehand: state is a function of the log.
    """
    yield from joins()
    leases = [0] * PARTITIONS
    for first in range(0, messages, CHUNK * PARTITIONS):
        numbers = range(first, min(first + CHUNK * PARTITIONS, messages))
        for number in numbers:
            yield number % TOPICS % PARTITIONS, publish(number)
        for partition in range(PARTITIONS):
            mine = [number for number in numbers if number % TOPICS % PARTITIONS == partition]
            for begin in range(0, len(mine), 100):
                some = mine[begin : begin + 100]
                sent = tuple(
                    _sent(partition, leases[partition] + at + 1, number)
                    for at, number in enumerate(some)
                )
                leases[partition] += len(some)
                yield partition, DeliveriesSent(at=FIRST_MS, node="n", agent="queue", sent=sent)
        for number in numbers:
            yield number % TOPICS % PARTITIONS, ack(number)


def publish(number: int) -> MessagePublished:
    at = FIRST_MS + number
    return MessagePublished(
        at=at, node="emqx@10.0.0.1", message_id=f"{number:032x}", topic=topic_name(number % TOPICS),
        qos=1, retain=False, client_id=f"device-{number % TOPICS:07d}", payload=PAYLOAD, published_at=at,
    )  # fmt: skip


def _sent(partition: int, lease: int, number: int) -> Sent:
    name = lease_name(Partition(APP, "queue", partition), lease)
    return Sent(name, f"worker-{number % TOPICS:07d}", f"{number:032x}")


def ack(number: int) -> MessageAcked:
    return MessageAcked(
        at=FIRST_MS + number, node="emqx@10.0.0.1", message_id=f"{number:032x}",
        topic=topic_name(number % TOPICS), client_id=f"worker-{number % TOPICS:07d}",
        from_client_id=f"device-{number % TOPICS:07d}", qos=1,
    )  # fmt: skip


class Lives(NamedTuple):
    """Messages per second, and what Redis did for each: commands, and microseconds of its processor."""

    rate: float
    commands: float
    redis_us: float


def run(messages: int) -> Lives:
    """Whole lives per second; in the end nothing is left of any message."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        events = list(lives(messages))
        asyncio.run(fill(settings.bootstrap_servers[0], keys.MESSAGES_TOPIC, events))
        scene.configure(Path(name), APP, settings, scene.address(redis), rules=RULES)
        redis.config_resetstat()
        process = scene.millpond("worker", "worker", "queue", directory=Path(name))
        try:
            first_at, first = until_applied(
                process, redis, APP, "queue", int(len(events) * START_SHARE)
            )
            last_at, last = until_applied(process, redis, APP, "queue", len(events))
        finally:
            process.kill()
        _verify(redis)
        stats = redis.info("commandstats")
        calls = sum(each["calls"] for each in stats.values())
        usec = sum(each["usec"] for each in stats.values())
    share = (last - first) / len(events)
    return Lives(messages * share / (last_at - first_at), calls / messages, usec / messages)


def redis_limit(messages: int) -> float:
    """Messages per second that Redis takes: what the worker writes for each, one kind of command after the other."""
    message_id, second = limit.RANDOM_ID, str(FIRST_MS // 1000)
    body = keys.message_body(message_id)
    index = keys.message_index(topic_name(0).replace("0000000", limit.RANDOM))
    # fmt: off
    commands = (
        ["HSET", body, "id", message_id, "from", "device", "qos", "1", "topic", topic_name(0),
         "payload", limit.PAYLOAD_SHAPE, "ts", second, "retain", "false"],
        ["PEXPIREAT", body, f"9{FIRST_MS}"],
        ["ZADD", index, "NX", f"1700{limit.RANDOM}", message_id],
        ["ZREM", index, message_id],
        ["HDEL", body, *BODY_FIELDS],
    )
    # fmt: on
    with TemporaryDirectory() as name, scene.redis(Path(name) / "redis") as redis:
        address = scene.address(redis)
        seconds = sum(messages / limit.rate(address, messages, command) for command in commands)
    return messages / seconds


def _verify(redis: Redis) -> None:
    left = list(redis.scan_iter("mqtt:*", count=10_000))
    assert not left, f"{len(left)} keys are left, {left[0]} among them"
