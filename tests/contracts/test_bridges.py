"""The contract of bridges: the embedded bridge and the EMQX bridge pass the same cases."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    MembersActive,
    SessionCreated,
    SessionResumed,
    SessionSubscribed,
    SessionTakenOver,
    SessionTerminated,
    SessionUnsubscribed,
)
from millpond.schemas.leases import LeaseName
from tests.contracts.bridges import Played, an_emqx, embedded
from tests.support import given
from tests.support.embedded_bridge import running

pytestmark = pytest.mark.asyncio(loop_scope="module")
RULES = (given.store(), given.queue("queue/#"), given.queue("active/#", ack_timeout_s=1))
BINARY = bytes(range(256))


Opening = contextlib.AbstractAsyncContextManager[Played]


@pytest.fixture(scope="module", params=["embedded", "emqx"])
def opening(
    request: pytest.FixtureRequest, kafka: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opening]:
    """Each kind of bridge in turn."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        for bridge in running(kafka, directory, *RULES):
            yield embedded(bridge)
    else:
        redis = request.getfixturevalue("redis_server")
        yield an_emqx("contract", kafka, redis, directory, *RULES)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def played(opening: Opening) -> AsyncIterator[Played]:
    """One bridge for all cases. The clients of each case have names of their own."""
    async with opening as played:
        yield played


async def test_the_events_of_a_clients_life_are_in_order(played: Played) -> None:
    client = await played.connect("life")
    await client.subscribe("plain/+", 1)
    await client.unsubscribe("plain/+")
    await client.disconnect()
    log = played.log
    await log.until(lambda: SessionTerminated.__name__ in log.kinds("life"), "the session's end")
    # A snapshot on its way may repeat some
    events = [record.event for record in log.of_client("life")]
    first_told = [event for event in events if not getattr(event, "told_again", False)]
    assert [type(event) for event in first_told] == [
        SessionCreated, ClientConnected, SessionSubscribed, SessionUnsubscribed,
        ClientDisconnected, SessionTerminated,
    ]  # fmt: skip
    created, connected, subscribed, unsubscribed, disconnected, _ = first_told
    assert isinstance(created, SessionCreated)
    assert isinstance(connected, ClientConnected)
    assert isinstance(disconnected, ClientDisconnected)
    assert connected.connection_id == disconnected.connection_id
    assert disconnected.reason == "normal"
    assert isinstance(subscribed, SessionSubscribed)
    assert isinstance(unsubscribed, SessionUnsubscribed)
    assert (subscribed.topic_filter, subscribed.qos) == ("plain/+", 1)
    assert (subscribed.reachable, subscribed.broker_delivers) == (True, False)
    assert unsubscribed.topic_filter == "plain/+"
    assert {created.node, connected.node, disconnected.node} == {connected.node}


async def test_a_session_continues_with_the_next_connection(played: Played) -> None:
    first = await played.connect("resumes", clean=False)
    await first.subscribe("queue/resumes")
    await first.disconnect()
    await played.connect("resumes", clean=False)
    log = played.log
    await log.until(lambda: log.kinds("resumes").count("ClientConnected") == 2, "both connects")
    kinds = log.kinds("resumes")
    assert kinds.count(SessionResumed.__name__) == 1
    assert SessionTerminated.__name__ not in kinds
    assert kinds.index(SessionResumed.__name__) > kinds.index(ClientDisconnected.__name__)


async def test_a_connection_that_is_taken_over_ends_and_its_session_does_not(
    played: Played,
) -> None:
    await played.connect("taken", clean=False)
    await played.connect("taken", clean=False)
    log = played.log
    await log.until(lambda: log.kinds("taken").count("ClientConnected") == 2, "both connects")
    await log.until(lambda: SessionTakenOver.__name__ in log.kinds("taken"), "a takeover")
    first, second = log.of_type(ClientConnected, "taken")
    (ended,) = log.of_type(ClientDisconnected, "taken")
    assert (ended.connection_id, ended.reason) == (first.connection_id, "takenover")
    assert first.connection_id != second.connection_id
    assert SessionTerminated.__name__ not in log.kinds("taken")


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("topic", ["plain/published", "queue/published"])
async def test_a_publish_becomes_one_unchanged_event(played: Played, topic: str, qos: int) -> None:
    client = await played.connect(f"publisher-{topic[:5]}{qos}")
    name = f"{topic}/{qos}"
    await client.publish(name, BINARY, qos)
    (event,) = await played.log.until_published(name, 1)
    assert played.log.payloads(name) == [BINARY]
    assert (event.qos, event.client_id) == (qos, client.client_id)
    assert len(event.message_id) == 32
    await client.disconnect()


async def test_topics_with_a_delivery_rule_are_not_routed(played: Played) -> None:
    client = await played.connect("unrouted")
    await client.subscribe("queue/#")
    await client.publish("queue/unrouted", b"to Millpond alone")
    await played.log.until_published("queue/unrouted", 1)
    await played.commands.deliver("unrouted", 7)
    assert await client.copies(1) == [("queue/unrouted", b"7")]


async def test_clients_cannot_publish_below_reserved_topics(played: Played) -> None:
    client = await played.connect("sly")
    # EMQX refuses the publish, the embedded broker closes the connection.
    with contextlib.suppress(ConnectionError):
        await client.publish("$millpond/queue", b"x")
    other = await played.connect("after")
    await other.publish("plain/after", b"x")
    await played.log.until_published("plain/after", 1)
    assert not [record for record in played.log.records if record.key.startswith("$millpond/queue")
                and type(record.event).__name__ == "MessagePublished"]  # fmt: skip


# -- deliveries


async def test_copies_arrive_in_order_and_sent_precedes_acknowledged(
    played: Played,
) -> None:
    client, count = await played.connect("ordered"), 250
    await client.subscribe("queue/ordered")
    await played.commands.deliver("ordered", *range(count))
    wanted = [("queue/ordered", str(number).encode()) for number in range(count)]
    assert await client.copies(count) == wanted
    names = [f"m{number}" for number in range(count)]
    await played.log.until(lambda: len(played.acked("ordered")) == count, "all acknowledged")
    assert played.acked("ordered") == names
    assert [each.message_id for each in played.sent("ordered")] == names
    assert played.failed("ordered") == []
    seen: set[str | None] = set()
    for record in played.log.records:
        match type(record.event).__name__:
            case "DeliveriesSent":
                seen |= {each.alias or each.message_id for each in record.event.sent}  # type: ignore[union-attr]
            case "MessageAcked" if record.event.client_id == "ordered":  # type: ignore[union-attr]
                assert record.event.message_id in seen  # type: ignore[union-attr]


async def test_a_copy_of_qos_0_is_reported_as_sent(played: Played) -> None:
    client = await played.connect("qos-0")
    await client.subscribe("queue/qos-0", 0)
    await played.commands.deliver("qos-0", 1, qos=0)
    assert await client.copies(1) == [("queue/qos-0", b"1")]
    await played.log.until(lambda: played.sent("qos-0"), "a report")
    assert [each.qos for each in played.sent("qos-0")] == [0]
    assert played.acked("qos-0") == []


async def test_a_client_that_is_busy_with_other_partitions_is_reported_as_active(
    played: Played,
) -> None:
    client = await played.connect("busy", answers=False)
    await client.subscribe("active/#")
    for number in range(4):
        lease = str(LeaseName("queue", number % 2, number))
        await played.commands.deliver("busy", number, topic=f"active/{number}", lease=lease)
    await client.copies(4)

    def active() -> list[tuple[str, int]]:
        return [
            (record.event.agent, record.partition)
            for record in played.log.records
            if isinstance(record.event, MembersActive) and "busy" in record.event.client_ids
        ]

    await client.ack(b"0")
    await played.log.until(active, "the first report")
    assert active() == [("queue", 1)]
    await client.ack(b"1")
    await played.log.until(lambda: len(active()) == 2, "the second report")
    assert active()[1] == ("queue", 0)
    await client.ack(b"2")
    await client.ack(b"3")
    await played.log.until(lambda: len(played.acked("busy")) == 4, "all acknowledged")
    await client.disconnect()


async def test_a_copy_for_an_offline_client_fails(played: Played) -> None:
    await played.commands.deliver("nobody", 1)
    await played.log.until(lambda: played.failed("nobody"), "a failure")
    assert played.failed("nobody") == [("m1", "no_client")]


async def test_later_commands_of_a_failed_epoch_fail(played: Played) -> None:
    client = await played.connect("epochs")
    await client.subscribe("queue/epochs")
    await played.commands.deliver("epochs", 1, expires_at=1)
    await played.log.until(lambda: played.failed("epochs"), "a failure")
    await played.commands.deliver("epochs", 2)
    await played.commands.deliver("epochs", 3, epoch=2)
    assert await client.copies(1) == [("queue/epochs", b"3")]
    await played.log.until(lambda: len(played.failed("epochs")) == 2, "both failures")
    assert played.failed("epochs") == [("m1", "stale"), ("m2", "stale")]


async def test_a_client_is_subscribed_and_unsubscribed_by_command(played: Played) -> None:
    client = await played.connect("proxied")
    await played.commands.subscribe("proxied", "queue/proxied")
    log = played.log
    await log.until(lambda: log.of_type(SessionSubscribed, "proxied"), "a subscription")
    (event,) = log.of_type(SessionSubscribed, "proxied")
    assert (event.topic_filter, event.qos) == ("queue/proxied", 1)
    await played.commands.deliver("proxied", 5)
    assert await client.copies(1) == [("queue/proxied", b"5")]
