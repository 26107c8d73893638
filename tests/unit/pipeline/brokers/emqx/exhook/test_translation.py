"""EMQX's requests as canonical events: a table for each call, and errors for invalid requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.translation import Translator, node_started
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.schemas import codec
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import (
    TIME_MS_MAX,
    ClientConnected,
    ClientDisconnected,
    Event,
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

NODE, AT, ID = "emqx@10.0.0.1", 1_700_000_000_123, "000660E8E1F804B9F443000004050002"
PLAIN, MOUNTED = Translator(None), Translator(Mountpoint("mp/${clientid}/"))
BOTH = pytest.mark.parametrize("to", [PLAIN, MOUNTED], ids=["plain", "mounted"])


def a_client(client_id: str = "c2", **fields: Any) -> pb.ClientInfo:
    values = {
        "node": NODE, "username": "u", "password": "p", "peerhost": "192.0.2.7", "peerport": 40112,
        "sockport": 1883, "protocol": "mqtt", "anonymous": True, **fields,
    }  # fmt: skip
    return pb.ClientInfo(clientid=client_id, **values)


def a_message(topic: str = "t", **fields: Any) -> pb.Message:
    values: dict[str, Any] = {
        "node": NODE, "id": ID, "qos": 1, "from_client_id": "pub", "payload": b"hello",
        "timestamp": AT - 5, **fields,
    }  # fmt: skip
    return pb.Message(topic=topic, **values)


# -- clients and sessions


@BOTH
def test_a_connection(to: Translator) -> None:
    event = to.connected(pb.ClientConnectedRequest(clientinfo=a_client()), AT)
    assert event == ClientConnected(
        at=AT, node=NODE, client_id="c2", username="u", connected_at=AT, protocol="MQTT",
        connection_id="emqx@10.0.0.1/192.0.2.7:40112",
    )  # fmt: skip


def test_an_empty_username_is_none_and_another_protocol_is_named() -> None:
    request = pb.ClientConnectedRequest(clientinfo=a_client(username="", protocol="mqtt-sn"))
    event = PLAIN.connected(request, AT)
    assert (event.username, event.protocol) == (None, "mqtt-sn")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("normal", "normal"), ("kicked", "kicked"), ("tcp_closed", "tcp_closed"), ("", ""),
        ("takenover", "takenover"), ("discarded", "discarded"), ("takeovered", "takenover"),
        ("{shutdown,normal}", "normal"), ("{shutdown,takeovered}", "takenover"),
        ("{shutdown,{a,b}}", "{shutdown,{a,b}}"), ("{shutdown,normal}x", "{shutdown,normal}x"),
    ],
)  # fmt: skip
def test_a_reason_loses_its_erlang_wrapping(text: str, reason: str) -> None:
    disconnected = pb.ClientDisconnectedRequest(clientinfo=a_client(), reason=text)
    assert PLAIN.disconnected(disconnected, AT) == ClientDisconnected(
        at=AT, node=NODE, client_id="c2", connection_id="emqx@10.0.0.1/192.0.2.7:40112",
        reason=reason,
    )  # fmt: skip
    terminated = pb.SessionTerminatedRequest(clientinfo=a_client(), reason=text)
    assert PLAIN.terminated(terminated, AT) == SessionTerminated(
        at=AT, node=NODE, client_id="c2", reason=reason
    )


def test_the_rest_of_a_sessions_life() -> None:
    of: dict[str, Any] = {"at": AT, "node": NODE, "client_id": "c2"}
    client = a_client()
    assert PLAIN.created(pb.SessionCreatedRequest(clientinfo=client), AT) == SessionCreated(**of)
    assert PLAIN.resumed(pb.SessionResumedRequest(clientinfo=client), AT) == SessionResumed(**of)
    discarded = pb.SessionDiscardedRequest(clientinfo=client)
    assert PLAIN.discarded(discarded, AT) == SessionDiscarded(**of)
    taken_over = pb.SessionTakenoverRequest(clientinfo=client)
    assert PLAIN.taken_over(taken_over, AT) == SessionTakenOver(**of)


# -- subscriptions: mode, mountpoint, client, filter in the request; filter, reachable, broker delivers

SUBSCRIBED: list[tuple[Translator, str, str, str, str, bool, bool]] = [
    (PLAIN, "", "c2", "queue/#", "queue/#", True, True),
    (PLAIN, "", "a/b", "queue/#", "queue/#", True, True),
    (PLAIN, "", "c2", "$share/g/queue/+", "$share/g/queue/+", True, True),
    (PLAIN, "", "c2", "$queue/t", "$share/$queue/t", True, True),
    (PLAIN, "other/c2/", "c2", "other/c2/t", "other/c2/t", True, True),
    (MOUNTED, "mp/c2/", "c2", "mp/c2/queue/#", "queue/#", True, False),
    (MOUNTED, "mp/c2/", "c2", "$share/g/mp/c2/queue/+", "$share/g/queue/+", True, False),
    (MOUNTED, "mp/c2/", "c2", "$queue/mp/c2/t", "$share/$queue/t", True, False),
    (MOUNTED, "", "c2", "queue/#", "queue/#", False, False),
    (MOUNTED, "", "c2", "mp/c2/queue/#", "mp/c2/queue/#", False, False),
    (MOUNTED, "other/c2/", "c2", "other/c2/t", "other/c2/t", False, False),
    (MOUNTED, "mp/c3/", "c2", "mp/c3/t", "mp/c3/t", False, False),
    (MOUNTED, "mp/c2/", "c2", "queue/#", "queue/#", False, False),
    (MOUNTED, "mp/a/b/", "a/b", "mp/a/b/queue/#", "queue/#", False, False),
]


@pytest.mark.parametrize(
    ("to", "mountpoint", "client_id", "mounted", "own", "reachable", "broker_delivers"), SUBSCRIBED
)
def test_a_subscription(
    to: Translator, mountpoint: str, client_id: str, mounted: str, own: str, reachable: bool,
    broker_delivers: bool,
) -> None:  # fmt: skip
    client = a_client(client_id, mountpoint=mountpoint)
    options = pb.SubOpts(qos=2, rh=1)
    request = pb.SessionSubscribedRequest(clientinfo=client, topic=mounted, subopts=options)
    assert to.subscribed(request, AT) == SessionSubscribed(
        at=AT, node=NODE, client_id=client_id, topic_filter=own, qos=2, retain_handling=1,
        reachable=reachable, broker_delivers=broker_delivers,
    )  # fmt: skip
    ended = pb.SessionUnsubscribedRequest(clientinfo=client, topic=mounted)
    assert to.unsubscribed(ended, AT) == SessionUnsubscribed(
        at=AT, node=NODE, client_id=client_id, topic_filter=own
    )


def test_a_separately_reported_group_joins_its_filter() -> None:
    options = pb.SubOpts(qos=1, share="g")
    request = pb.SessionSubscribedRequest(clientinfo=a_client(), topic="sh/1", subopts=options)
    assert PLAIN.subscribed(request, AT).topic_filter == "$share/g/sh/1"


# -- messages


def test_a_publish() -> None:
    message = a_message(headers={"username": "u", "peerhost": "192.0.2.7", "protocol": "mqtt"})
    assert PLAIN.published(pb.MessagePublishRequest(message=message), "t", AT) == MessagePublished(
        at=AT - 5, node=NODE, message_id=ID, topic="t", qos=1, retain=False, client_id="pub",
        username="u", payload="hello", published_at=AT - 5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "expires_at"),
    [
        ("Message-Expiry-Interval", "60", AT - 5 + 60_000),
        ("Message-Expiry-Interval", "0", AT - 5),
        ("Message-Expiry-Interval", "4294967295", AT - 5 + 4_294_967_295_000),
        ("Message-Expiry-Interval", "9999999999", AT - 5 + 9_999_999_999_000),
        ("Message-Expiry-Interval", "99999999999", None),
        ("Message-Expiry-Interval", "-1", None),
        ("Message-Expiry-Interval", "", None),
        ("Message-Expiry-Interval", "٣", None),
        ("Response-Topic", "60", None),
    ],
)
def test_an_expiry(name: str, value: str, expires_at: int | None) -> None:
    properties = [pb.Property(name="Payload-Format-Indicator", value="1"), pb.Property(name=name, value=value)]  # fmt: skip
    request = pb.MessagePublishRequest(message=a_message(), props=properties)
    assert PLAIN.published(request, "t", AT).expires_at == expires_at


def test_an_expiry_is_limited_to_the_largest_time() -> None:
    properties = [pb.Property(name="Message-Expiry-Interval", value="4294967295")]
    message = a_message(timestamp=TIME_MS_MAX - 1)
    request = pb.MessagePublishRequest(message=message, props=properties)
    assert PLAIN.published(request, "t", AT).expires_at == TIME_MS_MAX


def test_user_properties_a_will_and_bytes() -> None:
    properties = [pb.Property(name="a", value="1"), pb.Property(name="b", value="2"), pb.Property(name="a", value="3")]  # fmt: skip
    message = a_message(payload=bytes(range(256)), timestamp=0)
    request = pb.MessagePublishRequest(message=message, user_props=properties)
    event = PLAIN.published(request, "t", AT)
    assert event.user_properties == {"a": "3", "b": "2"}
    assert (event.username, event.payload_encoding, event.published_at) == (None, "base64", AT)
    assert codec.payload_bytes(event) == bytes(range(256))


@pytest.mark.parametrize(
    ("to", "mountpoint", "mounted", "topic"),
    [
        (PLAIN, "", "queue/t", "queue/t"), (PLAIN, "mp/c2/", "mp/c2/queue/t", "mp/c2/queue/t"),
        (MOUNTED, "mp/c2/", "mp/c2/queue/t", "queue/t"), (MOUNTED, "", "queue/t", "queue/t"),
        (MOUNTED, "", "mp/c2/queue/t", "mp/c2/queue/t"),
        (MOUNTED, "mp/c3/", "mp/c3/queue/t", "mp/c3/queue/t"), (MOUNTED, "mp/c2/", "t", "t"),
    ],
)  # fmt: skip
def test_a_received_message_has_the_topic_without_mountpoint(
    to: Translator, mountpoint: str, mounted: str, topic: str
) -> None:
    client, message = a_client(mountpoint=mountpoint), a_message(mounted, qos=2)
    fields: dict[str, Any] = {
        "at": AT, "node": NODE, "message_id": ID, "topic": topic, "client_id": "c2",
        "from_client_id": "pub", "qos": 2,
    }  # fmt: skip
    delivered = pb.MessageDeliveredRequest(clientinfo=client, message=message)
    assert to.delivered(delivered, AT) == MessageDelivered(**fields)
    acked = pb.MessageAckedRequest(clientinfo=client, message=message)
    assert to.acked(acked, AT) == MessageAcked(**fields, broker_delivers=to is PLAIN)


# -- the node


@pytest.mark.parametrize(
    ("datetime", "uptime", "at"),
    [
        ("2026-11-23T03:06:36.021282189+00:00", 13_558, 1_795_403_182_463),
        ("2026-11-23T04:06:36.021+01:00", 13_558, 1_795_403_182_463),
        ("2026-11-23T03:06:36+00:00", 1, 1_795_403_195_999),
        ("2026-11-23T03:06:36Z", 1, 1_795_403_195_999),
        ("2026-11-23T03:06:36.021282189+00:00", 0, None),
        ("2026-11-23T03:06:36.021282189+00:00", -5, None),
        ("2026-11-23 03:06:36", 13_558, None),
        ("0001-01-01T00:00:00+00:00", 1, None),
        ("9999-12-31T23:59:59-23:59", 1, None),
        ("1970-01-01T00:00:00+00:00", 1, None),
        ("2026-11-23T03:06:36+00:00", 2**63 - 1, None),
        ("yesterday", 13_558, None),
        ("", 13_558, None),
    ],
)
def test_the_start_of_a_node_has_its_boot_time(datetime: str, uptime: int, at: int | None) -> None:
    broker = pb.BrokerInfo(datetime=datetime, uptime=uptime)
    request = pb.ProviderLoadedRequest(broker=broker, meta=pb.RequestMeta(node=NODE))
    assert node_started(request) == (None if at is None else NodeStarted(at=at, node=NODE))


# -- invalid requests

LONG = "x" * 65_536
WRONG: list[tuple[str, Callable[[], Event | None]]] = [
    ("no client", lambda: PLAIN.created(pb.SessionCreatedRequest(clientinfo=a_client("")), AT)),
    ("nobody", lambda: PLAIN.created(pb.SessionCreatedRequest(), AT)),
    ("a null", lambda: PLAIN.created(pb.SessionCreatedRequest(clientinfo=a_client("a\0b")), AT)),
    ("a long id", lambda: PLAIN.created(pb.SessionCreatedRequest(clientinfo=a_client(LONG)), AT)),
    ("no node", lambda: PLAIN.created(pb.SessionCreatedRequest(clientinfo=a_client(node="")), AT)),
    (
        "a long host",
        lambda: PLAIN.connected(
            pb.ClientConnectedRequest(clientinfo=a_client(peerhost=LONG)), AT
        ),
    ),
    (
        "a long reason",
        lambda: PLAIN.disconnected(
            pb.ClientDisconnectedRequest(clientinfo=a_client(), reason=LONG), AT
        ),
    ),
    *(
        (
            f"a filter {topic[:9]!r}",
            lambda topic=topic: PLAIN.subscribed(
                pb.SessionSubscribedRequest(clientinfo=a_client(), topic=topic), AT
            ),
        )
        for topic in ("", "a\0", "a/#/b", "a+", "$share//t", "$share/g", LONG)
    ),
    (
        "a QoS of 3",
        lambda: PLAIN.subscribed(
            pb.SessionSubscribedRequest(
                clientinfo=a_client(), topic="t", subopts=pb.SubOpts(qos=3)
            ),
            AT,
        ),
    ),
    (
        "a retain handling of 3",
        lambda: PLAIN.subscribed(
            pb.SessionSubscribedRequest(clientinfo=a_client(), topic="t", subopts=pb.SubOpts(rh=3)),
            AT,
        ),
    ),
    *(
        (
            f"a topic {topic[:9]!r}",
            lambda topic=topic: PLAIN.published(
                pb.MessagePublishRequest(message=a_message()), topic, AT
            ),
        )
        for topic in ("", "a\0", "a/#", "+", LONG)
    ),
    *(
        (
            f"a message with {fields}"[:40],
            lambda fields=fields: PLAIN.published(
                pb.MessagePublishRequest(message=a_message(**fields)), "t", AT
            ),
        )
        for fields in (
            {"id": ""}, {"id": "x" * 257}, {"qos": 3}, {"timestamp": TIME_MS_MAX + 1},
            {"timestamp": 2**64 - 1}, {"node": ""}, {"from_client_id": "a\0"}, {"from_client_id": LONG},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("call", [row[1] for row in WRONG], ids=[row[0] for row in WRONG])
def test_an_invalid_request_is_a_decode_error(call: Callable[[], Event | None]) -> None:
    with pytest.raises(DecodeError):
        call()


# -- any request: an event that survives encoding and decoding, or a DecodeError

TEXT = st.one_of(
    st.sampled_from(["", "t", "mp/c2/", "mp/c2/t", "c2", "$share/g/t", "\0", "#", NODE, "60"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
NUMBER = st.sampled_from([0, 1, 2, 3, 2**32 - 1])
CLIENTS = st.builds(
    pb.ClientInfo, node=TEXT, clientid=TEXT, username=TEXT, peerhost=TEXT, peerport=NUMBER,
    protocol=TEXT, mountpoint=TEXT,
)  # fmt: skip
PROPERTIES = st.lists(
    st.builds(
        pb.Property, name=st.one_of(st.just("Message-Expiry-Interval"), TEXT), value=TEXT
    ),
    max_size=3,
)  # fmt: skip
SENT = st.builds(
    pb.Message, node=TEXT, id=TEXT, qos=NUMBER, from_client_id=TEXT, topic=TEXT,
    payload=st.binary(max_size=8), timestamp=st.sampled_from([0, AT, TIME_MS_MAX, 2**64 - 1]),
    headers=st.dictionaries(st.sampled_from(["username", "x"]), TEXT),
)  # fmt: skip
OPTIONS = st.builds(pb.SubOpts, qos=NUMBER, rh=NUMBER, share=TEXT)


def event_or_error(translate: Callable[[Any, int], Event], request: Any) -> None:
    try:
        event = translate(request, AT)
    except DecodeError:
        return
    assert codec.decode(codec.encode(event)) == event


@BOTH
@given(client=CLIENTS, topic=TEXT, reason=TEXT, options=OPTIONS)
def test_any_request_about_a_client(
    to: Translator, client: pb.ClientInfo, topic: str, reason: str, options: pb.SubOpts
) -> None:
    event_or_error(to.connected, pb.ClientConnectedRequest(clientinfo=client))
    event_or_error(to.disconnected, pb.ClientDisconnectedRequest(clientinfo=client, reason=reason))
    event_or_error(to.terminated, pb.SessionTerminatedRequest(clientinfo=client, reason=reason))
    subscribed = pb.SessionSubscribedRequest(clientinfo=client, topic=topic, subopts=options)
    event_or_error(to.subscribed, subscribed)
    event_or_error(to.unsubscribed, pb.SessionUnsubscribedRequest(clientinfo=client, topic=topic))


@BOTH
@given(client=CLIENTS, message=SENT, topic=TEXT, properties=PROPERTIES, own=PROPERTIES)
def test_any_request_about_a_message(
    to: Translator, client: pb.ClientInfo, message: pb.Message, topic: str,
    properties: list[pb.Property], own: list[pb.Property],
) -> None:  # fmt: skip
    published = pb.MessagePublishRequest(message=message, props=properties, user_props=own)
    event_or_error(lambda request, at: to.published(request, topic, at), published)
    event_or_error(to.acked, pb.MessageAckedRequest(clientinfo=client, message=message))
    event_or_error(to.delivered, pb.MessageDeliveredRequest(clientinfo=client, message=message))


@given(datetime=st.text(max_size=40), uptime=st.integers(-(2**63), 2**63 - 1), node=TEXT)
def test_any_request_about_a_node(datetime: str, uptime: int, node: str) -> None:
    request = pb.ProviderLoadedRequest(
        broker=pb.BrokerInfo(datetime=datetime, uptime=uptime), meta=pb.RequestMeta(node=node)
    )
    with_error = False
    try:
        event = node_started(request)
    except DecodeError:
        with_error = True
    assert with_error or event is None or codec.decode(codec.encode(event)) == event
