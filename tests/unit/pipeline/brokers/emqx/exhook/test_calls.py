"""What becomes of a call: which event, which answer, and who hears of it besides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest

from millpond.pipeline.brokers.emqx.delivery.copy_topic import CopyTopic
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
from tests.support.emqx.trace import NODE, Heard, MemoryInlet, a_client, a_message, a_publish

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
        self.durable_producer, self.heard = MemoryInlet(), Heard()
        self.calls = Calls(RULES, mountpoint, RETURNING, self.durable_producer, self.heard, 3)

    async def publish(self, topic: str, **fields: Any) -> tuple[str, str | None]:
        """How a publish is answered: the kind, and the topic that it is routed to, if it is."""
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


@pytest.mark.parametrize(("topic", "kind", "routed", "kept"), PLAIN)
async def test_without_a_mountpoint_the_broker_routes_what_is_kept(
    plain: World, topic: str, kind: str, routed: str | None, kept: str | None
) -> None:
    assert await plain.publish(topic) == (kind, routed)
    topics = [
        each.topic for each in plain.durable_producer.events if isinstance(each, MessagePublished)
    ]
    assert topics == ([] if kept is None else [kept])


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
    # Nobody puts anything into the mailbox of another, whichever way.
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


@pytest.mark.parametrize(("publisher", "topic", "kind", "routed", "kept"), MOUNTED)
async def test_with_a_mountpoint_what_millpond_delivers_is_not_routed(
    mounted: World, publisher: str, topic: str, kind: str, routed: str | None, kept: str | None
) -> None:
    assert await mounted.publish(topic, from_client_id=publisher) == (kind, routed)
    found = [
        (each.topic, each.client_id)
        for each in mounted.durable_producer.events
        if isinstance(each, MessagePublished)
    ]
    assert found == ([] if kept is None else [(kept, publisher)])


# -- copies that come back


@pytest.mark.parametrize("topic", ["mp/c2/queue/t", "queue/t", "mp/c2//", "/"])
async def test_a_copy_is_routed_to_its_topic_and_reported_before(
    mounted: World, topic: str
) -> None:
    mounted.durable_producer.held = True
    publishing = asyncio.create_task(mounted.publish(copy(topic), message_id="ALIAS", qos=2))
    while not mounted.durable_producer.entered:
        await asyncio.sleep(0)
    (entered,) = mounted.durable_producer.entered
    assert (entered.topic, entered.partition) == (keys.MESSAGES_TOPIC, 3)
    assert isinstance(entered.event, DeliveriesSent)
    assert entered.event.agent == "queue"
    assert entered.event.sent == (Sent(LEASE, "c2", "m0", "ALIAS", 2),)
    assert not publishing.done()
    mounted.durable_producer.futures[0].set_result(None)
    assert await publishing == ("continue", topic)


@pytest.mark.parametrize(("qos", "lease"), [(0, LEASE), (1, ""), (0, "")])
async def test_nobody_is_told_of_a_copy_that_nobody_acknowledges_or_leased(
    mounted: World, qos: int, lease: str
) -> None:
    assert await mounted.publish(copy("mp/c2/t", lease), qos=qos) == ("continue", "mp/c2/t")
    assert mounted.durable_producer.events == []


async def test_a_copy_whose_report_is_not_kept_is_not_routed(mounted: World) -> None:
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


# -- what is not kept is not routed


@pytest.mark.parametrize("topic", ["kept/t", "queue/t"])
async def test_a_publish_that_is_not_kept_is_refused(plain: World, topic: str) -> None:
    plain.durable_producer.complaint = "the spool is full"
    assert await plain.publish(topic) == ("stop", None)
    assert plain.calls.refusals.counts == {"unkept": 1}
    assert await plain.publish("other/t") == ("ignore", "other/t")


@pytest.mark.parametrize(
    "fields",
    [{"message_id": ""}, {"message_id": "x" * 257}, {"qos": 3}, {"timestamp": 2**63}, {"node": ""}],
)
async def test_a_publish_that_cannot_be_an_event_is_refused(
    plain: World, fields: dict[str, Any]
) -> None:
    assert await plain.publish("kept/t", **fields) == ("stop", None)
    assert await plain.publish("other/t", **fields) == ("ignore", "other/t")
    assert (plain.durable_producer.events, plain.calls.refusals.counts) == ([], {"invalid": 1})


async def test_an_event_stays_when_its_caller_gives_up(plain: World) -> None:
    plain.durable_producer.held = True
    publishing = asyncio.create_task(plain.publish("kept/t"))
    while not plain.durable_producer.entered:
        await asyncio.sleep(0)
    publishing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await publishing
    assert not plain.durable_producer.futures[0].cancelled()


# -- who else hears


@pytest.mark.parametrize(
    ("topic", "asked"),
    [
        ("kept/retained", "kept/retained"), ("mp/pub/kept/retained", "kept/retained"),
        ("mp/pub/queue/cleared", "queue/cleared"), ("kept/t", None), ("queue/t", None),
    ],
)  # fmt: skip
async def test_a_publish_that_a_retain_rule_covers_is_told_of_with_the_brokers_own_topic(
    mounted: World, topic: str, asked: str | None
) -> None:
    await mounted.publish(topic)
    told = [(at, event.topic) for at, event in mounted.heard.retained]
    assert told == ([] if asked is None else [(topic, asked)])


async def test_what_was_refused_is_not_asked_for(plain: World) -> None:
    plain.durable_producer.complaint = "the spool is full"
    await plain.publish("kept/retained")
    assert plain.heard.retained == []


async def test_an_acknowledgement_is_entered_and_then_heard_of(mounted: World) -> None:
    client = a_client("c2", mountpoint="mp/c2/")
    for topic in ("mp/c2/queue/t", "mp/c2/other"):
        message = a_message(topic, "ALIAS")
        request = pb.MessageAckedRequest(clientinfo=client, message=message)
        assert mounted.calls.acked(request.SerializeToString()) == EMPTY
    (event,) = mounted.durable_producer.events
    assert isinstance(event, MessageAcked)
    assert (event.topic, event.client_id, event.message_id) == ("queue/t", "c2", "ALIAS")
    assert mounted.heard.acks == [("c2", "ALIAS"), ("c2", "ALIAS")]


async def test_a_delivery_is_entered_if_a_rule_wants_it(plain: World) -> None:
    told = plain.calls.told()["OnMessageDelivered"]
    for topic in ("seen/t", "queue/t"):
        request = pb.MessageDeliveredRequest(clientinfo=a_client(), message=a_message(topic))
        assert plain.calls.tell("OnMessageDelivered", told, request.SerializeToString()) == EMPTY
    assert [type(event) for event in plain.durable_producer.events] == [MessageDelivered]


async def test_the_node_started_and_a_snapshot_is_wanted(plain: World) -> None:
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
    assert [(each.partition, each.event) for each in plain.durable_producer.entered] == [
        (0, event), (1, event), (2, event),
    ]  # fmt: skip
    assert plain.heard.loaded == [NODE]


async def test_a_node_that_does_not_say_when_it_started_still_gets_its_hooks(plain: World) -> None:
    answer = plain.calls.provider_loaded(b"", "v1")
    assert pb.LoadedResponse.FromString(answer).hooks
    assert (plain.durable_producer.events, plain.heard.loaded) == ([], [""])


@pytest.mark.parametrize("judged", [True, False])
async def test_a_judgement_of_others_stands(plain: World, judged: bool) -> None:
    for kind in (pb.ClientAuthenticateRequest, pb.ClientAuthorizeRequest):
        answer = pb.ValuedResponse.FromString(
            plain.calls.judged(kind, kind(result=judged).SerializeToString())
        )
        assert answer.type == pb.ValuedResponse.CONTINUE
        assert (answer.WhichOneof("value"), answer.bool_result) == ("bool_result", judged)


# -- what is wrong is counted, and does not fill the log


async def test_what_is_no_event_is_counted_and_answered(plain: World) -> None:
    told = plain.calls.told()["OnSessionSubscribed"]
    request = pb.SessionSubscribedRequest(clientinfo=a_client(), topic="a/#/b")
    assert plain.calls.tell("OnSessionSubscribed", told, request.SerializeToString()) == EMPTY
    assert plain.calls.acked(b"") == EMPTY
    assert plain.calls.refusals.counts == {"invalid": 2}
    good = pb.SessionSubscribedRequest(clientinfo=a_client(), topic="a/#")
    assert plain.calls.tell("OnSessionSubscribed", told, good.SerializeToString()) == EMPTY
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
