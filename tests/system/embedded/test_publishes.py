"""What is published through the embedded broker is in Kafka before anybody is told so, once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiomqtt
import pytest

from millpond.schemas import codec, keys
from millpond.schemas.events import MessagePublished
from tests.support.embedded_bridge import NODE, Bridge, Log, reason_of_end, running, url
from tests.support.mqtt import (
    PINGRESP,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    Client,
    a_publish,
    delivered,
    packet,
    packet_ids,
    send_all,
)

MANY = 10_000
MIB = 1024 * 1024


pytestmark = pytest.mark.usefixtures("let_go")


@pytest.fixture(scope="module")
def bridge(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    yield from running(kafka, tmp_path_factory.mktemp("bridge"))


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def numbered(topic: str, count: int) -> Iterator[bytes]:
    """QoS 1 publishes that say which one each is."""
    for payload, packet_id in zip(numbers(count), packet_ids(count), strict=True):
        yield a_publish(topic, payload, 1, packet_id)


async def test_a_publish_of_each_qos_is_told_with_all_that_is_known(
    bridge: Bridge, log: Log
) -> None:
    client = await bridge.connect("pub", username="ada")
    client.publish("all/qos", b"zero", 0)
    client.publish("all/qos", b"one", 1, 5, retain=True)
    client.publish("all/qos", b"two", 2, 6)
    assert (await client.next(PUBACK)).packet_id == 5
    assert (await client.next(PUBREC)).packet_id == 6
    client.answer(PUBREL, 6)
    assert (await client.next(PUBCOMP)).packet_id == 6
    events = await log.until_published("all/qos", 3)
    for qos, (event, payload) in enumerate(zip(events, ("zero", "one", "two"), strict=True)):
        assert event == MessagePublished(
            at=event.at, node=NODE, message_id=event.message_id, topic="all/qos", qos=qos,
            retain=qos == 1, client_id="pub", username="ada", payload=payload,
            payload_encoding="utf-8", published_at=event.at, expires_at=None,
        )  # fmt: skip
    (record, *_) = [record for record in log.records if record.key == "all/qos"]
    assert record.topic == keys.MESSAGES_TOPIC


async def test_ten_thousand_in_flight_are_acknowledged_in_order_and_stay_when_the_client_goes(
    bridge: Bridge, log: Log
) -> None:
    client = await bridge.connect("fast")
    sending = asyncio.create_task(send_all(client, numbered("fast/1", MANY)))
    assert await client.acknowledged(MANY) == list(packet_ids(MANY))
    client.vanish()
    await sending
    await log.until_published("fast/1", MANY)
    assert log.payloads("fast/1") == numbers(MANY)


async def test_of_a_client_killed_in_the_middle_all_that_was_acknowledged_is_kept(
    bridge: Bridge, log: Log
) -> None:
    client = await bridge.connect("killed")
    sending = asyncio.create_task(send_all(client, numbered("killed/1", MANY)))
    acknowledged = await client.acknowledged(MANY // 3)
    client.vanish()
    await asyncio.gather(sending, return_exceptions=True)
    assert await reason_of_end(log, "killed") == "closed"
    await log.until(lambda: len(log.published("killed/1")) >= len(acknowledged), "the acknowledged")
    found = log.payloads("killed/1")
    assert acknowledged == list(packet_ids(len(acknowledged)))
    assert found == numbers(len(found))


async def test_many_clients_at_once_keep_an_order_each(bridge: Bridge, log: Log) -> None:
    async def publish(name: str) -> None:
        client = await bridge.connect(name)
        sending = asyncio.create_task(send_all(client, numbered(f"each/{name}", 500)))
        assert await client.acknowledged(500) == list(packet_ids(500))
        await sending
        await client.disconnect()

    names = [f"one-of-{number}" for number in range(8)]
    await asyncio.gather(*map(publish, names))
    for name in names:
        await log.until_published(f"each/{name}", 500)
        assert log.payloads(f"each/{name}") == numbers(500)


async def test_a_qos_2_publish_that_is_repeated_before_its_pubrel_is_one_message(
    bridge: Bridge, log: Log
) -> None:
    client = await bridge.connect("exact", clean=False)
    for repeated in (False, True, True):
        client.publish("exact/1", b"once", 2, 9, repeated=repeated)
        assert (await client.next(PUBREC)).packet_id == 9
    # Over another connection of the session it is the same still.
    await client.disconnect()
    client = await bridge.connect("exact", clean=False)
    client.publish("exact/1", b"once", 2, 9, repeated=True)
    await client.next(PUBREC)
    for _ in range(2):
        client.answer(PUBREL, 9)
        assert (await client.next(PUBCOMP)).packet_id == 9
    # The id is free again.
    client.publish("exact/1", b"twice", 2, 9)
    await client.next(PUBREC)
    await log.until_published("exact/1", 2)
    assert log.payloads("exact/1") == [b"once", b"twice"]


async def test_many_qos_2_in_flight_are_exactly_once_and_in_order(bridge: Bridge, log: Log) -> None:
    client = await bridge.connect("exact-many")
    packets = [a_publish("exact/many", b"%d" % number, 2, number + 1) for number in range(1_000)]
    repeats = [a_publish("exact/many", b"x", 2, number, repeated=True) for number in (1, 500, 999)]
    sending = asyncio.create_task(send_all(client, packets + repeats))
    received = [(await client.next(PUBREC)).packet_id for _ in range(1_003)]
    await sending
    assert sorted(received) == sorted([*range(1, 1_001), 1, 500, 999])
    await log.until_published("exact/many", 1_000)
    assert log.payloads("exact/many") == numbers(1_000)


@pytest.mark.parametrize(
    ("payload", "encoding"),
    [
        (b"", "utf-8"),
        ("grüße \N{BUTTERFLY}".encode(), "utf-8"),
        (b'\0\x01"\\\n', "utf-8"),
        (b"\xff\xfe\0", "base64"),
        (b"a" * MIB, "utf-8"),
        (bytes(range(256)) * (MIB // 256), "base64"),
    ],
    ids=["empty", "text", "control", "binary", "a-mebibyte-of-text", "a-mebibyte-of-bytes"],
)  # fmt: skip
async def test_a_payload_comes_out_as_it_went_in(
    bridge: Bridge, log: Log, payload: bytes, encoding: str
) -> None:
    client = await bridge.connect("payloads")
    client.publish("payloads/1", payload, 1)
    await client.next(PUBACK)
    (event,) = await log.until_published("payloads/1", 1)
    assert codec.payload_bytes(event) == payload
    assert event.payload_encoding == encoding


@pytest.mark.parametrize(
    "name",
    ["with space", "a:b:c", "\N{BUTTERFLY}/\N{SNOWMAN}", "/", "//", "{tag}", "x" * 60_000, "\"'\\%s\n"],
    ids=["space", "colon", "emoji", "slash", "slashes", "braces", "long", "quotes"],
)  # fmt: skip
async def test_any_text_is_a_topic_and_a_client_id(bridge: Bridge, log: Log, name: str) -> None:
    client = await bridge.connect(name)
    client.publish(name, b"x", 1)
    await client.next(PUBACK)
    (event,) = await log.until_published(name, 1)
    assert (event.topic, event.client_id) == (name, name)
    await client.disconnect()
    assert await reason_of_end(log, name) == "normal"


async def test_pings_are_answered_while_many_publishes_are_in_flight(bridge: Bridge) -> None:
    client = await bridge.connect("pinging")
    packets = list(numbered("pinging/1", 2_000))
    packets[1_000:1_000] = [b"\xc0\x00"]
    sending = asyncio.create_task(send_all(client, packets))
    kinds = [(await client.take() or pytest.fail("closed")).kind for _ in range(2_001)]
    await sending
    assert kinds.count(PINGRESP) == 1


async def test_a_subscriber_gets_messages_in_order_at_the_lower_qos(bridge: Bridge) -> None:
    subscriber, publisher = await bridge.connect("live-sub"), await bridge.connect("live-pub")
    await subscriber.subscribe("live/+", 1)
    for number in range(600):
        publisher.publish("live/1", b"%d" % number, number % 3, number + 1)
    got = []
    for _ in range(600):
        topic, payload, qos, packet_id = delivered(await subscriber.next(PUBLISH))
        assert topic == "live/1"
        got.append((payload, qos))
        if qos:
            subscriber.answer(PUBACK, packet_id)
    assert got == [(b"%d" % number, min(1, number % 3)) for number in range(600)]
    # A new subscription in place of the old one: its QoS counts.
    await subscriber.subscribe("live/+", 0)
    publisher.publish("live/1", b"low", 1, 1_000)
    assert delivered(await subscriber.next(PUBLISH))[1:3] == (b"low", 0)


async def test_what_comes_while_a_subscriber_is_away_waits_for_it(bridge: Bridge) -> None:
    subscriber = await bridge.connect("away-sub", clean=False)
    await subscriber.subscribe("away/1", 1)
    await subscriber.disconnect()
    publisher, witness = await bridge.connect("away-pub"), await bridge.connect("witness")
    await witness.subscribe("away/1", 0)
    await send_all(publisher, numbered("away/1", 1_200))
    await publisher.acknowledged(1_200)
    for _ in range(1_200):
        await witness.next(PUBLISH)
    subscriber = await bridge.connect("away-sub", clean=False)
    for number in range(200, 1_200):  # the latest thousand
        came = await subscriber.next(PUBLISH)
        _, payload, qos, packet_id = delivered(came)
        assert (payload, qos, came.flags & 1) == (b"%d" % number, 1, 0)
        subscriber.answer(PUBACK, packet_id)


async def test_a_subscriber_that_does_not_read_holds_nobody_up_and_can_come_back(
    bridge: Bridge, log: Log
) -> None:
    # Given a subscriber that reads nothing, and more for it than its connection takes
    stuck, publisher = await bridge.connect("stuck"), await bridge.connect("stuck-pub")
    await stuck.subscribe("stuck/1", 0)
    for number in range(80):
        publisher.publish("stuck/1", b"a" * MIB, 1, number + 1)
        await publisher.next(PUBACK)
    # Then it is cut off before it costs too much
    assert await reason_of_end(log, "stuck") == "too_slow"
    again = await bridge.connect("stuck")
    await again.subscribe("stuck/1", 0)
    for _ in range(8):
        publisher.publish("stuck/1", b"a" * MIB, 1, 99)
        await publisher.next(PUBACK)
    # And its next connection can take its place though it does not read what was sent to it
    last = await bridge.connect("stuck")
    await last.subscribe("stuck/1", 0)
    publisher.publish("stuck/1", b"now", 1, 99)
    assert delivered(await last.next(PUBLISH))[1] == b"now"


async def test_websocket_clients_publish_and_subscribe_as_others_do(
    bridge: Bridge, log: Log
) -> None:
    async with aiomqtt.Client(identifier="web", **url(bridge)) as client:
        await client.subscribe("web/#", qos=1)
        payload = b"w" * MIB
        await client.publish("web/1", payload, qos=1)
        await client.publish("web/1", b"two", qos=2)
        got = [await anext(client.messages) for _ in range(2)]
    assert [message.payload for message in got] == [payload, b"two"]
    await log.until_published("web/1", 2)
    assert log.payloads("web/1") == [payload, b"two"]
    assert await reason_of_end(log, "web") == "normal"


async def test_a_client_may_publish_and_leave_in_one_breath(bridge: Bridge, log: Log) -> None:
    client: Client = await bridge.connect("breath")
    client.send(a_publish("breath/1", b"x", 0, 0) + packet(14, 0, b""))
    assert await client.closed()
    assert await reason_of_end(log, "breath") == "normal"
    await log.until_published("breath/1", 1)
