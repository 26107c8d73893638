"""Snapshots of EMQX's REST API as events: complete, or never marked as completed."""

from __future__ import annotations

import asyncio

import pytest

from millpond.pipeline.brokers.emqx.exhook.translation import Translator
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.rest import client as rest_module
from millpond.pipeline.brokers.emqx.rest.client import RestClient, RestError, Unanswered
from millpond.pipeline.brokers.emqx.rest.snapshot import Snapshots
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import (
    ClientConnected,
    NodeSyncCompleted,
    NodeSyncStarted,
    SessionSubscribed,
)
from tests.support.emqx.broker import MOUNTPOINT, NODE, ORDINARY
from tests.support.emqx.rest import EmqxRest
from tests.support.emqx.trace import InMemoryProducer
from tests.support.workers import until

PARTITIONS = 3


def snapshots(
    rest: RestClient,
    durable_producer: InMemoryProducer,
    *,
    mounted: bool = True,
    interval_s: float = 300,
) -> Snapshots:
    translator = Translator(Mountpoint(MOUNTPOINT) if mounted else None)
    return Snapshots(rest, durable_producer, translator, PARTITIONS, interval_s)


def connected(durable_producer: InMemoryProducer) -> dict[str, ClientConnected]:
    return {
        event.client_id: event
        for event in durable_producer.events
        if isinstance(event, ClientConnected)
    }


def subscribed(durable_producer: InMemoryProducer) -> list[tuple[str, str, int, bool]]:
    return sorted(
        (event.client_id, event.topic_filter, event.qos, event.reachable)
        for event in durable_producer.events
        if isinstance(event, SessionSubscribed)
    )


def completed(durable_producer: InMemoryProducer) -> int:
    return sum(isinstance(event, NodeSyncCompleted) for event in durable_producer.events)


async def test_the_events_of_a_snapshot_stand_between_started_and_completed(
    server: EmqxRest, rest: RestClient
) -> None:
    durable_producer = InMemoryProducer()
    client = await server.emqx.connect("c", clean_start=False, expiry_s=3600, username="u")
    await client.subscribe("queue/#", qos=2, rh=1)
    await client.subscribe("$share/g/pubsub/a")
    await snapshots(rest, durable_producer).take()
    first, last = durable_producer.events[:PARTITIONS], durable_producer.events[-PARTITIONS:]
    partitions = [each.partition for each in durable_producer.records]
    assert partitions == [0, 1, 2, None, None, None, 0, 1, 2]
    assert all(isinstance(event, NodeSyncStarted) and event.node == NODE for event in first)
    assert all(isinstance(event, NodeSyncCompleted) and event.node == NODE for event in last)
    assert len({getattr(event, "sync_id", None) for event in (*first, *last)}) == 1
    event = connected(durable_producer)["c"]
    assert event == ClientConnected(
        at=event.at, node=NODE, client_id="c", username="u",
        connection_id=f"{NODE}/{client.peerhost}:{client.port}", connected_at=client.connected_at,
        clean_start=False, session_expiry_s=3600, told_again=True,
    )  # fmt: skip
    assert subscribed(durable_producer) == [
        ("c", "$share/g/pubsub/a", 1, True),
        ("c", "queue/#", 2, True),
    ]
    (one,) = [
        event for event in durable_producer.events
        if isinstance(event, SessionSubscribed) and event.topic_filter == "queue/#"
    ]  # fmt: skip
    assert (one.told_again, one.broker_delivers, one.retain_handling) == (True, False, 1)


async def test_a_session_without_a_connection_appears_through_its_subscriptions(
    server: EmqxRest, rest: RestClient
) -> None:
    durable_producer = InMemoryProducer()
    client = await server.emqx.connect("away", expiry_s=60)
    await client.subscribe("queue/a")
    await client.disconnect()
    await snapshots(rest, durable_producer).take()
    assert connected(durable_producer) == {}
    assert subscribed(durable_producer) == [("away", "queue/a", 1, True)]


async def test_unreachable_clients_are_marked(server: EmqxRest, rest: RestClient) -> None:
    durable_producer = InMemoryProducer()
    for name, listener in (("plain", ORDINARY), ("a/b", "tcp:mounted")):
        client = await server.emqx.connect(name, listener=listener)
        await client.subscribe("queue/a")
    await snapshots(rest, durable_producer).take()
    assert subscribed(durable_producer) == [
        ("a/b", "queue/a", 1, False),
        ("plain", "queue/a", 1, False),
    ]


async def test_without_a_mountpoint_subscriptions_are_marked_as_delivered_by_the_broker(
    server: EmqxRest, rest: RestClient
) -> None:
    durable_producer = InMemoryProducer()
    client = await server.emqx.connect("c", listener=ORDINARY)
    await client.subscribe("queue/a")
    await snapshots(rest, durable_producer, mounted=False).take()
    (one,) = [event for event in durable_producer.events if isinstance(event, SessionSubscribed)]
    assert (one.broker_delivers, one.reachable) == (True, True)


async def test_every_running_node_has_its_own_snapshot(server: EmqxRest, rest: RestClient) -> None:
    durable_producer = InMemoryProducer()
    server.emqx.nodes |= {"emqx@b": "running", "emqx@c": "stopped"}
    await snapshots(rest, durable_producer).take()
    assert {event.node for event in durable_producer.events} == {NODE, "emqx@b"}
    assert completed(durable_producer) == 2 * PARTITIONS


async def test_a_durable_session_without_a_node_is_reported(
    server: EmqxRest, rest: RestClient
) -> None:
    durable_producer = InMemoryProducer()
    server.fault(
        "/clients", 200,
        body=b'{"data":[{"clientid":"d","node":null,"connected":false,"mountpoint":"mp/d/",'
        b'"is_expired":false},{"clientid":"e","node":null,"connected":false,"is_expired":true}],'
        b'"meta":{"page":1,"limit":1000}}',
    )  # fmt: skip
    server.fault(
        "/subscriptions", 200,
        body=b'{"data":[{"clientid":"d","node":"all","topic":"mp/d/queue/a","qos":1,"durable":true},'
        b'{"clientid":"e","node":"all","topic":"x","qos":1},{"clientid":null,"topic":"y","qos":1}],'
        b'"meta":{"hasnext":false}}',
    )  # fmt: skip
    await snapshots(rest, durable_producer).take()
    assert subscribed(durable_producer) == [("d", "queue/a", 1, True)]
    assert {event.node for event in durable_producer.events} == {NODE}


async def test_a_long_list_is_read_until_it_shows_nothing_new(
    server: EmqxRest, rest: RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of the first page goes before the second page is read. So the first pass misses one row."""
    monkeypatch.setattr(rest_module, "PAGE_ROWS", 4)
    for number in range(12):
        await server.emqx.connect(f"c{number:02}")
    request = rest._request

    async def request_and_end_one(method: str, path: str, *how: object) -> object:
        answer = await request(method, path, *how)  # type: ignore[arg-type]
        if path.startswith("/clients?page=1"):
            server.emqx.sessions.pop("c00", None)
        return answer

    monkeypatch.setattr(rest, "_request", request_and_end_one)
    durable_producer = InMemoryProducer()
    await snapshots(rest, durable_producer).take()
    found = [
        event.client_id for event in durable_producer.events if isinstance(event, ClientConnected)
    ]
    assert sorted(found) == [f"c{number:02}" for number in range(12)]


@pytest.mark.parametrize("path", ["/nodes", "/clients", "/subscriptions"])
@pytest.mark.parametrize("kind", [401, 404, 429, 500, 503, "cut", 200])
async def test_a_failed_snapshot_is_never_completed(
    server: EmqxRest, rest: RestClient, path: str, kind: int | str
) -> None:
    durable_producer = InMemoryProducer()
    await server.emqx.connect("c")
    server.fault(path, kind, body=b"[garbage")
    with pytest.raises(RestError):
        await snapshots(rest, durable_producer).take()
    assert completed(durable_producer) == 0


async def test_a_snapshot_whose_events_cannot_be_stored_is_never_completed(
    server: EmqxRest, rest: RestClient
) -> None:
    durable_producer = InMemoryProducer()
    durable_producer.complaint = "the spool is full"
    with pytest.raises(MillpondError, match="the spool is full"):
        await snapshots(rest, durable_producer).take()


async def test_a_cluster_without_a_running_node_counts_as_unanswered(
    server: EmqxRest, rest: RestClient
) -> None:
    server.emqx.nodes = {NODE: "stopped"}
    with pytest.raises(Unanswered, match="no running node"):
        await snapshots(rest, InMemoryProducer()).take()


async def test_a_snapshot_is_taken_on_request_and_retried_after_a_failure(
    server: EmqxRest, rest: RestClient, caplog: pytest.LogCaptureFixture
) -> None:
    durable_producer = InMemoryProducer()
    server.fault("/nodes", 401, times=1)
    taking = snapshots(rest, durable_producer)
    running = asyncio.create_task(taking.run())

    async def first() -> bool:
        return completed(durable_producer) == PARTITIONS

    await until(first, "the first snapshot")
    assert "a snapshot failed" in caplog.text
    taking.want()

    async def second() -> bool:
        return completed(durable_producer) == 2 * PARTITIONS

    await until(second, "the second snapshot")
    running.cancel()
    await asyncio.wait((running,))


async def test_a_snapshot_is_taken_in_every_interval(server: EmqxRest, rest: RestClient) -> None:
    durable_producer = InMemoryProducer()
    running = asyncio.create_task(snapshots(rest, durable_producer, interval_s=0.1).run())

    async def several() -> bool:
        return completed(durable_producer) >= 2 * PARTITIONS

    await until(several, "two snapshots")
    running.cancel()
    await asyncio.wait((running,))
