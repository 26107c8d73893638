"""Subscriptions of the embedded broker: in the order of the packets, granted only if somebody serves them, and then served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise

import pytest

from millpond.schemas.commands import Subscribe
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    Event,
    SessionCreated,
    SessionSubscribed,
    SessionTerminated,
    SessionUnsubscribed,
)
from tests.support import given
from tests.support.bridge_commands import Commands, a_deliver, commanding, until_dead_letters
from tests.support.embedded_bridge import Bridge, Log, running
from tests.support.mqtt import (
    CONNACK,
    PUBACK,
    PUBLISH,
    SUBACK,
    UNSUBACK,
    Client,
    a_publish,
    delivered,
    packet,
    text,
)

REFUSED = 0x80
RULES = (
    given.store(),
    given.a_rule(hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue"),
    given.a_rule(hook="session.subscribed", topic="kept/#", action="on_retain_lookup"),
)

pytestmark = pytest.mark.usefixtures("let_go")


@pytest.fixture(scope="module")
def bridge(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    yield from running(kafka, tmp_path_factory.mktemp("bridge"), *RULES)


@pytest.fixture
async def commands(bridge: Bridge) -> AsyncIterator[Commands]:
    async with commanding(bridge.bootstrap) as commands:
        yield commands


def a_subscribe(packet_id: int, *topic_filters: str | bytes, qos: int = 1) -> bytes:
    filters = b"".join(text(each) + bytes((qos,)) for each in topic_filters)
    return packet(8, 2, packet_id.to_bytes(2, "big") + filters)


def an_unsubscribe(packet_id: int, *topic_filters: str | bytes) -> bytes:
    return packet(10, 2, packet_id.to_bytes(2, "big") + b"".join(map(text, topic_filters)))


def a_connect(client_id: str | bytes, *, clean: bool = True) -> bytes:
    return packet(1, 0, text("MQTT") + bytes((4, clean << 1, 0, 0)) + text(client_id))


DISCONNECT = packet(14, 0, b"")


async def take(client: Client, number: int) -> list[tuple[int, int]]:
    """The kinds and packet ids of that many answers."""
    answers = []
    for _ in range(number):
        answer = await client.take()
        assert answer is not None
        answers.append((answer.kind, answer.packet_id))
    return answers


# -- one order


async def test_packets_of_one_segment_take_effect_in_the_order_sent(
    bridge: Bridge, log: Log
) -> None:
    client = await bridge.connect("order")
    await client.subscribe("order/a", 1)
    client.send(an_unsubscribe(1, "order/a") + a_subscribe(2, "order/a"))
    assert await take(client, 2) == [(UNSUBACK, 1), (SUBACK, 2)]
    client.publish("order/a", b"here", 1)
    kinds = {(await client.take() or pytest.fail("closed")).kind for _ in range(2)}
    assert kinds == {PUBACK, PUBLISH}
    client.send(a_subscribe(3, "order/b", "order/c") + an_unsubscribe(4, "order/c", "order/b"))
    assert await take(client, 2) == [(SUBACK, 3), (UNSUBACK, 4)]
    await client.disconnect()
    events = await log.until_kinds(
        "order", SessionCreated, ClientConnected, SessionSubscribed, SessionUnsubscribed,
        *[SessionSubscribed] * 3, *[SessionUnsubscribed] * 2, ClientDisconnected, SessionTerminated,
    )  # fmt: skip
    filters = [getattr(event, "topic_filter", None) for event in events[4:-2]]
    assert filters == ["order/a", "order/b", "order/c", "order/c", "order/b"]


async def test_all_packets_take_effect_before_the_connection_ends(bridge: Bridge, log: Log) -> None:
    for at in range(10):
        client, client_id = await bridge.open(), f"brief-{at}"
        filters = [f"brief/{at}/{number}" for number in range(20)]
        subscribes = [a_subscribe(number, name) for number, name in enumerate(filters, start=1)]
        client.send(a_connect(client_id, clean=False) + b"".join(subscribes) + DISCONNECT)
        while await client.take() is not None:
            pass
        events = await log.until_kinds(
            client_id, SessionCreated, ClientConnected, *[SessionSubscribed] * 20,
            ClientDisconnected,
        )  # fmt: skip
        assert filters_of(events) == filters
        # And the session has them
        again = await bridge.connect(client_id, clean=False)
        assert again.session_present
        again.publish(filters[-1], b"x", 0)
        assert delivered(await again.next(PUBLISH))[0] == filters[-1]
        await again.disconnect()


def filters_of(events: list[Event]) -> list[str]:
    return [event.topic_filter for event in events if isinstance(event, SessionSubscribed)]


# -- what nobody serves


@pytest.mark.parametrize(
    "topic_filter",
    [
        "", "a/#/b", "a+", "#b", "nul\0", "$other/x", "$SYS/#", "$share", "$share/", "$share//a",
        "$share/g", "$share/g/", "$share/+/a", "$share/g#/a", "$share/g/a/#/b", "$share/g/$other/x",
        "$queue", "$queue/", "$queue/a+", "$queue/$other/x", "$share/g/$share/h/a",
    ],
)  # fmt: skip
async def test_a_filter_that_nobody_serves_is_refused_and_others_of_its_packet_are_not(
    bridge: Bridge, log: Log, topic_filter: str
) -> None:
    client = await bridge.connect("refused")
    client.send(a_subscribe(1, "served/before", topic_filter, "served/after"))
    assert (await client.next(SUBACK)).body[2:] == bytes((1, REFUSED, 1))
    await client.unsubscribe(topic_filter)
    await client.disconnect()
    events = await log.until_kinds(
        "refused", SessionCreated, ClientConnected, *[SessionSubscribed] * 2, ClientDisconnected,
        SessionTerminated,
    )  # fmt: skip
    assert filters_of(events) == ["served/before", "served/after"]


@pytest.mark.parametrize(
    "bytes_sent",
    [
        a_subscribe(1, b"\xff\xfe"), an_unsubscribe(1, b"\xff\xfe"), a_subscribe(1), an_unsubscribe(1),
        a_subscribe(0, "a"), an_unsubscribe(0, "a"), packet(8, 2, b"\0\1\0\1a"),
        packet(8, 2, b"\0\1\0\2a"), packet(10, 2, b"\0\1\0"),
    ],
)  # fmt: skip
async def test_a_subscribe_or_unsubscribe_that_is_none_ends_the_connection(
    bridge: Bridge, log: Log, bytes_sent: bytes
) -> None:
    client = await bridge.connect("malformed")
    client.send(bytes_sent)
    assert await client.closed()
    await log.until_kinds(
        "malformed", SessionCreated, ClientConnected, ClientDisconnected, SessionTerminated
    )


@pytest.mark.parametrize(
    ("client_id", "answer"), [("nul\0", b"\0\2"), ("\0", b"\0\2"), (b"\xff\xfe", None)]
)
async def test_a_client_id_that_no_event_can_name_is_refused(
    bridge: Bridge, log: Log, client_id: str | bytes, answer: bytes | None
) -> None:
    stranger = await bridge.open()
    stranger.send(a_connect(client_id) + a_publish("refused", b"x", 0, 0))
    if answer is not None:
        assert (await stranger.next(CONNACK)).body == answer
    assert await stranger.closed()
    await (await bridge.connect("next")).disconnect()
    await log.until(lambda: "SessionTerminated" in log.kinds("next"), "the next client")
    assert {record.key for record in log.records} == {"next"}


async def test_a_commanded_filter_that_nobody_serves_is_a_dead_letter_and_the_others_are_served(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("proxied")
    filters = (("$other/x", 1), ("proxied/1", 1), ("a/#/b", 0))
    await commands.write(Subscribe(client_id="proxied", topic_filters=filters))
    await log.until(lambda: log.of_type(SessionSubscribed, "proxied"), "the subscription")
    ((_, headers),) = await until_dead_letters(bridge.bootstrap, "proxied", 1)
    reason = headers["reason"].decode()
    assert "'$other/x' (" in reason
    assert "'a/#/b' (" in reason
    assert "proxied/1" not in reason
    client.publish("proxied/1", b"x", 0)
    assert delivered(await client.next(PUBLISH))[0] == "proxied/1"


# -- shared subscriptions


@pytest.mark.parametrize("prefix", ["$share/g/", "$queue/"])
async def test_a_group_gets_each_message_of_an_ordinary_topic_once_in_turn(
    bridge: Bridge, log: Log, prefix: str
) -> None:
    # Given a group of two, one subscriber of its own, and a retained message
    topic = f"shared/{prefix[1]}"
    shared, plain = f"{prefix}{topic}/#", f"{topic}/#"
    publisher = await bridge.connect("publisher")
    publisher.publish(topic, b"retained", 1, retain=True)
    await publisher.next(PUBACK)
    members = [await bridge.connect(f"member-{at}") for at in range(2)]
    for member in members:
        assert await member.subscribe(shared, 1) == 1
    alone = await bridge.connect("alone")
    assert await alone.subscribe(plain, 1) == 1
    assert delivered(await alone.next(PUBLISH))[1] == b"retained"
    # When messages are published
    for number in range(10):
        publisher.publish(topic, b"%d" % number, 1, number + 1)
    await publisher.acknowledged(10)
    # Then the members take turns
    got = [[delivered(await member.next(PUBLISH))[1] for _ in range(5)] for member in members]
    assert sorted(got[0] + got[1]) == [b"%d" % number for number in range(10)]
    assert [delivered(await alone.next(PUBLISH))[1] for _ in range(10)] == sorted(got[0] + got[1])
    # And one that is left gets all
    await members[0].unsubscribe(shared)
    for number in range(4):
        publisher.publish(topic, b"%d" % number, 0)
        assert delivered(await members[1].next(PUBLISH))[1] == b"%d" % number
    assert await members[0].silent()
    # And the other spelling is the same subscription
    await log.until(lambda: log.of_type(SessionUnsubscribed, "member-0"), "the event")
    (event,) = log.of_type(SessionUnsubscribed, "member-0")
    assert event.topic_filter == shared.replace("$queue/", "$share/$queue/")
    if prefix == "$queue/":
        await members[1].unsubscribe(f"$share/$queue/{plain}")
        publisher.publish(topic, b"nobody", 0)
        assert await members[1].silent()


# -- retained messages


async def test_a_retained_message_that_the_broker_keeps_does_not_follow_a_newer_one(
    bridge: Bridge,
) -> None:
    """The last value that a client shows must be the last one that was published."""
    topic, publisher = "busy/1", await bridge.connect("busy")
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
    for at in range(30):
        clients.append(await bridge.connect(f"viewer-{at}"))
        clients[-1].send(a_subscribe(1, topic, qos=0))
        await asyncio.sleep(0.01)  # of the publisher's time
    stop.set()
    last = await publishing
    for client in clients:
        shown: list[int] = []
        while not shown or shown[-1] < last:
            came = await client.take()
            assert came is not None
            if came.kind == PUBLISH:
                shown.append(int(delivered(came)[1]))
        assert all(one < other for one, other in pairwise(shown)), shown
        assert await client.silent()


async def test_a_retained_message_of_the_store_does_not_follow_a_newer_one(
    bridge: Bridge, commands: Commands
) -> None:
    # Given a client that got a message since it subscribed
    client = await bridge.connect("shows")
    await client.subscribe("kept/#", 1)
    client.publish("kept/1", b"live", 0)
    assert delivered(await client.next(PUBLISH))[1] == b"live"
    # When an older one was looked up for it
    old = {
        "lease": "",
        "retain": True,
        "qos": 0,
        "message_id": f"{1_700_000_000_000_000:016X}{1:016X}",
    }
    for number, topic in enumerate(("kept/1", "kept/2")):
        await commands.write(a_deliver("shows", number, topic=topic, payload=topic, **old))
    # Then only that of another topic comes
    assert delivered(await client.next(PUBLISH))[1] == b"kept/2"
    assert await client.silent()
    # But a new subscription gets it
    await client.subscribe("kept/1", 1)
    await commands.write(a_deliver("shows", 3, topic="kept/1", payload="again", **old))
    assert delivered(await client.next(PUBLISH))[1] == b"again"
