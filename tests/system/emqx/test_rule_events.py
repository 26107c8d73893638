"""EMQX's rule events in a real Kafka, as its sink writes them, through the real bridge and real agents."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from millpond.schemas import keys
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    MessageAcked,
    MessagePublished,
    SessionCreated,
    SessionSubscribed,
    SubscriberJoined,
)
from tests.support import given, workers
from tests.support.embedded_bridge import Log, make_topics, reading
from tests.support.emqx.rule_events import (
    FIRST_MS,
    NODE,
    SOURCE_PARTITIONS,
    Emqx,
    KafkaBridge,
    acked,
    connected,
    delivered,
    disconnected,
    emqx,
    make_sources,
    publish,
    subscribed,
)
from tests.support.servers import Server
from tests.support.workers import until

A_LIE = b'{"event":"message.publish","id":7}'


class World:
    """The topics of one test, an EMQX that writes, the bridges that read, and the log of their events."""

    def __init__(self, bootstrap: str, directory: Path, app: str, broker: Emqx, log: Log) -> None:
        self.bootstrap, self.app, self.emqx, self.log = bootstrap, app, broker, log
        self.source = f"{app}-rules"
        self._directory = directory
        self._bridges: list[KafkaBridge] = []

    async def bridge(self, *rules: str, **options: Any) -> KafkaBridge:
        bridge = KafkaBridge(
            self.bootstrap, self._directory / f"{len(self._bridges)}", self.app, [self.source],
            rules, **options,
        )  # fmt: skip
        self._bridges.append(bridge)
        return await bridge.until_ready()

    async def tell(self, *rules: dict[str, Any] | bytes | None, partition: int = 0) -> None:
        await self.emqx.tell(self.source, *rules, partition=partition)

    def stop(self) -> None:
        for bridge in self._bridges:
            bridge.kill()
            assert "Traceback" not in bridge.said()


@contextlib.asynccontextmanager
async def over(bootstrap: str, directory: Path, app: str) -> AsyncIterator[World]:
    """A world whose Kafka already has Millpond's topics."""
    await make_sources(bootstrap, f"{app}-rules")
    async with emqx(bootstrap) as broker, reading(bootstrap, from_start=True) as log:
        world = World(bootstrap, directory, app, broker, log)
        try:
            yield world
        finally:
            world.stop()


@contextlib.asynccontextmanager
async def a_world(bootstrap: str, directory: Path, app: str) -> AsyncIterator[World]:
    """A world with new, empty topics."""
    await make_topics(bootstrap)
    async with over(bootstrap, directory, app) as world:
        yield world


@pytest.fixture
async def world(kafka: str, tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(kafka, tmp_path, f"emqx-{tmp_path.name.removeprefix('test_')[:40]}") as one:
        yield one


def ids(log: Log) -> list[str]:
    """The ids of all publishes, in the order of their records."""
    return [r.event.message_id for r in log.records if isinstance(r.event, MessagePublished)]


async def until_published(log: Log, number: int) -> None:
    await log.until(lambda: len(ids(log)) >= number, f"{number} publishes")


def id_of(number: int) -> str:
    return f"{number:032X}"


# -- events


async def test_each_event_reaches_the_partition_of_its_key(
    world: World,
) -> None:
    chance = random.Random(7)
    numbers = range(300)
    rules = [publish(number, f"t/{number % 20}") for number in numbers]
    rules += [acked(number, f"t/{number % 20}") for number in numbers]
    chance.shuffle(rules)
    for rule in rules:
        await world.tell(rule, partition=chance.randrange(SOURCE_PARTITIONS))
    await world.bridge(given.store(), given.receipt("message.acked", "t/#"))
    await world.log.until(lambda: len(world.log.records) >= 600, "600 records")
    published = {
        r.event.message_id: r for r in world.log.records if isinstance(r.event, MessagePublished)
    }
    receipts = {
        r.event.message_id: r for r in world.log.records if isinstance(r.event, MessageAcked)
    }
    assert len(world.log.records) == 600
    assert sorted(published) == sorted(receipts) == sorted(map(id_of, numbers))
    for number in numbers:
        record, receipt = published[id_of(number)], receipts[id_of(number)]
        assert record.event == MessagePublished(
            at=FIRST_MS + number + 1, node=NODE, message_id=id_of(number), qos=1, retain=False,
            topic=f"t/{number % 20}", client_id="c_pub", payload=f"{number}",
            published_at=FIRST_MS + number,
        )  # fmt: skip
        assert record.key == receipt.key == f"t/{number % 20}"
        assert record.partition == receipt.partition


async def test_connects_begin_sessions_and_the_broker_delivers(world: World) -> None:
    await world.bridge()
    await world.tell(
        connected("c", 1, 5001), subscribed("c", "queue/#", 2), disconnected("c", 3, 5001),
        connected("c", 4, 5002, clean=False),
    )  # fmt: skip
    events = await world.log.until_kinds(
        "c", SessionCreated, ClientConnected, SessionSubscribed, ClientDisconnected, ClientConnected
    )
    assert isinstance(events[1], ClientConnected)
    assert events[1].connection_id == f"{NODE}/192.168.0.11:5001"
    assert isinstance(events[2], SessionSubscribed)
    assert events[2].broker_delivers


async def test_events_that_no_rule_needs_are_skipped(world: World) -> None:
    bridge = await world.bridge(given.store(), given.queue(), given.receipt(topic="wanted/#"))
    for number, topic in enumerate(("queue/a", "wanted/a", "t/a")):
        await world.tell(publish(number, topic), delivered(number, topic), acked(number, topic))
    await bridge.until_committed(world.source)
    await world.log.until(lambda: len(world.log.records) >= 5, "all that is wanted")
    kinds = sorted((r.key, type(r.event).__name__) for r in world.log.records)
    assert kinds == [
        ("queue/a", MessageAcked.__name__), ("queue/a", MessagePublished.__name__),
        ("t/a", MessagePublished.__name__),
        ("wanted/a", MessageAcked.__name__), ("wanted/a", MessagePublished.__name__),
    ]  # fmt: skip


async def test_a_bridge_that_stops_commits_everything_it_has_read(world: World) -> None:
    first = await world.bridge()
    for partition in range(SOURCE_PARTITIONS):
        numbers = range(partition, 3_000, SOURCE_PARTITIONS)
        await world.tell(*map(publish, numbers), partition=partition)
    await first.until_committed(world.source)
    assert await first.stop() == 0
    await world.bridge()
    await world.tell(publish(3_000))
    await world.log.until(lambda: id_of(3_000) in ids(world.log), "the last publish")
    assert sorted(ids(world.log)) == list(map(id_of, range(3_001)))


async def test_two_bridges_share_the_partitions(world: World) -> None:
    one, other = await world.bridge(), await world.bridge()
    for first in range(0, 6_000, 100):
        await world.tell(*map(publish, range(first, first + 100)), partition=first // 100 % 3)
    await one.until_committed(world.source)
    await other.stop()
    await world.tell(*map(publish, range(6_000, 6_100)), partition=0)
    await world.tell(*map(publish, range(6_100, 6_200)), partition=2)
    await world.log.until(lambda: len(set(ids(world.log))) >= 6_200, "all publishes")
    assert set(ids(world.log)) == set(map(id_of, range(6_200)))


# -- faults


async def test_repeated_kill_9_loses_nothing(world: World) -> None:
    number = 40_000
    for partition in range(SOURCE_PARTITIONS):
        numbers = range(partition, number, SOURCE_PARTITIONS)
        await world.tell(*map(publish, numbers), partition=partition)
    killed = 0
    for share in (0.1, 0.4, 0.7):
        bridge = await world.bridge()
        await until_published(world.log, int(number * share))
        killed += len(set(ids(world.log))) < number
        bridge.kill()
    assert killed == 3
    bridge = await world.bridge()
    await bridge.until_committed(world.source)
    await world.log.until(lambda: len(set(ids(world.log))) >= number, "all publishes")
    assert set(ids(world.log)) == set(map(id_of, range(number)))


async def test_an_unreadable_record_becomes_a_dead_letter_and_stops_nothing(
    kafka: str, redis_server: str, tmp_path: Path, app_name: str
) -> None:
    async with (
        workers.running(app_name, kafka, redis_server, tmp_path) as running,
        over(kafka, tmp_path, f"{app_name}-poison") as world,
    ):
        bridge = await world.bridge()
        large = json.dumps(publish(1, payload="x" * 200_000)).encode()
        poison = (b"\xff\0", A_LIE, None, b"", large[:-1])
        await world.tell(publish(0), *poison, publish(2), partition=1)
        await bridge.until_committed(world.source)
        await world.log.until(lambda: len(ids(world.log)) >= 2, "what can be read")
        assert ids(world.log) == [id_of(0), id_of(2)]
        letters = sorted(
            await running.dead_letters(), key=lambda each: dict(each.headers)["source-offset"]
        )
        assert [each.value for each in letters] == list(poison)
        for offset, letter in enumerate(letters, start=1):
            headers = dict(letter.headers)
            assert letter.key == b"k"
            assert headers["source-topic"] == world.source.encode()
            assert headers["source-partition"] == b"1"
            assert headers["source-offset"] == b"%d" % offset
            assert headers["agent"] == b"emqx-kafka"
            assert headers["reason"]


async def test_a_record_too_large_for_kafka_becomes_a_dead_letter(
    kafka: str, redis_server: str, tmp_path: Path, app_name: str
) -> None:
    async with (
        workers.running(app_name, kafka, redis_server, tmp_path) as running,
        over(kafka, tmp_path, f"{app_name}-large") as world,
    ):
        bridge = await world.bridge(message_bytes_max=10_000)
        # What counts is what is made of it: the first is large only as EMQX writes it.
        filled = publish(0, filler="x" * 20_000)
        much = publish(1, payload_b64=None, payload="x" * 20_000)
        await world.tell(filled, much, publish(2))
        await bridge.until_committed(world.source)
        await world.log.until(lambda: len(ids(world.log)) >= 2, "what is small enough")
        assert ids(world.log) == [id_of(0), id_of(2)]
        (letter,) = await running.dead_letters()
        headers = dict(letter.headers)
        assert (letter.value, headers["source-offset"]) == (b"", b"1")
        assert b"too large" in headers["reason"]
        assert b"not-produced" in [name.encode() for name in headers]


@pytest.mark.parametrize("restart", [False, True])
async def test_nothing_is_lost_while_kafka_is_away(
    own_kafka: Server, tmp_path: Path, *, restart: bool
) -> None:
    async with a_world(own_kafka.address, tmp_path, "away") as world:
        bridge = await world.bridge()
        await world.tell(*map(publish, range(5_000)), partition=0)
        await world.log.until(lambda: len(ids(world.log)) >= 100, "the first publishes")
        if restart:
            await asyncio.to_thread(own_kafka.kill)
            await asyncio.to_thread(own_kafka.start)
        else:
            await asyncio.to_thread(own_kafka.pause)
            await asyncio.sleep(10)  # longer than the bridge's session
            await asyncio.to_thread(own_kafka.resume)
        await world.tell(*map(publish, range(5_000, 6_000)), partition=1)
        await bridge.until_committed(world.source)
        assert bridge.process.poll() is None
        await world.log.until(lambda: len(set(ids(world.log))) >= 6_000, "all publishes")
        assert set(ids(world.log)) == set(map(id_of, range(6_000)))


async def test_a_bridge_without_kafka_stops_on_sigterm(own_kafka: Server, tmp_path: Path) -> None:
    async with a_world(own_kafka.address, tmp_path, "gone") as world:
        bridge = await world.bridge()
        await world.tell(*map(publish, range(1_000)))
        await bridge.until_committed(world.source)
        await asyncio.to_thread(own_kafka.pause)
        try:
            bridge.process.send_signal(signal.SIGTERM)
            assert await bridge.ended() == 0
        finally:
            await asyncio.to_thread(own_kafka.resume)


# -- end to end


async def test_events_in_the_wrong_order_have_the_same_result(
    kafka: str, redis_server: str, tmp_path: Path, app_name: str
) -> None:
    rules = (
        given.queue("queue/#"), given.store("#"), given.receipt("message.acked", "t/#"),
        given.a_rule(hook="client.connected", action="on_client_connected"),
        given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
    )  # fmt: skip
    async with workers.running(app_name, kafka, redis_server, tmp_path) as running:
        running.configure(*rules)
        for agent in ("sessions", "queue", "messages"):
            await running.worker(agent)
        async with over(kafka, tmp_path, app_name) as world:
            await world.bridge(*rules)
            await world.tell(connected("c_sub", 0, 5001), subscribed("c_sub", "queue/a", 0))
            await world.log.until(
                lambda: world.log.of_type(SubscriberJoined, "queue/a"), "the agent to know it"
            )
            # Each partition by itself: the second is read before the third is written.
            await world.tell(
                acked(1, "queue/a"), acked(3, "t/a"), disconnected("c_gone", 9, 5002), partition=1
            )
            await world.log.until(lambda: len(receipts(world.log)) >= 2, "the acks")
            await world.log.until(
                lambda: world.log.of_type(ClientDisconnected, "c_gone"), "the disconnect"
            )
            await world.tell(
                publish(1, "queue/a"), publish(2, "queue/a"), publish(3, "t/a"),
                connected("c_gone", 5, 5002), partition=2,
            )  # fmt: skip
            # Repeats, as after a crash of EMQX's bridge or of ours.
            await world.tell(publish(1, "queue/a"), publish(2, "queue/a"), publish(3, "t/a"))
            redis = running.redis
            await until(lambda: redis.exists("mqtt:msg:t/a"), "the message to be stored")
            await until(lambda: redis.zscore("mqtt:msg:queue/a", id_of(2)), "the queue")
            await until(lambda: redis.exists("mqtt:client:c_gone"), "the presence")
            assert await redis.zrange("mqtt:msg:queue/a", 0, -1) == [id_of(2).encode()]
            assert await redis.zrange("mqtt:msg:t/a", 0, -1) == [id_of(3).encode()]
            body = await redis.hgetall(f"mqtt:msg:{id_of(2)}")
            assert (body[b"payload"], body[b"from"], body[b"qos"]) == (b"2", b"c_pub", b"1")
            assert not await redis.exists(f"mqtt:msg:{id_of(1)}")
            receipt = await redis.hgetall(f"mqtt:receipt:{id_of(3)}")
            assert list(receipt) == [b"acked:c_sub"]
            online, gone = [
                await redis.hgetall(f"mqtt:client:{client}") for client in ("c_sub", "c_gone")
            ]
            assert (online[b"state"], online[b"online_at"]) == (b"1", b"%d" % (FIRST_MS // 1000))
            assert gone[b"state"] == b"0"
            assert gone[b"online_at"] == b"%d" % (FIRST_MS // 1000 + 5)
            assert gone[b"offline_at"] == b"%d" % (FIRST_MS // 1000 + 9)
            assert await running.dead_letters() == []


def receipts(log: Log) -> list[MessageAcked]:
    return [r.event for r in log.records if isinstance(r.event, MessageAcked)]


# -- on the command line


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([], "--topics: the list is empty"),
        ([keys.MESSAGES_TOPIC], "mqtt.messages is a topic of Millpond"),
        (["no-such-topic", "nor-this"], "Kafka has no topic no-such-topic, nor-this"),
    ],
)
async def test_wrong_sources_are_config_errors(
    kafka: str, tmp_path: Path, sources: list[str], said: str
) -> None:
    bridge = KafkaBridge(kafka, tmp_path, "emqx-cli", sources)
    assert await bridge.ended() == 2  # as for every mistake in settings
    assert said in " ".join(bridge.said().split())
    assert "Traceback" not in bridge.said()


async def test_a_pubsub_rule_needs_a_mountpoint(kafka: str, tmp_path: Path) -> None:
    bridge = KafkaBridge(kafka, tmp_path, "emqx-cli", ["rules"], [given.pubsub("pubsub/#")])
    assert await bridge.ended() == 2  # as for every mistake in settings
    said = " ".join(bridge.said().split())
    assert "emqx-kafka.toml:" in said.replace(" ", "")
    assert "a pubsub rule (pubsub/#) needs an EMQX listener with a mountpoint" in said


async def test_without_kafka_the_start_fails(tmp_path: Path) -> None:
    bridge = KafkaBridge("127.0.0.1:1", tmp_path, "emqx-cli", ["rules"])
    assert await bridge.ended() == 1  # nothing in the settings is wrong
    assert "Kafka cannot be reached" in bridge.said().splitlines()[-1]
    assert "Traceback" not in bridge.said()
