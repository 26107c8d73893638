"""A granted subscription is in effect: what is published after its SUBACK arrives, and nothing older than that follows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest

from millpond.schemas import keys
from tests.support import given
from tests.support.bridge_commands import until_dead_letters
from tests.support.mqtt import PUBACK, PUBLISH, delivered, packet, text
from tests.support.world import World, running

TIMES = 30
RULES = (
    given.queue("queue/#"),
    given.pubsub("latest/#", start="latest"),
    given.retain("kept/#"),
    given.a_rule(hook="session.subscribed", topic="kept/#", action="on_retain_lookup"),
    given.a_rule(hook="client.connected", action="on_subscribe_lookup"),
)


@pytest.fixture(scope="module")
def world(
    kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("granted")
    agents = ("sessions", "messages", "queue", "pubsub")
    yield from running("granted-stories", kafka, redis_server, directory, RULES, *agents)


@pytest.mark.parametrize("prefix", ["", "$queue/"])
@pytest.mark.parametrize(
    ("topic", "qos"), [("latest/{}", 1), ("queue/one/{}", 1), ("queue/zero/{}", 0)]
)
async def test_what_is_published_right_after_the_suback_arrives(
    world: World, topic: str, qos: int, prefix: str
) -> None:
    publisher = await world.bridge.connect("publisher")
    for at in range(TIMES if not prefix else 3):
        own = topic.format(f"{len(prefix)}-{at}")
        client = await world.bridge.connect(f"subscriber {own}")
        assert await client.subscribe(prefix + own, 1) == 1
        publisher.publish(own, b"%d" % at, qos)
        if qos:
            await publisher.next(PUBACK)
        _, payload, copy_qos, packet_id = delivered(await client.next(PUBLISH))
        assert (payload, copy_qos) == (b"%d" % at, qos)
        if qos:
            client.answer(PUBACK, packet_id)
        await client.disconnect()
    await publisher.disconnect()


async def test_a_retained_message_that_is_looked_up_does_not_follow_a_newer_one(
    world: World,
) -> None:
    """The last value that a client shows must be the last one that was published."""
    topic, publisher = "kept/busy", await world.bridge.connect("busy")
    stop = asyncio.Event()

    async def publish() -> int:
        number = 0
        while not stop.is_set():
            number += 1
            publisher.publish(topic, b"%d" % number, 1, number % 65_535 + 1, retain=True)
            await publisher.next(PUBACK)
        return number

    publishing = asyncio.create_task(publish())
    clients = []
    for at in range(TIMES):
        clients.append(await world.bridge.connect(f"viewer-{at}"))
        clients[-1].send(packet(8, 2, b"\0\1" + text(topic) + b"\0"))
        await asyncio.sleep(0.02)  # of the publisher's time
    stop.set()
    last = await publishing
    for client in clients:
        shown: list[int] = []
        while not shown or shown[-1] < last:
            came = await client.take()
            assert came is not None
            if came.kind == PUBLISH:
                shown.append(int(delivered(came)[1]))
        assert all(one <= other for one, other in pairwise(shown)), shown
        assert await client.silent()
        client.vanish()
    publisher.vanish()


async def test_entries_that_nobody_can_serve_are_dead_letters_and_the_others_are_served(
    world: World,
) -> None:
    # Given subscriptions in Redis, of which some are none
    entries: dict[str | bytes, str] = {
        "$queue/queue/proxied": "1", "a/#/b": "1", b"\xff\xfe": "1", "$other/x": "1", "nul\0": "0", "a": "3",
    }  # fmt: skip
    world.redis.hset(keys.subscriptions("proxied"), mapping=entries)  # type: ignore[arg-type]
    # When their client connects
    client = await world.bridge.connect("proxied")
    # Then it is subscribed to what can be served
    publisher = await world.bridge.connect("publisher")
    publisher.publish("queue/proxied", b"x", 1)
    await publisher.next(PUBACK)
    assert delivered(await client.next(PUBLISH))[:2] == ("queue/proxied", b"x")
    # And the reasons are told, by the agent and by the bridge
    letters = await until_dead_letters(world.bootstrap, "proxied", 2)
    reasons = {headers["agent"]: headers["reason"].decode() for _, headers in letters}
    assert reasons[b"bridge"].startswith("'proxied' cannot be subscribed to '$other/x' (")
    for entry in (
        "'a/#/b' → '1' (",
        r"'\udcff\udcfe' → '1' (",
        r"'nul\x00' → '0' (",
        "'a' → '3' (",
    ):
        assert entry in reasons[b"sessions"]
    assert "$queue" not in reasons[b"sessions"]
    await client.disconnect()
    await publisher.disconnect()
