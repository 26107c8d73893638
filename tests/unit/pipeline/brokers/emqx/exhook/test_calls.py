"""The handling of a call: its event, its answer, and what it causes in the rest of the bridge."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest

from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.calls import EMPTY, Calls
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.schemas import keys
from millpond.schemas.events import (
    DeliveriesSent,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    NodeStarted,
    Sent,
    SessionSubscribed,
)
from tests.support import given
from tests.support.emqx.trace import NODE, Heard, InMemoryProducer, a_client, a_message, a_publish

RULES = given.rules(
    given.queue("queue/#"), given.pubsub("pubsub/#"), given.store("kept/#"),
    given.retain("kept/retained"), given.clear_retained("queue/cleared"),
    given.receipt("message.delivered", "seen/#"),
)  # fmt: skip
MOUNTPOINT = Mountpoint("mp/${clientid}/")
RETURNING = CopyTopic("secret")
LEASE = "queue/3/17"


class World:
    def __init__(self, mountpoint: Mountpoint | None) -> None:
        self.durable_producer, self.heard = InMemoryProducer(), Heard()
        self.calls = Calls(
            RULES, mountpoint, RETURNING, self.durable_producer, self.heard.listener, 3
        )

    async def publish(self, topic: str, **fields: Any) -> tuple[str, str | None]:
        """The answer to a publish: its kind, and the topic that EMQX routes to, or None."""
        request = a_publish(topic, **fields)
        answer = pb.ValuedResponse.FromString(await self.calls.publish(request))
        if answer.type == pb.ValuedResponse.IGNORE:
            return "ignore", topic
        sent = pb.MessagePublishRequest.FromString(request).message
        assert (answer.message.payload, answer.message.qos) == (sent.payload, sent.qos)
        routed = answer.message.headers.get("allow_publish") != "false"
        kind = "stop" if answer.type == pb.ValuedResponse.STOP_AND_RETURN else "continue"
        return kind, answer.message.topic if routed else None


@pytest.fixture
async def plain() -> World:
    return World(None)


@pytest.fixture
async def mounted() -> World:
    return World(MOUNTPOINT)


def copy(topic: str, lease: str = LEASE) -> str:
    return RETURNING.topic_for(lease, "c2", "m0", topic)


# -- publishes without a mountpoint: topic, answer, the topic of the event


PLAIN = [
    ("queue/t", "ignore", "queue/t", "queue/t"),
    ("kept/t", "ignore", "kept/t", "kept/t"),
    ("other/t", "ignore", "other/t", None),
    ("mp/pub/queue/t", "ignore", "mp/pub/queue/t", None),
    ("$millpond/queue", "stop", None, None),
    ("$millpond/d/0123456789abcdef/queue%2F3%2F17/c2/m0/queue/t", "stop", None, None),
]


@pytest.mark.parametrize(("topic", "kind", "routed", "stored"), PLAIN)
async def test_without_a_mountpoint_the_broker_routes_what_is_stored(
    plain: World, topic: str, kind: str, routed: str | None, stored: str | None
) -> None:
    assert await plain.publish(topic) == (kind, routed)
    topics = [
        each.topic for each in plain.durable_producer.events if isinstance(each, MessagePublished)
    ]
    assert topics == ([] if stored is None else [stored])


# -- and with one: publisher, topic, answer, the topic of the event

MOUNTED = [
    ("pub", "queue/t", "continue", None, "queue/t"),
    ("pub", "mp/pub/queue/t", "continue", None, "queue/t"),
    ("pub", "mp/pub/pubsub/t", "continue", None, "pubsub/t"),
    ("pub", "mp/pub/kept/t", "continue", "kept/t", "kept/t"),
    ("pub", "mp/pub/other/t", "continue", "other/t", None),
    ("pub", "kept/t", "ignore", "kept/t", "kept/t"),
    ("pub", "other/t", "ignore", "other/t", None),
    ("http_api", "queue/t", "continue", None, "queue/t"),
    ("a/b", "mp/a/b/queue/t", "continue", None, "queue/t"),
    ("a", "mp/a/b/kept/t", "continue", "b/kept/t", None),
    # No client can publish below the mountpoint of another one.
    ("pub", "mp/c2/queue/t", "stop", None, None),
    ("http_api", "mp/c2/queue/t", "stop", None, None),
    ("pub", "mp/pub/mp/c2/queue/t", "stop", None, None),
    ("pub", "mp/pub/mp/pub/queue/t", "stop", None, None),
    ("pub", "mp/pub/", "stop", None, None),
    ("pub", "mp/", "stop", None, None),
    ("pub", "mp/pub/$millpond/queue", "stop", None, None),
    ("pub", f"mp/pub/{copy('mp/c2/queue/t')}", "stop", None, None),
    ("http_api", "$millpond/d/0123456789abcdef/queue%2F3%2F17/c2/m0/mp/c2/queue/t", "stop", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("publisher", "topic", "kind", "routed", "stored"), MOUNTED)
async def test_with_a_mountpoint_what_millpond_delivers_is_not_routed(
    mounted: World, publisher: str, topic: str, kind: str, routed: str | None, stored: str | None
) -> None:
    assert await mounted.publish(topic, from_client_id=publisher) == (kind, routed)
    found = [
        (each.topic, each.client_id)
        for each in mounted.durable_producer.events
        if isinstance(each, MessagePublished)
    ]
    assert found == ([] if stored is None else [(stored, publisher)])


# -- the hooks of copies


@pytest.mark.parametrize("topic", ["mp/c2/queue/t", "queue/t", "mp/c2//", "/"])
async def test_a_copy_is_reported_and_then_routed_to_its_topic(mounted: World, topic: str) -> None:
    mounted.durable_producer.paused = True
    publishing = asyncio.create_task(mounted.publish(copy(topic), message_id="ALIAS", qos=2))
    while not mounted.durable_producer.records:
        await asyncio.sleep(0)
    (entered,) = mounted.durable_producer.records
    assert (entered.topic, entered.partition) == (keys.MESSAGES_TOPIC, 3)
    assert isinstance(entered.event, DeliveriesSent)
    assert entered.event.agent == "queue"
    assert entered.event.sent == (Sent(LEASE, "c2", "m0", "ALIAS", 2),)
    assert not publishing.done()
    mounted.durable_producer.futures[0].set_result(None)
    assert await publishing == ("continue", topic)


@pytest.mark.parametrize(("qos", "lease"), [(0, LEASE), (1, ""), (0, "")])
async def test_a_copy_of_qos_0_or_without_a_lease_is_not_reported(
    mounted: World, qos: int, lease: str
) -> None:
    assert await mounted.publish(copy("mp/c2/t", lease), qos=qos) == ("continue", "mp/c2/t")
    assert mounted.durable_producer.events == []


async def test_a_copy_whose_report_is_not_stored_is_not_routed(mounted: World) -> None:
    mounted.durable_producer.complaint = "the spool is full"
    assert await mounted.publish(copy("mp/c2/queue/t")) == ("stop", None)
    assert mounted.calls.refusals.counts == {"unkept": 1}


@pytest.mark.parametrize(
    ("lease", "fields"), [("queue", {}), (LEASE, {"message_id": ""}), (LEASE, {"qos": 3})]
)
async def test_a_copy_that_cannot_be_reported_is_not_routed(
    mounted: World, lease: str, fields: dict[str, Any]
) -> None:
    assert await mounted.publish(copy("mp/c2/queue/t", lease), **fields) == ("stop", None)
    assert mounted.calls.refusals.counts == {"invalid": 1}


# -- events that are not stored


@pytest.mark.parametrize("topic", ["kept/t", "queue/t"])
async def test_a_publish_that_is_not_stored_is_refused(plain: World, topic: str) -> None:
    plain.durable_producer.complaint = "the spool is full"
    assert await plain.publish(topic) == ("stop", None)
    assert plain.calls.refusals.counts == {"unkept": 1}
    assert await plain.publish("other/t") == ("ignore", "other/t")


@pytest.mark.parametrize(
    "fields",
    [{"message_id": ""}, {"message_id": "x" * 257}, {"qos": 3}, {"timestamp": 2**63}, {"node": ""}],
)
async def test_a_publish_with_an_invalid_field_is_refused(
    plain: World, fields: dict[str, Any]
) -> None:
    assert await plain.publish("kept/t", **fields) == ("stop", None)
    assert await plain.publish("other/t", **fields) == ("ignore", "other/t")
    assert (plain.durable_producer.events, plain.calls.refusals.counts) == ([], {"invalid": 1})


async def test_a_cancelled_call_does_not_cancel_its_event(plain: World) -> None:
    plain.durable_producer.paused = True
    publishing = asyncio.create_task(plain.publish("kept/t"))
    while not plain.durable_producer.records:
        await asyncio.sleep(0)
    publishing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await publishing
    assert not plain.durable_producer.futures[0].cancelled()


# -- effects in the rest of the bridge


@pytest.mark.parametrize(
    ("topic", "asked"),
    [
        ("kept/retained", "kept/retained"), ("mp/pub/kept/retained", "kept/retained"),
        ("mp/pub/queue/cleared", "queue/cleared"), ("kept/t", None), ("queue/t", None),
    ],
)  # fmt: skip
async def test_a_publish_of_a_retain_rule_is_looked_up_at_the_topic_with_the_mountpoint(
    mounted: World, topic: str, asked: str | None
) -> None:
    await mounted.publish(topic)
    retained = [(at, event.topic) for at, event in mounted.heard.retained]
    assert retained == ([] if asked is None else [(topic, asked)])


async def test_a_refused_publish_is_not_looked_up(plain: World) -> None:
    plain.durable_producer.complaint = "the spool is full"
    await plain.publish("kept/retained")
    assert plain.heard.retained == []


async def test_an_acknowledgement_is_entered_and_then_passed_on(mounted: World) -> None:
    client = a_client("c2", mountpoint="mp/c2/")
    for topic in ("mp/c2/queue/t", "mp/c2/other"):
        message = a_message(topic, "ALIAS")
        request = pb.MessageAckedRequest(clientinfo=client, message=message)
        assert mounted.calls.acked(request.SerializeToString()) == EMPTY
    (event,) = mounted.durable_producer.events
    assert isinstance(event, MessageAcked)
    assert (event.topic, event.client_id, event.message_id) == ("queue/t", "c2", "ALIAS")
    assert mounted.heard.acks == [("c2", "ALIAS"), ("c2", "ALIAS")]


async def test_a_delivery_is_entered_if_a_rule_needs_it(plain: World) -> None:
    notification = plain.calls.notifications()["OnMessageDelivered"]
    for topic in ("seen/t", "queue/t"):
        request = pb.MessageDeliveredRequest(clientinfo=a_client(), message=a_message(topic))
        data = request.SerializeToString()
        assert plain.calls.notify("OnMessageDelivered", notification, data) == EMPTY
    assert [type(event) for event in plain.durable_producer.events] == [MessageDelivered]


async def test_a_loaded_provider_starts_its_node_and_wants_a_snapshot(plain: World) -> None:
    broker = pb.BrokerInfo(datetime="2026-11-23T03:06:36+00:00", uptime=1_000)
    request = pb.ProviderLoadedRequest(broker=broker, meta=pb.RequestMeta(node=NODE))
    answer = plain.calls.provider_loaded(request.SerializeToString(), "v2")
    hooks = pb.LoadedResponse.FromString(answer).hooks
    assert {hook.name: list(hook.topics) for hook in hooks if hook.topics} == {
        "message.publish": ["kept/#", "queue/#", "pubsub/#", "$millpond/#"],
        "message.delivered": ["seen/#"],
        "message.acked": ["queue/#", "pubsub/#"],
    }
    event = NodeStarted(at=1_795_403_195_000, node=NODE)
    assert [(each.partition, each.event) for each in plain.durable_producer.records] == [
        (0, event), (1, event), (2, event),
    ]  # fmt: skip
    assert plain.heard.loaded == [NODE]


async def test_a_node_without_a_boot_time_gets_its_hooks(plain: World) -> None:
    answer = plain.calls.provider_loaded(b"", "v1")
    assert pb.LoadedResponse.FromString(answer).hooks
    assert (plain.durable_producer.events, plain.heard.loaded) == ([], [""])


@pytest.mark.parametrize("allowed", [True, False])
async def test_an_access_check_is_answered_with_its_own_result(plain: World, allowed: bool) -> None:
    for kind in (pb.ClientAuthenticateRequest, pb.ClientAuthorizeRequest):
        answer = pb.ValuedResponse.FromString(
            plain.calls.access_checked(kind, kind(result=allowed).SerializeToString())
        )
        assert answer.type == pb.ValuedResponse.CONTINUE
        assert (answer.WhichOneof("value"), answer.bool_result) == ("bool_result", allowed)


# -- refusals are counted, and do not fill the log


async def test_an_invalid_notification_is_counted_and_answered(plain: World) -> None:
    notification = plain.calls.notifications()["OnSessionSubscribed"]
    request = pb.SessionSubscribedRequest(clientinfo=a_client(), topic="a/#/b")
    data = request.SerializeToString()
    assert plain.calls.notify("OnSessionSubscribed", notification, data) == EMPTY
    assert plain.calls.acked(b"") == EMPTY
    assert plain.calls.refusals.counts == {"invalid": 2}
    good = pb.SessionSubscribedRequest(clientinfo=a_client(), topic="a/#")
    data = good.SerializeToString()
    assert plain.calls.notify("OnSessionSubscribed", notification, data) == EMPTY
    assert [type(event) for event in plain.durable_producer.events] == [SessionSubscribed]


async def test_a_flood_of_refusals_is_one_line_without_payloads(
    plain: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(1_000):
            await plain.publish("$millpond/" + "x" * 5_000, payload=b"a secret")
    assert plain.calls.refusals.counts == {"reserved": 1_000}
    assert len(caplog.records) <= 5  # one in a second
    assert "a secret" not in caplog.text
    assert len(caplog.records[0].getMessage()) < 500
