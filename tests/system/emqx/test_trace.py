"""The trace of a real EMQX, sent with the call names of each version, has the events and keys that a reader expects.

The expected events were written down from the trace, call by call. The numbers in comments are those of its calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from millpond.pipeline.brokers.emqx.exhook.hooks import Version
from millpond.schemas import codec, keys
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    Event,
    Message,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    NodeStarted,
    SessionCreated,
    SessionDiscarded,
    SessionResumed,
    SessionSubscribed,
    SessionTakenOver,
    SessionTerminated,
    SessionUnsubscribed,
)
from tests.support import given
from tests.support.embedded_bridge import Log, reading
from tests.support.emqx.trace import NODE, trace
from tests.support.exhook_server import serving
from tests.support.workers import PARTITIONS, Pipeline, running

RULES = (
    given.a_rule(hook="client.connected", action="on_client_connected"),
    given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
    given.command("HSET subscribed:${clientid} ${topic} ${qos}", "session.subscribed"),
    given.command("HSET unsubscribed ${clientid} ${topic}", "session.unsubscribed"),
    given.queue("q2/#"),
    given.queue("off/#"),
    given.queue("nobody/#"),
    given.store("#"),
    given.receipt("message.delivered", "t/#"),
    given.receipt("message.acked", "t/#"),
)
SETTLE_S = 60.0
BOOTED_AT = 1_795_403_182_463  # 2026-11-23T03:06:36.021 (call 1), less 13.558 s


# -- expected events: clients


def connected(client_id: str, port: int) -> ClientConnected:
    return ClientConnected(
        at=0, node=NODE, client_id=client_id, username=f"u-{client_id}", connected_at=0,
        connection_id=f"emqx@127.0.0.1/127.0.0.1:{port}", protocol="MQTT",
    )  # fmt: skip


def disconnected(client_id: str, port: int, reason: str) -> ClientDisconnected:
    return ClientDisconnected(
        at=0, node=NODE, client_id=client_id, reason=reason,
        connection_id=f"emqx@127.0.0.1/127.0.0.1:{port}",
    )  # fmt: skip


def subscribed(client_id: str, topic_filter: str, qos: int) -> SessionSubscribed:
    return SessionSubscribed(
        at=0, node=NODE, client_id=client_id, topic_filter=topic_filter, qos=qos,
        broker_delivers=True,
    )  # fmt: skip


def of(kind: Any, client_id: str, **fields: Any) -> Event:
    event: Event = kind(at=0, node=NODE, client_id=client_id, **fields)
    return event


CLIENTS: dict[str, list[Event]] = {
    "sub-a": [
        of(SessionCreated, "sub-a"),  # 4
        connected("sub-a", 41177),  # 5
        subscribed("sub-a", "t/+", 1),  # 10
        subscribed("sub-a", "q2/#", 2),  # 11
        of(SessionUnsubscribed, "sub-a", topic_filter="t/+"),  # 62
        disconnected("sub-a", 41177, "normal"),  # 146
        of(SessionTerminated, "sub-a", reason="normal"),  # 147
    ],
    "pub-p": [
        of(SessionCreated, "pub-p"),  # 14
        connected("pub-p", 39111),  # 15
        disconnected("pub-p", 39111, "normal"),  # 148
        of(SessionTerminated, "pub-p", reason="normal"),  # 149
    ],
    "sub-b": [
        of(SessionCreated, "sub-b"),  # 41
        connected("sub-b", 50131),  # 42
        subscribed("sub-b", "t/ret", 1),  # 46
        subscribed("sub-b", "api/+", 1),  # 139, through REST
        of(SessionUnsubscribed, "sub-b", topic_filter="api/+"),  # 143
        disconnected("sub-b", 50131, "kicked"),  # 144
        of(SessionTerminated, "sub-b", reason="kicked"),  # 145
    ],
    "shr-1": [
        of(SessionCreated, "shr-1"),  # 51
        connected("shr-1", 57937),  # 52
        subscribed("shr-1", "$share/g/sh/1", 1),  # 56
        disconnected("shr-1", 57937, "normal"),  # 150
        of(SessionTerminated, "shr-1", reason="normal"),  # 151
    ],
    "tk": [  # is taken over, and then started clean
        of(SessionCreated, "tk"),  # 69
        connected("tk", 60137),  # 70
        subscribed("tk", "tk/#", 1),  # 74
        of(SessionResumed, "tk"),  # 77
        disconnected("tk", 60137, "takenover"),  # 78
        connected("tk", 49505),  # 79
        of(SessionTakenOver, "tk"),  # 80
        disconnected("tk", 49505, "discarded"),  # 84
        of(SessionDiscarded, "tk"),  # 85
        of(SessionCreated, "tk"),  # 86
        connected("tk", 50123),  # 87
        disconnected("tk", 50123, "normal"),  # 89
        of(SessionTerminated, "tk", reason="normal"),  # 90
    ],
    "per-c": [  # is away, comes back to its session, is away, starts clean
        of(SessionCreated, "per-c"),  # 93
        connected("per-c", 45257),  # 94
        subscribed("per-c", "off/#", 1),  # 98
        disconnected("per-c", 45257, "normal"),  # 99
        of(SessionResumed, "per-c"),  # 104
        disconnected("per-c", 45257, "takenover"),  # 105
        of(SessionTakenOver, "per-c"),  # 106
        connected("per-c", 38975),  # 107
        disconnected("per-c", 38975, "normal"),  # 111
        disconnected("per-c", 38975, "discarded"),  # 114
        of(SessionDiscarded, "per-c"),  # 115
        of(SessionCreated, "per-c"),  # 116
        connected("per-c", 49965),  # 117
        disconnected("per-c", 49965, "normal"),  # 119
        of(SessionTerminated, "per-c", reason="normal"),  # 120
    ],
    "wil-w": [  # with a will
        of(SessionCreated, "wil-w"),  # 123
        connected("wil-w", 49707),  # 124
        disconnected("wil-w", 49707, "tcp_closed"),  # 129
        of(SessionTerminated, "wil-w", reason="tcp_closed"),  # 130
    ],
}

# -- expected events: messages

Q0, Q1, Q2 = (f"000660E8E1F8{rest}" for rest in ("04B9F443000004050002", "B016F443000004050003", "C1C8F443000004050004"))  # fmt: skip
EXACT, DROPPED, KEPT = (f"000660E8E1F8{rest}" for rest in ("D2D1F443000004050005", "EDA7F443000004050006", "FCDEF443000004050007"))  # fmt: skip
SHARED, BINARY = "000660E8E2027FF8F443000004050008", "000660E8E20A3539F443000004050009"
QUEUED, WILL = "000660E8E2359924F44300000405000A", "000660E8E246BB99F443000004260000"
REST, BULK_1, BULK_2 = "000660E8E2561927F4430000042A0000", "000660E8E2562F06F4430000042B0000", "000660E8E2562F18F4430000042B0001"  # fmt: skip
FOR_B = "000660E8E256847CF443000004300000"


def published(
    message_id: str, topic: str, qos: int, payload: str, at: int, client_id: str = "pub-p"
) -> MessagePublished:
    username = None if client_id == "http_api" else f"u-{client_id}"
    return MessagePublished(
        at=at, node=NODE, message_id=message_id, topic=topic, qos=qos, retain=False,
        client_id=client_id, username=username, payload=payload, published_at=at,
    )  # fmt: skip


def got(kind: Any, message_id: str, topic: str, qos: int, client_id: str = "sub-a", publisher: str = "pub-p") -> Event:  # fmt: skip
    marks = {"broker_delivers": True} if kind is MessageAcked else {}
    return of(
        kind, client_id, message_id=message_id, topic=topic, qos=qos, from_client_id=publisher,
        **marks,
    )  # fmt: skip


ALL_BYTES = structs.replace(
    published(BINARY, "q2/bin", 1, "", 1_795_403_201_262),
    payload_encoding="base64",
    payload=codec.payload_text(bytes(range(256)))[0],
)
MESSAGES: dict[str, list[Event]] = {
    "t/x": [
        published(Q0, "t/x", 0, "hello-q0", 1_795_403_200_070),  # 18
        got(MessageDelivered, Q0, "t/x", 0),  # 19
        published(Q1, "t/x", 1, "hello-q1", 1_795_403_200_114),  # 21
        got(MessageDelivered, Q1, "t/x", 1),  # 22
        got(MessageAcked, Q1, "t/x", 1),  # 24
        published(Q2, "t/x", 2, "hello-q2", 1_795_403_200_119),  # 25
        got(MessageDelivered, Q2, "t/x", 1),  # 26
        got(MessageAcked, Q2, "t/x", 1),  # 28
    ],
    "q2/x": [
        published(EXACT, "q2/x", 2, "exactly-once", 1_795_403_200_123),  # 29
        got(MessageAcked, EXACT, "q2/x", 2),  # 31
    ],
    "nobody/here": [published(DROPPED, "nobody/here", 1, "dropped", 1_795_403_200_130)],  # 33
    "t/ret": [
        published(KEPT, "t/ret", 1, "kept", 1_795_403_200_134),  # 36
        got(MessageDelivered, KEPT, "t/ret", 1),  # 37
        got(MessageAcked, KEPT, "t/ret", 1),  # 40
        got(MessageDelivered, KEPT, "t/ret", 1, "sub-b"),  # 47, retained
        got(MessageAcked, KEPT, "t/ret", 1, "sub-b"),  # 48
    ],
    "sh/1": [published(SHARED, "sh/1", 1, "s", 1_795_403_200_757)],  # 58
    "q2/bin": [ALL_BYTES, got(MessageAcked, BINARY, "q2/bin", 1)],  # 64, 67
    "off/1": [
        published(QUEUED, "off/1", 1, "queued", 1_795_403_204_106),  # 101
        got(MessageAcked, QUEUED, "off/1", 1, "per-c"),  # 110
    ],
    "t/will": [published(WILL, "t/will", 1, "gone", 1_795_403_205_233, "wil-w")],  # 127
    "q2/rest": [
        published(REST, "q2/rest", 1, "from-rest", 1_795_403_206_236, "http_api"),  # 131
        published(BULK_1, "q2/rest", 1, "b1", 1_795_403_206_242, "http_api"),  # 133
        got(MessageAcked, REST, "q2/rest", 1, publisher="http_api"),  # 136
        got(MessageAcked, BULK_1, "q2/rest", 1, publisher="http_api"),  # 138
    ],
    "q2/r2": [published(BULK_2, "q2/r2", 0, "b2", 1_795_403_206_242, "http_api")],  # 134
    "api/1": [published(FOR_B, "api/1", 1, "for-b", 1_795_403_206_263, "http_api")],  # 140
}

# -- expected keys in Redis

OFFLINE = set(CLIENTS)  # all went in the end
INDEXES = {  # of QoS 1 and 2; acknowledged messages have left their queue, the others wait in it
    "t/x": [Q1, Q2], "t/ret": [KEPT], "sh/1": [SHARED], "t/will": [WILL], "api/1": [FOR_B],
    "nobody/here": [DROPPED],
}  # fmt: skip
RECEIPTS = {
    Q0: {"delivered:sub-a"},
    Q1: {"delivered:sub-a", "acked:sub-a"},
    Q2: {"delivered:sub-a", "acked:sub-a"},
    KEPT: {"delivered:sub-a", "acked:sub-a", "delivered:sub-b", "acked:sub-b"},
}
COMMANDS = {
    "subscribed:sub-a": {"t/+": "1", "q2/#": "2"},
    "subscribed:sub-b": {"t/ret": "1", "api/+": "1"},
    "subscribed:shr-1": {"$share/g/sh/1": "1"},
    "subscribed:tk": {"tk/#": "1"},
    "subscribed:per-c": {"off/#": "1"},
    "unsubscribed": {"sub-a": "t/+", "sub-b": "api/+"},
}


def bodies() -> dict[str, dict[str, str]]:
    """The stored message bodies, by id."""
    left = [message_id for ids in INDEXES.values() for message_id in ids]
    events = {
        event.message_id: event
        for events in MESSAGES.values()
        for event in events
        if isinstance(event, Message)
    }
    return {
        message_id: {
            "id": message_id, "from": event.client_id, "qos": str(event.qos), "topic": event.topic,
            "payload": event.payload, "ts": str(event.published_at // 1_000), "retain": "false",
        }
        for message_id in left
        for event in [events[message_id]]
    }  # fmt: skip


async def found_in_redis(pipeline: Pipeline) -> dict[str, Any]:
    """All public keys, and the keys of user commands."""
    redis: Any = pipeline.redis
    found: dict[str, Any] = {
        "offline": set(), "indexes": {}, "receipts": {}, "commands": {}, "bodies": {}, "other": set(),
    }  # fmt: skip
    async for raw in redis.scan_iter("*"):
        key = raw.decode()
        kind = (await redis.type(key)).decode()
        fields = await redis.hgetall(key) if kind == "hash" else {}
        hash_ = {name.decode(): value.decode() for name, value in fields.items()}
        if key.startswith(keys.PRIVATE_PREFIX):
            continue
        if key.startswith("mqtt:client:"):
            if hash_["state"] == "0" and hash_["offline_at"] != "undefined":
                found["offline"].add(key.removeprefix("mqtt:client:"))
        elif key.startswith("mqtt:msg:") and kind == "zset":
            ids = await redis.zrange(key, 0, -1)
            found["indexes"][key.removeprefix("mqtt:msg:")] = [each.decode() for each in ids]
        elif key.startswith("mqtt:msg:"):
            found["bodies"][key.removeprefix("mqtt:msg:")] = hash_
        elif key.startswith("mqtt:receipt:"):
            found["receipts"][key.removeprefix("mqtt:receipt:")] = set(hash_)
        elif key in COMMANDS:
            found["commands"][key] = hash_
        else:
            found["other"].add(key)
    return found


EXPECTED: dict[str, Any] = {
    "offline": OFFLINE, "indexes": INDEXES, "receipts": RECEIPTS, "commands": COMMANDS,
    "bodies": bodies(), "other": set(),
}  # fmt: skip


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(*RULES)
        await asyncio.gather(*(started.worker(each) for each in ("sessions", "messages", "queue")))
        yield started


def timeless(event: Event, since: int) -> Event:
    """The event with the times of this test run set to 0, after a check of them."""
    if isinstance(event, MessagePublished | NodeStarted):
        return event
    assert since <= event.at <= time.time() * 1_000
    if isinstance(event, ClientConnected):
        assert event.connected_at == event.at
        return structs.replace(event, at=0, connected_at=0)
    return structs.replace(event, at=0)


def told_by_bridge(log: Log, topic: str) -> dict[str, list[Event]]:
    """The bridge's events by key, in order, without those of agents."""
    found: dict[str, list[Event]] = {}
    for record in log.records:
        if record.topic == topic and record.event.node == NODE:
            found.setdefault(record.key, []).append(record.event)
    return found


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
async def test_the_trace_has_the_expected_events_and_keys(
    pipeline: Pipeline, version: Version
) -> None:
    since = int(time.time() * 1_000)
    async with (
        reading(pipeline.bootstrap) as log,
        serving(pipeline.bootstrap, given.rules(*RULES)) as provider,
    ):
        for _, name, request in trace():
            await provider.call(name, request, version)
        assert provider.heard.loaded == [NODE]
        assert provider.calls.refusals.counts == {}
        count = sum(map(len, CLIENTS.values())) + sum(map(len, MESSAGES.values())) + PARTITIONS
        await log.until(
            lambda: sum(each.event.node == NODE for each in log.records) >= count, "all events"
        )

    clients = told_by_bridge(log, keys.CLIENTS_TOPIC)
    starts = clients.pop(keys.agent_record_key("sessions"))
    assert starts == [NodeStarted(at=BOOTED_AT, node=NODE)] * PARTITIONS
    for expected, found in (
        (CLIENTS, clients),
        (MESSAGES, told_by_bridge(log, keys.MESSAGES_TOPIC)),
    ):
        assert {
            key: [timeless(event, since) for event in events] for key, events in found.items()
        } == expected

    deadline = time.monotonic() + SETTLE_S
    while (state := await found_in_redis(pipeline)) != EXPECTED and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert state == EXPECTED
    assert await pipeline.dead_letters() == []
