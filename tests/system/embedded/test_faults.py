"""Kafka goes away and comes back under the embedded broker: nobody is told what is not so, and nothing is lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from millpond.pipeline.brokers.embedded.bridge import STOP_TIMEOUT_S
from millpond.schemas import keys
from millpond.schemas.events import ClientConnected, ClientDisconnected, SessionSubscribed
from tests.support import servers
from tests.support.embedded_bridge import Bridge, Log, running
from tests.support.mqtt import (
    CONNACK,
    PINGRESP,
    PUBACK,
    PUBCOMP,
    PUBREC,
    PUBREL,
    SUBACK,
    UNSUBACK,
    Client,
    a_publish,
    packet,
    packet_ids,
    send_all,
    text,
)
from tests.support.servers import Server
from tests.support.workers import until

MIB = 1024 * 1024
HELD_BYTES_MAX = (
    64 * MIB
)  # of memory, for one client that is held back: its window, and what that is copied into


pytestmark = pytest.mark.usefixtures("let_go")


@pytest.fixture(scope="module")
def hurt_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Kafka of this module's own."""
    server = servers.kafka_server(tmp_path_factory.mktemp("kafka"))
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def bridge(hurt_kafka: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    yield from running(hurt_kafka.address, tmp_path_factory.mktemp("bridge"))


@pytest.fixture
def paused(hurt_kafka: Server, log: Log) -> Iterator[Server]:
    """The Kafka, which a test pauses: it goes on in any case."""
    yield hurt_kafka
    hurt_kafka.resume()


async def warm(bridge: Bridge, name: str) -> Client:
    """A connected client that has published: nothing of its own waits for Kafka."""
    client = await bridge.connect(name)
    client.publish(name, b"before", 1)
    await client.next(PUBACK)
    return client


async def test_while_kafka_does_not_answer_nobody_is_answered_but_pings_are(
    bridge: Bridge, paused: Server, log: Log
) -> None:
    client = await warm(bridge, "patient")
    # When Kafka stops answering
    paused.pause()
    for packet_id in (1, 2, 3):
        client.publish("patient", b"qos 1", 1, packet_id)
    client.publish("patient", b"qos 2", 2, 4)
    client.ping()
    # Then only the ping is answered
    await client.next(PINGRESP)
    assert await client.silent()
    client.ping()
    await client.next(PINGRESP)
    # When it answers again, Then everything is, in order, and is there
    paused.resume()
    assert await client.acknowledged(3) == [1, 2, 3]
    assert (await client.next(PUBREC)).packet_id == 4
    await log.until_published("patient", 5)
    assert log.payloads("patient") == [b"before", b"qos 1", b"qos 1", b"qos 1", b"qos 2"]


async def test_a_subscription_is_granted_or_ended_when_kafka_has_that(
    bridge: Bridge, paused: Server, log: Log
) -> None:
    client = await warm(bridge, "granted")
    await client.subscribe("granted", 1)
    # When Kafka stops answering
    paused.pause()
    client.send(packet(10, 2, b"\0\1" + text("granted")))
    client.send(packet(8, 2, b"\0\2" + text("granted") + b"\1" + text("other") + b"\0"))
    client.ping()
    # Then only the ping is answered
    await client.next(PINGRESP)
    assert await client.silent()
    # When it answers again, Then everything is, in order, and is there
    paused.resume()
    assert (await client.next(UNSUBACK)).packet_id == 1
    assert (await client.next(SUBACK)).body == b"\0\2\1\0"
    kinds = ["SessionSubscribed", "SessionUnsubscribed", "SessionSubscribed", "SessionSubscribed"]
    await log.until(lambda: log.kinds("granted")[2:] == kinds, "the events")


async def test_a_repeated_qos_2_publish_is_not_answered_before_kafka_has_the_first(
    bridge: Bridge, paused: Server, log: Log
) -> None:
    client = await bridge.connect("exact", clean=False)
    paused.pause()
    client.publish("exact", b"once", 2, 5)
    client.publish("exact", b"once", 2, 5, repeated=True)
    assert await client.silent()
    client.vanish()
    paused.resume()
    # Over the session's next connection it is the same message still
    client = await bridge.connect("exact", clean=False)
    client.publish("exact", b"once", 2, 5, repeated=True)
    assert (await client.next(PUBREC)).packet_id == 5
    client.answer(PUBREL, 5)
    await client.next(PUBCOMP)
    client.publish("exact", b"end", 1, 6)
    await client.next(PUBACK)
    await log.until_published("exact", 2)
    assert log.payloads("exact") == [b"once", b"end"]


async def test_a_client_that_publishes_on_is_held_back_after_a_bounded_amount(
    bridge: Bridge, paused: Server, log: Log
) -> None:
    # Given a client that publishes far more than may wait
    client = await warm(bridge, "flood")
    memory = psutil.Process(bridge.process.pid).memory_info().rss
    paused.pause()
    count, payload = 2_000, b"f" * 64_000
    packets = (a_publish("flood", payload + b"%d" % n, 1, n + 1) for n in range(count))
    sent = 0

    async def send() -> None:
        nonlocal sent
        for one in packets:
            client.send(one)
            await client.writer.drain()
            sent += 1

    sending = asyncio.create_task(send())

    # Then it is held back: what it has sent does not grow, and neither does the bridge
    async def held() -> bool:
        before = sent
        await asyncio.sleep(0.5)
        return sent == before

    await until(held, "the client to be held back")
    assert sent < count
    assert await client.silent()
    assert psutil.Process(bridge.process.pid).memory_info().rss < memory + HELD_BYTES_MAX
    # And others are served as far as that goes without Kafka
    other = await bridge.connect("other")
    other.ping()
    await other.next(PINGRESP)
    # When Kafka answers again, Then everything is acknowledged, in order, and there once
    paused.resume()
    assert await client.acknowledged(count) == list(packet_ids(count))
    await sending
    await log.until_published("flood", count + 1)
    assert log.payloads("flood")[1:] == [payload + b"%d" % number for number in range(count)]


async def test_subscriptions_and_ends_wait_for_kafka_and_are_told_then(
    bridge: Bridge, paused: Server, log: Log
) -> None:
    # Given all of Kafka's buffer taken
    flood = await warm(bridge, "full")
    vanishing, subscribing = await bridge.connect("vanishing"), await bridge.connect("subscribing")
    paused.pause()
    sending = asyncio.create_task(
        send_all(flood, (a_publish("full", b"f" * MIB, 1, n) for n in range(1, 40)))
    )
    assert await flood.silent()
    # When clients go, come and subscribe
    vanishing.vanish()
    flood.vanish()
    await asyncio.gather(sending, return_exceptions=True)
    subscribing.send(packet(8, 2, b"\0\7" + text("a/#") + b"\1"))
    connecting = await bridge.open()
    connecting.send(packet(1, 0, text("MQTT") + b"\x04\x02\0\0" + text("vanishing")))
    # Then nobody is told that it is subscribed, or connected in place of one whose end is not told yet
    assert await subscribing.silent()
    paused.resume()
    await subscribing.next(SUBACK)
    await connecting.next(CONNACK)
    await log.until(lambda: log.of_type(ClientDisconnected, "full"), "the end of `full`")
    await log.until(lambda: log.of_type(SessionSubscribed, "subscribing"), "the subscription")
    await log.until(lambda: len(log.of_type(ClientConnected, "vanishing")) == 2, "the second")
    kinds = log.kinds("vanishing")
    assert kinds[1::4] == ["ClientConnected"] * 2
    assert kinds[2] == "ClientDisconnected"


async def test_whoever_cannot_be_let_in_soon_is_cut_off(
    bridge: Bridge, paused: Server, log: Log
) -> None:
    # Given a client whose end cannot be told, since all of Kafka's buffer is taken
    first = await warm(bridge, "again")
    paused.pause()
    for _ in range(40):
        first.publish("again", b"f" * MIB)
    assert await first.silent()
    # When it connects anew, Then it is cut off, and let in once Kafka answers again
    second = await bridge.open()
    second.send(packet(1, 0, text("MQTT") + b"\x04\x02\0\0" + text("again")))
    assert await second.closed()
    paused.resume()
    await (await bridge.connect("again")).disconnect()
    await log.until(lambda: len(log.of_type(ClientDisconnected, "again")) == 2, "both ends")


async def test_a_kafka_that_is_killed_and_comes_back_has_all_that_was_acknowledged_once(
    bridge: Bridge, hurt_kafka: Server, log: Log
) -> None:
    # Given clients that publish all the time, at QoS 1 and 2, and one that will vanish meanwhile
    count = 3_000
    one, two = await bridge.connect("killed-1"), await bridge.connect("killed-2")
    leaving = await bridge.connect("leaving")
    sending = [
        asyncio.create_task(
            send_all(one, (a_publish("killed-1", b"%d" % n, 1, n + 1) for n in range(count)))
        ),
        asyncio.create_task(
            send_all(two, (a_publish("killed-2", b"%d" % n, 2, n + 1) for n in range(count)))
        ),
    ]
    first = await one.acknowledged(100)
    # When Kafka is killed in the middle and started again
    await asyncio.to_thread(hurt_kafka.kill)
    leaving.vanish()
    one.ping()
    await asyncio.to_thread(hurt_kafka.start)
    # Then everything is acknowledged in order, and is there once
    acknowledged: list[int] = []
    while len(acknowledged) < count - len(first):
        came = await one.take()
        assert came is not None
        if came.kind != PINGRESP:
            acknowledged.append(came.packet_id)
    assert first + acknowledged == list(range(1, count + 1))
    assert [(await two.next(PUBREC)).packet_id for _ in range(count)] == list(range(1, count + 1))
    await asyncio.gather(*sending)
    for topic in ("killed-1", "killed-2"):
        await log.until_published(topic, count)
        assert log.payloads(topic) == [b"%d" % number for number in range(count)]
    await log.until(lambda: log.of_type(ClientDisconnected, "leaving"), "the end of `leaving`")


async def test_a_publish_that_kafka_itself_refuses_ends_its_connection_and_no_other(
    bridge: Bridge, hurt_kafka: Server, log: Log
) -> None:
    async def limit(size: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=hurt_kafka.address)
        await admin.start()
        topic = ConfigResource(
            ConfigResourceType.TOPIC, keys.MESSAGES_TOPIC, {"max.message.bytes": str(size)}
        )
        await admin.alter_configs([topic])
        await admin.close()

    # Given a Kafka whose limit is lower than the bridge believes
    await limit(100_000)
    small, large = await bridge.connect("small"), await bridge.connect("large")
    # When it refuses a publish, Then it takes those after it still
    for number in range(3):
        small.publish("sizes", b"%d" % number, 1, number + 1)
        await small.next(PUBACK)
        large.publish("sizes", b"l" * 200_000, 1)
        assert await large.closed()
        large = await bridge.connect("large")
    await limit(2 * MIB)
    await log.until_published("sizes", 3)
    assert log.payloads("sizes") == [b"0", b"1", b"2"]
    assert {event.reason for event in log.of_type(ClientDisconnected, "large")} == {
        "publish_refused"
    }


async def test_sigterm_while_kafka_does_not_answer_ends_the_bridge_soon_and_cleanly(
    hurt_kafka: Server, bridge: Bridge, paused: Server, log: Log, tmp_path: Path
) -> None:
    # Given a bridge with publishes that Kafka does not take, and one that still waits for its Kafka
    other = Bridge(hurt_kafka.address, tmp_path / "other").until_ready()
    late = None
    try:
        client = await warm(other, "ending")
        paused.pause()
        sending = asyncio.create_task(
            send_all(client, (a_publish("ending", b"e" * MIB, 1, n) for n in range(1, 40)))
        )
        assert await client.silent()
        late = Bridge(hurt_kafka.address, tmp_path / "late")
        await late.until_listening_to(signal.SIGTERM)
        started = time.monotonic()
        # When both are asked to end, Then they do, and nothing was acknowledged that is not in Kafka
        for ending in (other, late):
            ending.signal(signal.SIGTERM)
        assert await client.closed()
        assert [await other.ended(), await late.ended()] == [0, 0], other.said() + late.said()
        assert time.monotonic() - started < STOP_TIMEOUT_S + 8
        assert "these events may be lost" in other.said()
        for ending in (other, late):
            assert "Traceback" not in ending.said(), ending.said()[-4_000:]
        await asyncio.gather(sending, return_exceptions=True)
    finally:
        other.let_go()
        for running_still in (other, late):
            if running_still is not None:
                running_still.kill()


async def test_a_bridge_without_its_kafka_or_its_port_says_so_in_one_line(
    hurt_kafka: Server, bridge: Bridge, tmp_path: Path
) -> None:
    async def refused(bootstrap: str, exit_code: int, port: int | None = None) -> str:
        other = Bridge(bootstrap, tmp_path / str(port), port=port)
        assert await other.ended() == exit_code
        assert "Traceback" not in other.said(), other.said()
        return other.said().splitlines()[-1]

    assert "Kafka cannot be reached: 127.0.0.1:1" in await refused("127.0.0.1:1", 1)
    assert str(bridge.port) in await refused(hurt_kafka.address, 2, port=bridge.port)
