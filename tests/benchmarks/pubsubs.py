"""The pubsub agent: deliveries and their acks by one worker, and what subscribers cost that have nothing to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import psutil

from schemas import keys
from schemas.events import (
    DeliveriesSent,
    Event,
    MessageAcked,
    MessagePublished,
    Sent,
    SubscriberJoined,
    SubscriberLeft,
)
from schemas.keys import Partition
from schemas.leases import lease_name
from tests import given
from tests.benchmarks import scene
from tests.benchmarks.events import FIRST_MS, PARTITIONS, PAYLOAD, fill
from tests.benchmarks.progress import until_applied

APP: Final = "bench-pubsub"
NODE: Final = "emqx@10.0.0.1"
TOPICS: Final = 400
DELIVERIES_A_CHUNK: Final = 1_000  # of a partition, between its publishes, the reports and the acks
SENT_A_RECORD: Final = 100
START_SHARE: Final = 0.1
RULES: Final = given.pubsub("bench/#", expired_time=3_600, max_inflight=1_000)


def topic_name(number: int) -> str:
    return f"bench/device-{number:07d}/news"


def joined(number: int, topic: str, offset: int = 1) -> SubscriberJoined:
    return SubscriberJoined(
        at=FIRST_MS, node=NODE, client_id=f"reader-{number:07d}", topic_filter=topic, qos=1,
        session=1, source_offset=offset, subscribed_at=FIRST_MS,
    )  # fmt: skip


def left(number: int, topic: str) -> SubscriberLeft:
    return SubscriberLeft(
        at=FIRST_MS, node=NODE, client_id=f"reader-{number:07d}", topic_filter=topic,
        reason="disconnected", session=1, source_offset=2,
    )  # fmt: skip


def published(number: int, topic: str) -> MessagePublished:
    at = FIRST_MS + number
    return MessagePublished(
        at=at, node=NODE, message_id=f"{number:032x}", topic=topic, qos=1, retain=False,
        client_id="device", payload=PAYLOAD, published_at=at,
    )  # fmt: skip


def pairs(deliveries: int, subscribers: int) -> Iterator[tuple[int, Event]]:
    """The log of so many deliveries, each acknowledged: every topic has so many subscribers.

    Which lease a delivery gets is known beforehand: state is a function of the log.
    """
    for topic in range(TOPICS):
        for number in range(subscribers):
            yield topic % PARTITIONS, joined(number, topic_name(topic))
    leases = [0] * PARTITIONS
    messages = deliveries // subscribers
    chunk = max(DELIVERIES_A_CHUNK * PARTITIONS // subscribers, PARTITIONS)
    for first in range(0, messages, chunk):
        numbers = range(first, min(first + chunk, messages))
        for number in numbers:
            yield number % TOPICS % PARTITIONS, published(number, topic_name(number % TOPICS))
        for partition in range(PARTITIONS):
            mine = [number for number in numbers if number % TOPICS % PARTITIONS == partition]
            copies = [(number, reader) for number in mine for reader in range(subscribers)]
            for begin in range(0, len(copies), SENT_A_RECORD):
                some = copies[begin : begin + SENT_A_RECORD]
                yield partition, _sent(partition, leases[partition], some)
                leases[partition] += len(some)
            for number, reader in copies:
                yield partition, _ack(number, reader)


def _sent(partition: int, leased: int, copies: list[tuple[int, int]]) -> DeliveriesSent:
    owner = Partition(APP, "pubsub", partition)
    sent = tuple(
        Sent(lease_name(owner, leased + at), f"reader-{reader:07d}", f"{number:032x}")
        for at, (number, reader) in enumerate(copies, start=1)
    )
    return DeliveriesSent(at=FIRST_MS, node=NODE, agent="pubsub", sent=sent)


def _ack(number: int, reader: int) -> MessageAcked:
    return MessageAcked(
        at=FIRST_MS, node=NODE, message_id=f"{number:032x}", topic=topic_name(number % TOPICS),
        client_id=f"reader-{reader:07d}", qos=1,
    )  # fmt: skip


def run(deliveries: int, subscribers: int) -> float:
    """Deliveries with their acks per second; in the end every read offset is at the end."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        events = list(pairs(deliveries, subscribers))
        asyncio.run(fill(settings.bootstrap_servers[0], keys.MESSAGES_TOPIC, events))
        scene.configure(Path(name), APP, settings, scene.address(redis), rules=RULES)
        process = scene.millpond("worker", "worker", "pubsub", directory=Path(name))
        try:
            joins = TOPICS * subscribers
            wanted = joins + int((len(events) - joins) * START_SHARE)
            first_at, first = until_applied(process, redis, APP, "pubsub", wanted)
            last_at, last = until_applied(process, redis, APP, "pubsub", len(events))
        finally:
            process.kill()
        offsets = redis.mget(
            keys.read_offset(f"reader-{reader:07d}", topic_name(0)) for reader in range(subscribers)
        )
        (newest,) = redis.zrange(keys.message_index(topic_name(0)), -1, -1)
        assert offsets == [newest] * subscribers, "not everything was acknowledged"
    return deliveries * (last - first) / (len(events) - joins) / (last_at - first_at)


class Idle(NamedTuple):
    """Publishes per second, and MiB of the worker, beside subscribers that have nothing to do."""

    rate: float
    rss: float


def idle(subscribers: int, topics: int, events: int) -> Idle:
    """So many subscribers, spread over so many topics, come and go; then one topic is published to, which has one reader."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        log = list(_idle_log(subscribers, topics, events))
        asyncio.run(fill(settings.bootstrap_servers[0], keys.MESSAGES_TOPIC, log))
        scene.configure(Path(name), APP, settings, scene.address(redis), rules=RULES)
        process = scene.millpond("worker", "worker", "pubsub", directory=Path(name))
        try:
            came = len(log) - events
            until_applied(process, redis, APP, "pubsub", came + events // 5)
            started, first = time.monotonic(), came + events // 5
            last_at, last = until_applied(process, redis, APP, "pubsub", len(log))
            rss = psutil.Process(process.pid).memory_info().rss / 2**20
        finally:
            process.kill()
    return Idle((last - first) / (last_at - started), rss)


def _idle_log(subscribers: int, topics: int, events: int) -> Iterator[tuple[int, Event]]:
    for number in range(subscribers):
        topic = number % topics
        yield topic % PARTITIONS, joined(number, topic_name(topic))
    for number in range(subscribers):
        topic = number % topics
        yield topic % PARTITIONS, left(number, topic_name(topic))
    for number in range(events):
        topic = number % min(topics, TOPICS)
        yield topic % PARTITIONS, published(number, topic_name(topic))
