"""The pubsub agent: deliveries and their acks by one worker, and what subscribers cost that have nothing to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import psutil
from redis import Redis

from millpond.schemas import keys
from millpond.schemas.events import (
    DeliveriesSent,
    Event,
    MessageAcked,
    MessagePublished,
    Sent,
    SubscriberJoined,
    SubscriberLeft,
)
from millpond.schemas.keys import Partition
from millpond.schemas.leases import lease_name
from tests.benchmarks import scene
from tests.benchmarks.events import FIRST_MS, PARTITIONS, PAYLOAD, fill
from tests.benchmarks.progress import until_applied
from tests.support import given

APP: Final = "bench-pubsub"
NODE: Final = "emqx@10.0.0.1"
TOPICS: Final = 400
DELIVERIES_A_CHUNK: Final = 1_000  # of a partition, between its publishes, the reports and the acks
SENT_A_RECORD: Final = 100
START_SHARE: Final = 0.1
AT_ONCE: Final = 10_000  # of the subscribers that come and go
PATIENT: Final = "[worker]\nsession_timeout_s = 60\n"  # while it is stopped and its log is written
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
    """What a publish costs beside subscribers that have nothing to do, in µs of the worker's and Redis' processor time; and
    the worker's memory in MiB.
    """

    cost: float
    rss: float


def idle(subscribers: int, topics: int, events: int, *, online: bool = False) -> Idle:
    """So many subscribers come, spread over so many topics, and stay `online`; or go again, so that only some are there
    at once. When all of that is done, messages are published: to topics of those who are away, or else to others, so that
    nobody has anything to do.
    """
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        came = list(_comings(subscribers, topics, online=online))
        first_topic = topics if online else 0
        beside = [
            (topic % PARTITIONS, published(number, topic_name(topic)))
            for number in range(events)
            for topic in (first_topic + number % min(topics, TOPICS),)
        ]
        address = settings.bootstrap_servers[0]
        asyncio.run(fill(address, keys.MESSAGES_TOPIC, came))
        scene.configure(
            Path(name), APP, settings, scene.address(redis), more=PATIENT, rules=RULES
        )  # fmt: skip
        process = scene.millpond("worker", "worker", "pubsub", directory=Path(name))
        try:
            until_applied(process, redis, APP, "pubsub", len(came))
            with process.paused():
                asyncio.run(fill(address, keys.MESSAGES_TOPIC, beside))
            wanted = len(came) + int(events * START_SHARE)
            _, first = until_applied(process, redis, APP, "pubsub", wanted)
            before = processor_s(process, redis)
            _, last = until_applied(process, redis, APP, "pubsub", len(came) + events)
            spent = processor_s(process, redis) - before
            rss = psutil.Process(process.pid).memory_info().rss / 2**20
        finally:
            process.kill()
    return Idle(spent / (last - first) * 1e6, rss)


def processor_s(process: scene.Process, redis: Redis) -> float:
    """What both have used so far: it hardly depends on what else runs on the machine."""
    worker, server = psutil.Process(process.pid).cpu_times(), redis.info("cpu")
    of_redis = float(server["used_cpu_user"]) + float(server["used_cpu_sys"])
    return worker.user + worker.system + of_redis


def _comings(subscribers: int, topics: int, *, online: bool) -> Iterator[tuple[int, Event]]:
    for first in range(0, subscribers, AT_ONCE):
        some = range(first, min(first + AT_ONCE, subscribers))
        for number in some:
            topic = number % topics
            yield topic % PARTITIONS, joined(number, topic_name(topic))
        for number in some if not online else ():
            topic = number % topics
            yield topic % PARTITIONS, left(number, topic_name(topic))
