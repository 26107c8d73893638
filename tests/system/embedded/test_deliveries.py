"""The embedded broker's bridge carries out deliver commands: in order, as far as a client has room, and reports it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

import aiomqtt
import pytest

from millpond.pipeline.brokers.embedded.outgoing import DELIVERY_WINDOW
from millpond.schemas import codec
from millpond.schemas.events import MessageAcked, MessageDelivered, Sent, SessionSubscribed
from tests.support import given
from tests.support.bridge_commands import (
    Commands,
    a_deliver,
    ack,
    acked,
    answer_all,
    commanding,
    failed,
    is_repeated,
    next_copies,
    number_of,
    reported,
    sent,
    until_acked,
    until_dead_letters,
    until_failed,
    until_sent,
)
from tests.support.embedded_bridge import Bridge, Log, running, url
from tests.support.mqtt import PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, Will, delivered

RULES = (
    given.store(),
    given.a_rule(hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue"),
    given.receipt("message.delivered", "queue/#"),
    given.receipt("message.acked", "receipts/#"),
)
MIB = 1024 * 1024

pytestmark = pytest.mark.usefixtures("let_go")


@pytest.fixture(scope="module")
def bridge(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    yield from running(kafka, tmp_path_factory.mktemp("bridge"), *RULES)


@pytest.fixture
async def commands(bridge: Bridge) -> AsyncIterator[Commands]:
    async with commanding(bridge.bootstrap) as commands:
        yield commands


# -- routing


async def test_a_topic_with_a_delivery_rule_is_not_routed_while_others_are(
    bridge: Bridge, log: Log
) -> None:
    # Given a subscriber to everything, one that is away, and a will
    here = await bridge.connect("routed-here")
    await here.subscribe("#", 1)
    away = await bridge.connect("routed-away", clean=False)
    await away.subscribe("#", 1)
    await away.disconnect()
    (await bridge.connect("routed-will", will=Will("queue/will", b"q"))).vanish()
    await log.until_published("queue/will", 1)
    # When messages of both kinds are published
    publisher = await bridge.connect("routed-pub")
    for packet_id, topic in enumerate(("queue/1", "plain/1", "queue/2", "plain/2"), start=1):
        publisher.publish(topic, topic.encode(), 1, packet_id, retain=topic == "queue/2")
        await publisher.next(PUBACK)
    # Then only the others come, live and later; what is retained is kept as before
    away = await bridge.connect("routed-away", clean=False)
    for client in (here, away):
        copies = await next_copies(client, 2)
        assert [delivered(copy)[1] for copy in copies] == [b"plain/1", b"plain/2"]
        assert await client.silent()
    late = await bridge.connect("routed-late")
    await late.subscribe("queue/2", 1)
    assert delivered(await late.next(PUBLISH))[:2] == ("queue/2", b"queue/2")
    publisher.publish("queue/2", b"", 1, 9, retain=True)
    await publisher.next(PUBACK)


# -- one copy


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_copy_is_handed_over_as_the_command_says_and_reported_before_its_ack(
    bridge: Bridge, log: Log, commands: Commands, qos: int, attempt: int
) -> None:
    client_id = f"one-{qos}-{attempt}"
    client = await bridge.connect(client_id)
    await commands.deliver(
        client_id, 7, qos=qos, attempt=attempt, retain=True, payload="/w==",
        payload_encoding="base64",
    )  # fmt: skip
    # Then it comes as it should, marked as repeated if it is
    copy = await client.next(PUBLISH)
    topic, payload, copy_qos, packet_id = delivered(copy)
    assert (topic, payload, copy_qos) == (f"queue/{client_id}", b"\xff", qos)
    assert (is_repeated(copy), copy.flags & 1) == (attempt > 1 and qos > 0, 1)
    await until_sent(log, client_id, 7)
    assert not acked(log, client_id)
    # When the client acknowledges it, Then that is told, once, and at QoS 2 the packet id is released
    if qos == 1:
        client.answer(PUBACK, packet_id)
    if qos == 2:
        for _ in range(2):
            client.answer(PUBREC, packet_id)
            assert (await client.next(PUBREL)).packet_id == packet_id
        client.answer(PUBCOMP, packet_id)
    if qos:
        await until_acked(log, client_id, 7)
    await commands.deliver(client_id, 8)
    await answer_all(client, 1)
    await until_acked(log, client_id, *([7, 8] if qos else [8]))
    first, *_ = reported(log, client_id)
    assert first == Sent(a_deliver(client_id, 7).lease, client_id, "m7", None, qos)
    # And that it was handed over is told where a rule wants it
    (one, _) = log.of_type(MessageDelivered, f"queue/{client_id}")
    assert (one.message_id, one.client_id, one.qos) == ("m7", client_id, qos)
    acks = log.of_type(MessageAcked, f"queue/{client_id}")
    assert {(one.client_id, one.topic) for one in acks} == {(client_id, f"queue/{client_id}")}


async def test_a_client_over_websocket_is_served_as_others_are(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    async with aiomqtt.Client(identifier="web-copies", **url(bridge)) as client:
        await commands.deliver("web-copies", *range(300), qos=2)
        got = [await anext(client.messages) for _ in range(300)]
        await until_acked(log, "web-copies", *range(300))
    assert [message.payload for message in got] == [b"%d" % number for number in range(300)]
    await until_sent(log, "web-copies", *range(300))


async def test_an_ack_is_taken_however_late_and_out_of_order(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("late")
    await commands.deliver("late", 1, 2, 3)
    first, second, third = await next_copies(client, 3)
    ack(client, third)
    await until_acked(log, "late", 3)
    ack(client, first)
    ack(client, second)
    ack(client, second)
    client.answer(PUBREC, delivered(first)[3])  # of nothing
    assert (await client.next(PUBREL)).packet_id == delivered(first)[3]
    await until_acked(log, "late", 3, 1, 2)


async def test_a_command_without_a_lease_keeps_its_place_and_is_not_reported(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("retained")
    for number in range(1, 200):
        await commands.deliver("retained", number, **({} if number % 2 else {"lease": ""}))
    await commands.deliver("nobody-there", 5, lease="")
    assert await answer_all(client, 199) == list(range(1, 200))
    await until_sent(log, "retained", *range(1, 200, 2))
    assert not failed(log, "nobody-there")


# -- room


async def test_copies_wait_in_order_until_there_is_room(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    # Given more commands than a client has room for; one of them needs none, and one is no delivery
    client = await bridge.connect("window")
    last = DELIVERY_WINDOW + 2
    await commands.deliver("window", *range(DELIVERY_WINDOW))
    await commands.deliver("window", DELIVERY_WINDOW)
    await commands.deliver("window", DELIVERY_WINDOW + 1, qos=0)
    await commands.subscribe("window", "proxied/1")
    await commands.deliver("window", last)
    # Then so many come as there is room for
    first, second, *others = await next_copies(client, DELIVERY_WINDOW)
    await until_sent(log, "window", *range(DELIVERY_WINDOW))
    assert await client.silent()
    assert not log.of_type(SessionSubscribed, "window")
    # When one is acknowledged, Then the next comes, and what needs no room keeps its place behind it
    ack(client, second)
    assert [number_of(copy) for copy in await next_copies(client, 2)] == [
        DELIVERY_WINDOW, DELIVERY_WINDOW + 1,
    ]  # fmt: skip
    (event,) = await log.until(lambda: log.of_type(SessionSubscribed, "window"), "the subscription")
    assert (event.topic_filter, event.proxied) == ("proxied/1", True)
    assert await client.silent()
    ack(client, first)
    assert number_of(await client.next(PUBLISH)) == last
    for copy in others:
        ack(client, copy)
    await until_acked(log, "window", 1, 0, *range(2, DELIVERY_WINDOW))
    await until_sent(log, "window", *range(last + 1))


async def test_a_client_without_room_still_gets_what_is_routed(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("both")
    await client.subscribe("plain/both", 1)
    await commands.deliver("both", *range(DELIVERY_WINDOW + 1))
    copies = await next_copies(client, DELIVERY_WINDOW)
    client.publish("plain/both", b"1000", 0)
    copies += await next_copies(client, 1)
    assert [number_of(copy) for copy in copies] == [*range(DELIVERY_WINDOW), 1000]
    ids = [delivered(copy)[3] for copy in copies[:-1]]
    assert len(set(ids)) == DELIVERY_WINDOW


async def test_a_slow_client_holds_nobody_else_up(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    # Given one that acknowledges nothing, one that does not even read, and one that does both
    await bridge.connect("silent")
    await bridge.connect("blind")
    fast = await bridge.connect("fast")
    await commands.deliver("silent", *range(DELIVERY_WINDOW * 2))
    await commands.deliver("blind", *range(30), payload="x" * MIB)
    await commands.deliver("fast", *range(500))
    # Then it is served, and of the others as much as they take
    assert await answer_all(fast, 500) == list(range(500))
    await until_acked(log, "fast", *range(500))
    await until_sent(log, "silent", *range(DELIVERY_WINDOW))
    assert len(sent(log, "blind")) < 30


# -- failures


async def test_a_client_that_is_not_there_is_reported_and_so_is_what_comes_after_it(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    # Given a client that was never here, and one whose session waits
    await (await bridge.connect("gone", clean=False)).disconnect()
    await commands.deliver("never", 1)
    await commands.deliver("gone", 1)
    await until_failed(log, "never", (1, "no_client"))
    await until_failed(log, "gone", (1, "no_client"))
    # When it comes back, Then what follows in the same epoch would overtake what failed
    client = await bridge.connect("gone", clean=False)
    await commands.deliver("gone", 2, 3)
    await until_failed(log, "gone", (1, "no_client"), (2, "stale"), (3, "stale"))
    # But not what is of another epoch, partition or agent
    await commands.deliver("gone", 4, epoch=2)
    await commands.deliver("gone", 5, topic="queue/gone-elsewhere-too")
    await commands.deliver("gone", 6, lease="")
    assert await answer_all(client, 3) == [4, 5, 6]
    await until_failed(log, "gone", (1, "no_client"), (2, "stale"), (3, "stale"))


async def test_a_command_for_a_message_that_has_expired_is_stale(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("expired")
    await commands.deliver("expired", 1, expires_at=time.time_ns() // 1_000_000 - 1)
    await commands.deliver("expired", 2, epoch=2, expires_at=time.time_ns() // 1_000_000 + 60_000)
    assert await answer_all(client, 1) == [2]
    await until_failed(log, "expired", (1, "stale"))


async def test_a_command_that_waits_past_its_validity_is_stale_and_those_after_it_are_too(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    # Given a client without room, and commands that wait
    client = await bridge.connect("waits")
    await commands.deliver("waits", *range(DELIVERY_WINDOW))
    copies = await next_copies(client, DELIVERY_WINDOW)
    await commands.deliver("waits", 500, valid_for_s=1)
    await commands.deliver("waits", 501)
    await commands.deliver("waits", 502, qos=0, epoch=2)
    # Then they fail in time, without the client having done anything
    await until_failed(log, "waits", (500, "stale"), (501, "stale"))
    assert number_of(await client.next(PUBLISH)) == 502
    for copy in copies:
        ack(client, copy)
    await until_acked(log, "waits", *range(DELIVERY_WINDOW))
    assert await client.silent()
    await until_failed(log, "waits", (500, "stale"), (501, "stale"))


async def test_a_message_that_cannot_be_sent_over_mqtt_fails_at_the_bridge(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("wild")
    await commands.deliver("wild", 1, topic="queue/#")
    await commands.deliver("wild", 2, epoch=2)
    assert await answer_all(client, 1) == [2]
    await until_failed(log, "wild", (1, "bridge"))


# -- connections come and go


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("how", ["vanishes", "is taken over"])
async def test_of_a_client_that_goes_what_waits_fails_and_what_is_not_acked_does_not(
    bridge: Bridge, log: Log, commands: Commands, how: str, clean: bool
) -> None:
    # Given a client without room, and commands that wait
    client_id = f"goer {how} {clean}"
    client = await bridge.connect(client_id, clean=clean)
    waiting = range(DELIVERY_WINDOW, DELIVERY_WINDOW + 3)
    await commands.deliver(client_id, *range(DELIVERY_WINDOW), *waiting)
    await commands.subscribe(client_id, "proxied/2")
    await next_copies(client, DELIVERY_WINDOW)
    await until_sent(log, client_id, *range(DELIVERY_WINDOW))
    # When its connection ends
    if how == "vanishes":
        client.vanish()
        await until_failed(log, client_id, *((number, "no_client") for number in waiting))
    client = await bridge.connect(client_id, clean=clean)
    await until_failed(log, client_id, *((number, "no_client") for number in waiting))
    # Then what waited has failed, and of the rest a clean session has nothing left
    if not clean:
        again = await next_copies(client, DELIVERY_WINDOW)
        assert [number_of(copy) for copy in again] == [*range(DELIVERY_WINDOW)]
        await log.until(lambda: log.of_type(SessionSubscribed, client_id), "the subscription")
    assert await client.silent()
    assert clean != bool(log.of_type(SessionSubscribed, client_id))


@pytest.mark.parametrize("how", ["leaves", "vanishes", "is taken over"])
async def test_a_session_that_goes_on_gets_what_it_has_not_acknowledged_again_and_first(
    bridge: Bridge, log: Log, commands: Commands, how: str
) -> None:
    # Given copies at QoS 1 and 2, some acknowledged, and one that is valid for a moment
    client_id = f"again {how}"
    first = await bridge.connect(client_id, clean=False)
    await commands.deliver(client_id, 1, 2)
    await commands.deliver(client_id, 3, 4, qos=2)
    await commands.deliver(client_id, 5, qos=2, valid_for_s=1)
    await commands.deliver(client_id, 6)
    copies = {number_of(copy): copy for copy in await next_copies(first, 6)}
    ids = {number: delivered(copy)[3] for number, copy in copies.items()}
    started = time.monotonic()
    ack(first, copies[1])
    first.answer(PUBREC, ids[3])
    await first.next(PUBREL)
    await until_acked(log, client_id, 1, 3)
    while time.monotonic() < started + 1.2:
        assert await first.silent()
    # When the connection ends and another goes on
    if how == "leaves":
        await first.disconnect()
    elif how == "vanishes":
        first.vanish()
    second = await bridge.connect(client_id, clean=False)
    assert second.session_present
    await commands.deliver(client_id, 7, epoch=2)
    # Then the release comes again, and the copies that are still good, as repeated, with their packet ids
    assert (await second.next(PUBREL)).packet_id == ids[3]
    second.answer(PUBCOMP, ids[3])
    again = await next_copies(second, 4)
    assert [number_of(copy) for copy in again] == [2, 4, 6, 7]
    assert [is_repeated(copy) for copy in again] == [True, True, True, False]
    assert [delivered(copy)[3] for copy in again[:3]] == [ids[2], ids[4], ids[6]]
    assert delivered(again[3])[3] not in ids.values()
    # And what has expired is reported
    await until_failed(log, client_id, (5, "stale"))
    # And their acknowledgements count
    ack(second, again[0])
    second.answer(PUBREC, ids[4])
    await second.next(PUBREL)
    second.answer(PUBCOMP, ids[4])
    ack(second, again[2])
    ack(second, again[3])
    await until_acked(log, client_id, 1, 3, 2, 4, 6, 7)
    await until_sent(log, client_id, 1, 2, 3, 4, 5, 6, 7)
    await second.disconnect()
    third = await bridge.connect(client_id, clean=False)
    assert await third.silent()


async def test_a_routed_message_that_is_not_acknowledged_comes_again_with_the_session(
    bridge: Bridge, log: Log
) -> None:
    subscriber = await bridge.connect("routed-again", clean=False)
    await subscriber.subscribe("receipts/again", 2)
    publisher = await bridge.connect("routed-again-pub")
    for number in range(1, 4):
        publisher.publish("receipts/again", b"%d" % number, 1, number)
    first, second, third = await next_copies(subscriber, 3)
    ack(subscriber, second)
    await log.until(lambda: log.of_type(MessageAcked, "receipts/again"), "the ack")
    subscriber.vanish()
    subscriber = await bridge.connect("routed-again", clean=False)
    again = await next_copies(subscriber, 2)
    assert [(number_of(copy), is_repeated(copy)) for copy in again] == [(1, True), (3, True)]
    assert [delivered(copy)[3] for copy in again] == [delivered(first)[3], delivered(third)[3]]


# -- what cannot be read


async def test_a_command_that_nobody_can_read_or_report_is_a_dead_letter_and_the_next_goes_on(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("letters")
    leases = ("queue/1", "nobody/1/1", "queue/999/1", "queue/x/1")
    for lease in leases:
        await commands.write(a_deliver("letters", 1, lease=lease))
    await commands.write_bytes("letters", b"{")
    await commands.write_bytes("letters", None)
    await commands.deliver("letters", 2)
    assert await answer_all(client, 1) == [2]
    await until_sent(log, "letters", 2)
    assert not failed(log, "letters")
    letters = await until_dead_letters(bridge.bootstrap, "letters", 6)
    values = [codec.encode(a_deliver("letters", 1, lease=lease)) for lease in leases]
    assert [value for value, _ in letters] == [*values, b"{", None]
    assert all(headers["agent"] == b"bridge" for _, headers in letters)
    assert b"999" in letters[2][1]["reason"]
