"""What the embedded broker sees of clients, sessions and itself is in Kafka: right topic, right key, right order."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millpond.pipeline.brokers.embedded.event_producer import NEVER_EXPIRES_S
from millpond.schemas import keys
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    Event,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    NodeStarted,
    NodeStopped,
    NodeSyncCompleted,
    NodeSyncStarted,
    SessionCreated,
    SessionDiscarded,
    SessionResumed,
    SessionSubscribed,
    SessionTakenOver,
    SessionTerminated,
    SessionUnsubscribed,
)
from tests.support import given
from tests.support.embedded_bridge import NODE, Bridge, Log, reading, reason_of_end, running
from tests.support.mqtt import PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, Client, Will, delivered
from tests.support.workers import PARTITIONS

RULES = (
    given.store(),
    given.receipt("message.delivered", "receipts/#"),
    given.receipt("message.acked", "receipts/#"),
    given.command("HSET acks ${clientid} ${msgid}", "message.acked", "commands/#"),
)


pytestmark = pytest.mark.usefixtures("let_go")


@pytest.fixture(scope="module")
def bridge(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    yield from running(kafka, tmp_path_factory.mktemp("bridge"), *RULES)


async def test_a_clean_connection_is_told_from_its_beginning_to_its_end(
    bridge: Bridge, log: Log
) -> None:
    before_ms = time.time_ns() // 1_000_000
    client = await bridge.connect("clean", username="ada")
    assert not client.session_present
    await client.disconnect()
    created, connected, disconnected, terminated = await log.until_kinds(
        "clean", SessionCreated, ClientConnected, ClientDisconnected, SessionTerminated
    )
    after_ms = time.time_ns() // 1_000_000
    connection_id = f"{NODE}/{client.address}"
    for event in (created, connected, disconnected, terminated):
        assert event.node == NODE
        assert before_ms <= event.at <= after_ms
    assert isinstance(connected, ClientConnected)
    assert connected == ClientConnected(
        at=connected.at, node=NODE, client_id="clean", username="ada", connection_id=connection_id,
        connected_at=connected.connected_at, clean_start=True, session_expiry_s=0,
        protocol="MQTT 3.1.1",
    )  # fmt: skip
    assert before_ms <= connected.connected_at <= connected.at
    assert isinstance(disconnected, ClientDisconnected)
    assert (disconnected.connection_id, disconnected.reason) == (connection_id, "normal")
    assert isinstance(terminated, SessionTerminated)
    assert terminated.reason == "normal"


async def test_a_session_that_is_not_clean_is_created_once_and_resumed_after(
    bridge: Bridge, log: Log
) -> None:
    first = await bridge.connect("kept", clean=False)
    assert await first.subscribe("kept/#", 1) == 1
    await first.disconnect()
    second = await bridge.connect("kept", clean=False)
    assert second.session_present
    events = await log.until_kinds(
        "kept", SessionCreated, ClientConnected, SessionSubscribed, ClientDisconnected,
        SessionResumed, ClientConnected,
    )  # fmt: skip
    assert isinstance(events[1], ClientConnected)
    assert (events[1].clean_start, events[1].session_expiry_s) == (False, NEVER_EXPIRES_S)
    assert isinstance(events[5], ClientConnected)
    assert events[5].connection_id == f"{NODE}/{second.address}"
    # The subscription is still there.
    second.publish("kept/1", b"x", 1)
    kinds = {(await second.take() or pytest.fail("closed")).kind for _ in range(2)}
    assert kinds == {PUBLISH, PUBACK}
    await second.disconnect()


async def test_a_clean_session_is_over_with_its_connection(bridge: Bridge, log: Log) -> None:
    await (await bridge.connect("brief")).disconnect()
    again = await bridge.connect("brief", clean=False)
    assert not again.session_present
    await again.disconnect()
    await log.until_kinds(
        "brief", SessionCreated, ClientConnected, ClientDisconnected, SessionTerminated,
        SessionCreated, ClientConnected, ClientDisconnected,
    )  # fmt: skip


async def test_each_filter_is_told_with_the_qos_it_was_granted(bridge: Bridge, log: Log) -> None:
    client = await bridge.connect("sub")
    for topic_filter, qos in (("a/+/c", 2), ("queue/#", 1), ("$share/g/jobs", 0)):
        assert await client.subscribe(topic_filter, qos) == qos
    assert await client.subscribe("queue/#", 0) == 0
    for wrong in ("a/#/b", "a+", "", "nul\0"):
        assert await client.subscribe(wrong, 1) == 0x80
    assert await client.subscribe("qos/3", 3) == 0x80
    await client.unsubscribe("queue/#")
    await client.unsubscribe("never/subscribed")
    await client.disconnect()
    events = await log.until_kinds(
        "sub", SessionCreated, ClientConnected, *[SessionSubscribed] * 4, SessionUnsubscribed,
        ClientDisconnected, SessionTerminated,
    )  # fmt: skip
    subscribed: list[Any] = events[2:6]
    assert [(event.topic_filter, event.qos) for event in subscribed] == [
        ("a/+/c", 2), ("queue/#", 1), ("$share/g/jobs", 0), ("queue/#", 0),
    ]  # fmt: skip
    assert isinstance(events[6], SessionUnsubscribed)
    assert events[6].topic_filter == "queue/#"


async def test_a_client_that_vanishes_is_disconnected_with_another_reason(
    bridge: Bridge, log: Log
) -> None:
    (await bridge.connect("gone")).vanish()
    events = await log.until_kinds(
        "gone", SessionCreated, ClientConnected, ClientDisconnected, SessionTerminated
    )
    assert isinstance(events[2], ClientDisconnected)
    assert events[2].reason == "closed"


async def test_a_client_that_says_nothing_for_one_and_a_half_keep_alives_is_disconnected(
    bridge: Bridge, log: Log
) -> None:
    client = await bridge.connect("mute", keep_alive_s=1)
    started = time.monotonic()
    # A packet that never becomes whole is none.
    client.send(b"\x30\x7f")
    assert await client.closed()
    assert time.monotonic() - started > 1.3
    events = await log.until_kinds(
        "mute", SessionCreated, ClientConnected, ClientDisconnected, SessionTerminated
    )
    assert isinstance(events[2], ClientDisconnected)
    assert events[2].reason == "keepalive_timeout"


async def test_a_second_connection_of_a_client_takes_its_session_over(
    bridge: Bridge, log: Log
) -> None:
    first = await bridge.connect("twice", clean=False)
    second = await bridge.connect("twice", clean=False)
    assert second.session_present
    assert await first.closed()
    events = await log.until_kinds(
        "twice", SessionCreated, ClientConnected, ClientDisconnected, SessionTakenOver,
        SessionResumed, ClientConnected,
    )  # fmt: skip
    assert isinstance(events[2], ClientDisconnected)
    assert events[2].reason == "takenover"
    assert events[2].connection_id == f"{NODE}/{first.address}"
    assert isinstance(events[5], ClientConnected)
    assert events[5].connection_id == f"{NODE}/{second.address}"


async def test_a_clean_session_that_is_taken_over_ends_and_is_not_resumed(
    bridge: Bridge, log: Log
) -> None:
    first = await bridge.connect("mixed")
    await first.subscribe("mixed/#", 1)
    second = await bridge.connect("mixed", clean=False)
    assert not second.session_present
    await log.until_kinds(
        "mixed", SessionCreated, ClientConnected, SessionSubscribed, ClientDisconnected,
        SessionTerminated, SessionCreated, ClientConnected,
    )  # fmt: skip


async def test_a_clean_start_discards_the_session_before_connected_or_not(
    bridge: Bridge, log: Log
) -> None:
    first = await bridge.connect("fresh", clean=False)
    second = await bridge.connect("fresh")
    assert await first.closed()
    events = await log.until_kinds(
        "fresh", SessionCreated, ClientConnected, ClientDisconnected, SessionDiscarded,
        SessionCreated, ClientConnected,
    )  # fmt: skip
    assert isinstance(events[2], ClientDisconnected)
    assert events[2].reason == "discarded"
    await second.disconnect()

    await (await bridge.connect("away", clean=False)).disconnect()
    (await bridge.connect("away")).vanish()
    await log.until_kinds(
        "away", SessionCreated, ClientConnected, ClientDisconnected, SessionDiscarded,
        SessionCreated, ClientConnected, ClientDisconnected, SessionTerminated,
    )  # fmt: skip


@pytest.mark.parametrize("clean", [True, False])
async def test_of_many_connections_at_once_one_is_left_and_the_others_are_told_as_ended(
    bridge: Bridge, log: Log, clean: bool
) -> None:
    client_id = f"crowd-{clean}"
    clients = await asyncio.gather(
        *(bridge.connect(client_id, clean=clean) for _ in range(20)), return_exceptions=True
    )
    await log.until(
        lambda: log.kinds(client_id).count("ClientConnected") == 20, "twenty connections"
    )
    events = [record.event for record in log.of_client(client_id)]
    connected = [event.connection_id for event in events if isinstance(event, ClientConnected)]
    ended = [event.connection_id for event in events if isinstance(event, ClientDisconnected)]
    assert len(set(connected)) == 20
    assert connected[:-1] == ended
    left = [
        client for client in clients
        if isinstance(client, Client) and f"{NODE}/{client.address}" == connected[-1]
    ]  # fmt: skip
    assert len(left) == 1
    left[0].ping()
    assert await left[0].take() is not None


async def test_the_will_of_a_client_that_vanishes_is_published_and_of_one_that_leaves_is_not(
    bridge: Bridge, log: Log
) -> None:
    watcher = await bridge.connect("watcher")
    await watcher.subscribe("wills/#", 2)
    await watcher.subscribe("wills/low", 0)
    will = Will("wills/leaves", b"no")
    await (await bridge.connect("leaves", will=will)).disconnect()
    will = Will("wills/dies", b"\xff gone", qos=1, retain=True)
    (await bridge.connect("dies", will=will, username="bob")).vanish()
    (event,) = await log.until_published("wills/dies", 1)
    assert (event.client_id, event.username, event.qos, event.retain) == ("dies", "bob", 1, True)
    assert log.payloads("wills/dies") == [b"\xff gone"]
    assert delivered(await watcher.next(PUBLISH))[:3] == ("wills/dies", b"\xff gone", 1)
    late = await bridge.connect("late")
    assert await late.subscribe("wills/dies", 1) == 1
    assert delivered(await late.next(PUBLISH))[:3] == ("wills/dies", b"\xff gone", 1)
    assert not log.published("wills/leaves")


async def test_a_takeover_publishes_the_will_of_the_connection_that_ends(
    bridge: Bridge, log: Log
) -> None:
    first = await bridge.connect("heir", clean=False, will=Will("wills/heir", b"old"))
    second = await bridge.connect("heir", clean=False, will=Will("wills/heir", b"new"))
    assert await first.closed()
    await log.until_published("wills/heir", 1)
    assert log.payloads("wills/heir") == [b"old"]
    await second.disconnect()


async def test_a_will_that_nobody_may_publish_is_not(bridge: Bridge, log: Log) -> None:
    for client_id, topic in (("sly", "$millpond/messages"), ("slier", "wills/#")):
        (await bridge.connect(client_id, will=Will(topic, b"x", retain=True))).vanish()
        assert await reason_of_end(log, client_id) == "closed"
    end = await bridge.connect("end")
    end.publish("wills/end", b"", 1)
    await end.next(PUBACK)
    # Kafka has whatever came before that; one read of all partitions shows it.
    await log.until_published("wills/end", 1)
    assert {r.key for r in log.records if r.topic == keys.MESSAGES_TOPIC} == {"wills/end"}


async def test_deliveries_and_acknowledgements_are_told_only_where_a_rule_wants_them(
    bridge: Bridge, log: Log
) -> None:
    subscriber, publisher = await bridge.connect("reader"), await bridge.connect("writer")
    await subscriber.subscribe("+/1", 2)
    for qos, topic in itertools.product(range(3), ("receipts/1", "commands/1", "plain/1")):
        publisher.publish(topic, b"x", qos, 100)
        if qos == 2:
            await publisher.next(PUBREC)
            publisher.answer(PUBREL, 100)
            await publisher.take()
        elif qos == 1:
            await publisher.next(PUBACK)
        *_, packet_id = delivered(await subscriber.next(PUBLISH))
        if qos:
            subscriber.answer(PUBACK if qos == 1 else PUBREC, packet_id)
        if qos == 2:
            await subscriber.next(PUBREL)
            subscriber.answer(PUBCOMP, packet_id)
    await log.until(lambda: len(log.of_type(MessageAcked, "commands/1")) == 2, "acks")
    await log.until(lambda: len(log.of_type(MessageAcked, "receipts/1")) == 2, "acks")
    ids = [event.message_id for event in await log.until_published("receipts/1", 3)]
    handed = log.of_type(MessageDelivered, "receipts/1")
    acked = log.of_type(MessageAcked, "receipts/1")
    assert [(event.message_id, event.qos) for event in handed] == [*zip(ids, range(3), strict=True)]
    assert [(event.message_id, event.qos) for event in acked] == [
        *zip(ids[1:], (1, 2), strict=True)
    ]
    told: list[MessageDelivered | MessageAcked] = [*handed, *acked]
    assert {(event.client_id, event.from_client_id) for event in told} == {("reader", "writer")}
    assert not log.of_type(MessageDelivered, "commands/1")
    assert {type(record.event) for record in log.records if record.key == "plain/1"} == {
        MessagePublished
    }


async def test_ids_are_32_hex_digits_and_grow(bridge: Bridge, log: Log) -> None:
    client = await bridge.connect("ids")
    for _ in range(200):
        client.publish("ids/1", b"", 0)
    ids = [event.message_id for event in await log.until_published("ids/1", 200)]
    assert all(re.fullmatch("[0-9A-F]{32}", message_id) for message_id in ids)
    assert ids == sorted(set(ids))
    await client.disconnect()


async def test_a_start_is_told_to_every_partition_before_anything_else(bridge: Bridge) -> None:
    async with reading(bridge.bootstrap, from_start=True) as log:

        def told(number: int) -> list[Any]:
            return [
                record.event for record in log.records
                if (record.topic, record.partition) == (keys.CLIENTS_TOPIC, number)
            ]  # fmt: skip

        await log.until(lambda: all(len(told(n)) >= 3 for n in range(PARTITIONS)), "the start")
        for number in range(PARTITIONS):
            events = told(number)[:3]
            assert [type(event) for event in events] == [
                NodeStarted, NodeSyncStarted, NodeSyncCompleted,
            ]  # fmt: skip
            assert {event.node for event in events} == {NODE}
            assert events[1].sync_id == events[2].sync_id


async def test_a_snapshot_tells_who_is_connected_and_sigterm_ends_it_all(
    bridge: Bridge, log: Log, tmp_path: Path
) -> None:
    # Given a bridge with one client connected and one whose session waits
    other = Bridge(bridge.bootstrap, tmp_path, sync_interval_s=1).until_ready()
    try:
        here = await other.connect("here", clean=False)
        await here.subscribe("here/#", 1)
        waiting = await other.connect("waiting", clean=False)
        await waiting.subscribe("waiting/#", 0)
        await waiting.disconnect()
        await (await other.connect("over")).disconnect()
        await log.until(lambda: "SessionTerminated" in log.kinds("over"), "the end of `over`")
        # When it tells a snapshot
        seen = len(log.records)

        def told() -> list[Event]:
            return [record.event for record in log.records[seen:]]

        await log.until(
            lambda: sum(isinstance(event, NodeSyncCompleted) for event in told()) >= 2 * PARTITIONS,
            "two snapshots",
        )
        # Then it has whom there is, and nothing of whom there is not
        connected = {event.client_id for event in told() if isinstance(event, ClientConnected)}
        subscribed = {event.client_id for event in told() if isinstance(event, SessionSubscribed)}
        assert (connected, subscribed) == ({"here"}, {"here", "waiting"})

        # When it is asked to end, Then its clients are told as disconnected, and last of all the node as stopped
        await other.open()  # and says nothing
        other.signal(signal.SIGTERM)
        assert await other.ended() == 0, other.said()
        assert await here.closed()
        await log.until(
            lambda: sum(isinstance(event, NodeStopped) for event in told()) == PARTITIONS, "the end"
        )
        last = {record.partition: record.event for record in log.records[seen:]}
        assert {type(event) for event in last.values()} == {NodeStopped}
        (gone,) = [event for event in told() if isinstance(event, ClientDisconnected)]
        assert (gone.client_id, gone.reason) == ("here", "server_shutdown")
        assert "Traceback" not in other.said()
    finally:
        other.let_go()
        other.kill()
