"""Rule events as EMQX writes them, and the canonical events that a reader expects from them."""

from __future__ import annotations

import contextlib
import json
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.rule_events.translation import UNNEEDED, read
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
    SessionCreated,
    SessionSubscribed,
    SessionUnsubscribed,
)

NODE = "emqx@127.0.0.1"
ID = "00058CE94E63BEADF44300000A530001"

# As in EMQX's documents.
PUBLISH: dict[str, Any] = {
    "event": "message.publish", "id": ID, "clientid": "c_pub", "username": "u_emqx",
    "payload": '{"msg":"hello"}', "peerhost": "192.168.0.10", "topic": "queue/a", "qos": 1,
    "flags": {"retain": False, "dup": False}, "pub_props": {"User-Property": {"foo": "bar"}},
    "publish_received_at": 1645002753256, "timestamp": 1645002753259, "node": NODE,
    "metadata": {"rule_id": "my_rule"},
}  # fmt: skip
ACKED: dict[str, Any] = {
    "event": "message.acked", "id": ID, "from_clientid": "c_pub", "from_username": "u1",
    "clientid": "c_sub", "username": "undefined", "payload": '{"msg":"hello"}', "topic": "queue/a",
    "qos": 1, "flags": {"retain": False, "dup": False}, "pub_props": {"User-Property": {}},
    "puback_props": {}, "publish_received_at": 1645002753256, "timestamp": 1645002965664,
    "node": NODE,
}  # fmt: skip
DELIVERED = {**ACKED, "event": "message.delivered", "qos": 0}
CONNECTED: dict[str, Any] = {
    "event": "client.connected", "clientid": "c_sub", "username": "u_emqx",
    "mountpoint": "undefined", "peername": "192.168.0.11:56431", "sockname": "0.0.0.0:1883",
    "proto_name": "MQTT", "proto_ver": 5, "keepalive": 60, "clean_start": False,
    "receive_maximum": 32, "expiry_interval": 3600, "is_bridge": False,
    "conn_props": {"Session-Expiry-Interval": 3600}, "connected_at": 1645003570000,
    "timestamp": 1645003570001, "node": NODE,
}  # fmt: skip
DISCONNECTED: dict[str, Any] = {
    "event": "client.disconnected", "reason": "normal", "clientid": "c_sub", "username": "u_emqx",
    "peername": "192.168.0.11:56431", "sockname": "0.0.0.0:1883", "proto_name": "MQTT",
    "proto_ver": 5, "disconn_props": {}, "disconnected_at": 1645003578536,
    "connected_at": 1645003570000, "timestamp": 1645003578537, "node": NODE,
}  # fmt: skip
SUBSCRIBED: dict[str, Any] = {
    "event": "session.subscribed", "clientid": "c_sub", "username": "u_emqx",
    "peerhost": "192.168.0.11", "topic": "queue/a", "qos": 1, "sub_props": {},
    "timestamp": 1645003571000, "node": NODE,
}  # fmt: skip
UNSUBSCRIBED: dict[str, Any] = {
    "event": "session.unsubscribed", "clientid": "c_sub", "username": "u_emqx",
    "peerhost": "192.168.0.11", "topic": "queue/a", "qos": 1, "unsub_props": {},
    "timestamp": 1645003572000, "node": NODE,
}  # fmt: skip
DOCUMENTED = (PUBLISH, ACKED, DELIVERED, CONNECTED, DISCONNECTED, SUBSCRIBED, UNSUBSCRIBED)

# The expected canonical events.
CANONICAL_PUBLISH = MessagePublished(
    at=1645002753259, node=NODE, message_id=ID, topic="queue/a", qos=1, retain=False,
    client_id="c_pub", username="u_emqx", payload='{"msg":"hello"}', payload_encoding="utf-8",
    published_at=1645002753256, expires_at=None, user_properties={"foo": "bar"},
)  # fmt: skip
CANONICAL_CONNECT = ClientConnected(
    at=1645003570001, node=NODE, client_id="c_sub", username="u_emqx",
    connection_id="emqx@127.0.0.1/192.168.0.11:56431", connected_at=1645003570000,
    clean_start=False, session_expiry_s=3600, protocol="MQTT",
)  # fmt: skip
CANONICAL: tuple[tuple[Event, ...], ...] = (
    (CANONICAL_PUBLISH,),
    (MessageAcked(
        at=1645002965664, node=NODE, message_id=ID, topic="queue/a", client_id="c_sub",
        from_client_id="c_pub", qos=1, broker_delivers=True,
    ),),
    (MessageDelivered(
        at=1645002965664, node=NODE, message_id=ID, topic="queue/a", client_id="c_sub",
        from_client_id="c_pub", qos=0,
    ),),
    (CANONICAL_CONNECT,),
    (ClientDisconnected(
        at=1645003578536, node=NODE, client_id="c_sub", reason="normal",
        connection_id="emqx@127.0.0.1/192.168.0.11:56431",
    ),),
    (SessionSubscribed(
        at=1645003571000, node=NODE, client_id="c_sub", topic_filter="queue/a", qos=1,
        broker_delivers=True,
    ),),
    (SessionUnsubscribed(
        at=1645003572000, node=NODE, client_id="c_sub", topic_filter="queue/a",
    ),),
)  # fmt: skip

PAIRS = tuple(zip(DOCUMENTED, CANONICAL, strict=True))


def value(rule: dict[str, Any], **changes: Any) -> bytes:
    """The record of a rule event with changed fields. A field with the value `...` is left out."""
    changed = {name: each for name, each in {**rule, **changes}.items() if each is not ...}
    return json.dumps(changed).encode()


def published(**changes: Any) -> MessagePublished:
    (event,) = read(value(PUBLISH, **changes))
    assert isinstance(event, MessagePublished)
    return event


@pytest.mark.parametrize(("rule", "events"), PAIRS)
def test_documented_rule_events(rule: dict[str, Any], events: tuple[Event, ...]) -> None:
    assert read(value(rule)) == events


@pytest.mark.parametrize(("rule", "events"), PAIRS)
def test_an_event_may_have_the_name_of_the_topic_that_selects_it_before_and_since_5_10(
    rule: dict[str, Any], events: tuple[Event, ...]
) -> None:
    what, name = rule["event"].split(".")
    for spelling in (f"{what}_{name}", f"$events/{what}_{name}", f"$events/{what}/{name}"):
        assert read(value(rule, event=spelling)) == events


@pytest.mark.parametrize(
    "name",
    [
        "message.dropped", "delivery.dropped", "client.connack", "client.check_acl_complete",
        "client.check_authz_complete", "client.check_authn_complete", "$events/client/ping",
        "$events/auth/check_authn_complete", "$events/message/delivery_dropped",
        "alarm.activated", "$events/sys/alarm_deactivated", "$events/schema_validation/failed",
        "$events/schema_validation_failed", "$events/message_transformation_failed",
    ],
)  # fmt: skip
def test_unneeded_events_are_skipped(name: str) -> None:
    assert name in UNNEEDED
    assert read(value(PUBLISH, event=name)) == ()


# -- messages


@pytest.mark.parametrize("payload", [b"", b"plain", "grün".encode(), b"\xff\xfe\0", bytes(300)])
def test_the_base64_payload_takes_precedence(payload: bytes) -> None:
    event = published(payload="\ufffd", payload_b64=b64encode(payload).decode())
    assert codec.payload_bytes(event) == payload


def test_a_text_payload_stays_text() -> None:
    event = published(payload_b64=b64encode(b"text").decode())
    assert (event.payload, event.payload_encoding) == ("text", "utf-8")


@pytest.mark.parametrize("absent", ["undefined", None, ...])
def test_undefined_counts_as_missing(absent: Any) -> None:
    event = published(
        username=absent, flags=absent, pub_props=absent, publish_received_at=absent, peerhost=absent
    )
    assert (event.username, event.retain, event.user_properties) == (None, False, {})
    assert (event.expires_at, event.published_at) == (None, 1645002753259)
    (acked,) = read(value(ACKED, from_clientid=absent))
    assert isinstance(acked, MessageAcked)
    assert acked.from_client_id is None
    (connected,) = read(
        value(CONNECTED, username=absent, proto_name=absent, expiry_interval=absent)
    )
    assert isinstance(connected, ClientConnected)
    assert (connected.username, connected.protocol) == (None, "MQTT")
    assert connected.session_expiry_s == 0


def test_the_retain_flag_is_read() -> None:
    assert published(flags={"retain": True, "dup": False}).retain
    assert not published(flags={}).retain


def test_a_message_expires_one_interval_after_its_receipt() -> None:
    assert published(pub_props={"Message-Expiry-Interval": 30}).expires_at == 1645002783256
    assert published(pub_props={"Message-Expiry-Interval": 0}).expires_at == 1645002753256
    assert published(pub_props={"Message-Expiry-Interval": "undefined"}).expires_at is None
    assert published(pub_props={"Message-Expiry-Interval": 1 << 60}).expires_at == TIME_MS_MAX


def test_publishes_to_reserved_topics_are_skipped() -> None:
    for rule in (PUBLISH, ACKED, DELIVERED):
        assert read(value(rule, topic="$millpond/d/mac/lease/id/queue/a")) == ()


# -- clients


def test_a_clean_start_begins_a_session_before_it_is_connected() -> None:
    created, connected = read(value(CONNECTED, clean_start=True, expiry_interval=0))
    assert created == SessionCreated(
        at=1645003570001, node=NODE, client_id="c_sub", began_at=1645003570000
    )
    assert isinstance(connected, ClientConnected)
    assert (connected.clean_start, connected.session_expiry_s) == (True, 0)


def test_the_largest_expiry_interval_means_never() -> None:
    (event,) = read(value(CONNECTED, expiry_interval=1 << 40))
    assert isinstance(event, ClientConnected)
    assert event.session_expiry_s == 0xFFFF_FFFF


@pytest.mark.parametrize("absent", ["undefined", None, ...])
def test_a_connection_without_a_peer_is_identified_by_its_start(absent: Any) -> None:
    (connected,) = read(value(CONNECTED, peername=absent))
    (disconnected,) = read(value(DISCONNECTED, peername=absent))
    assert isinstance(connected, ClientConnected)
    assert isinstance(disconnected, ClientDisconnected)
    assert connected.connection_id == f"{NODE}/1645003570000" == disconnected.connection_id
    with pytest.raises(DecodeError, match="neither peername nor connected_at"):
        read(value(DISCONNECTED, peername=absent, connected_at=absent))


@pytest.mark.parametrize("absent", ["undefined", None, ...])
def test_a_disconnect_before_5_8_6(absent: Any) -> None:
    (event,) = read(value(DISCONNECTED, connected_at=absent, disconnected_at=absent))
    assert event.at == 1645003578537


# -- mountpoints


def test_the_mountpoint_is_removed_from_the_clients_own_topics() -> None:
    unmounted = Mountpoint("mp/${clientid}/")
    (event,) = read(value(PUBLISH, topic="mp/c_pub/queue/a"), unmounted)
    assert event == CANONICAL_PUBLISH
    (acked,) = read(value(ACKED, topic="mp/c_sub/queue/a"), unmounted)
    (expected,) = CANONICAL[1]
    assert acked == structs.replace(expected, broker_delivers=False)  # Millpond does
    (other,) = read(value(PUBLISH, topic="mp/c_other/queue/a"), unmounted)
    assert isinstance(other, MessagePublished)
    assert other.topic == "mp/c_other/queue/a"


@pytest.mark.parametrize(
    ("topic", "topic_filter", "reachable"),
    [
        ("mp/c_sub/queue/#", "queue/#", True),
        ("$share/g/mp/c_sub/queue/a", "$share/g/queue/a", True),
        ("queue/a", "queue/a", False),
        ("$share/g/queue/a", "$share/g/queue/a", False),
        ("$queue/mp/c_sub/queue/a", "$share/$queue/queue/a", True),
        ("$queue/queue/a", "$share/$queue/queue/a", False),
        ("mp/c_other/queue/a", "mp/c_other/queue/a", False),
    ],
)
def test_with_a_mountpoint_millpond_delivers_below_it(
    topic: str, topic_filter: str, reachable: bool
) -> None:
    unmounted = Mountpoint("mp/${clientid}/")
    (event,) = read(value(SUBSCRIBED, topic=topic), unmounted)
    assert isinstance(event, SessionSubscribed)
    assert (event.topic_filter, event.reachable) == (topic_filter, reachable)
    assert not event.broker_delivers
    (ended,) = read(value(UNSUBSCRIBED, topic=topic), unmounted)
    assert isinstance(ended, SessionUnsubscribed)
    assert ended.topic_filter == topic_filter


# -- invalid records


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "no value"),
        (b"", "truncated"),
        (b"\xff", "malformed"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `event`"),
        (b'{"event": 7}', "Expected `str`"),
        (value(PUBLISH, event="message.resent"), "unknown rule event 'message.resent'"),
        (value(PUBLISH, event="$bridges/mqtt:b"), "unknown rule event"),
        (value(PUBLISH, id=...), "missing required field `id`"),
        (value(PUBLISH, id=""), "length >= 1"),
        (value(PUBLISH, id="i" * 257), "length <= 256"),
        (value(PUBLISH, topic=""), "length >= 1"),
        (value(PUBLISH, topic="a/+"), "wildcard"),
        (value(PUBLISH, topic="a\0"), "null character"),
        (value(PUBLISH, topic="ä" * 40_000), "longer than 65535 bytes"),
        (value(PUBLISH, clientid="a\0b"), "clientid"),
        (value(PUBLISH, qos=3), "<= 2"),
        (value(PUBLISH, qos="1"), "Expected `int`"),
        (value(PUBLISH, payload=...), "no payload"),
        (value(PUBLISH, payload={"msg": "hello"}), "Expected `str | null`"),
        (value(PUBLISH, payload_b64="a"), "Invalid base64"),
        (value(PUBLISH, payload_b64="grün"), "ASCII"),
        (value(PUBLISH, payload_b64="YQ==!"), "base64|padding|[Nn]on"),
        (value(PUBLISH, timestamp=-1), ">= 0"),
        (value(PUBLISH, timestamp=TIME_MS_MAX + 1), "<="),
        (value(PUBLISH, flags=7), "flags"),
        (value(PUBLISH, flags={"retain": "yes"}), "retain"),
        (value(PUBLISH, pub_props={"Message-Expiry-Interval": -1}), "Message-Expiry-Interval"),
        (value(PUBLISH, pub_props={"User-Property": {"a": 7}}), "User-Property"),
        (value(CONNECTED, clean_start="undefined"), "clean_start"),
        (value(CONNECTED, connected_at="now"), "connected_at"),
        (value(SUBSCRIBED, topic="a/#/b"), "only at the end"),
        (value(SUBSCRIBED, topic="$share/g/"), "empty"),
        (value(SUBSCRIBED, qos="undefined"), "no QoS"),
        (b'{"event":"message.publish","x":' + b"[" * 100_000, "recursion"),
    ],
)  # fmt: skip
def test_an_invalid_record_is_a_decode_error(record: bytes | None, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        read(record)


@pytest.mark.parametrize("client", ["a/b", "+", "#"])
def test_a_client_with_an_ambiguous_id_is_not_reachable(client: str) -> None:
    record = value(SUBSCRIBED, clientid=client, topic=f"mp/{client}/t")
    with contextlib.suppress(DecodeError):
        (event,) = read(record, Mountpoint("mp/${clientid}/"))
        assert isinstance(event, SessionSubscribed)
        assert not event.reachable


def test_a_mountpoint_without_a_topic_is_invalid() -> None:
    for rule, topic in ((PUBLISH, "mp/c_pub/"), (SUBSCRIBED, "mp/c_sub/")):
        with pytest.raises(DecodeError, match="empty"):
            read(value(rule, topic=topic), Mountpoint("mp/${clientid}/"))


# -- any record: events that survive encoding and decoding, or a DecodeError


def events_or_decode_error(record: bytes | None) -> None:
    """Read a record. Its events must survive encoding and decoding."""
    for unmounted in ({}, {"mountpoint": Mountpoint("mp/${clientid}/")}):
        try:
            events = read(record, **unmounted)
        except DecodeError:
            continue
        for event in events:
            assert codec.decode(codec.encode(event)) == event


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(("undefined", "queue/a", "mp/c_sub/t", "$share/g/t", "\ud800", 1 << 63, "")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.binary())
def test_any_bytes(record: bytes) -> None:
    events_or_decode_error(record)


@given(values)
def test_any_json(parsed: Any) -> None:
    events_or_decode_error(json.dumps(parsed).encode())


@given(st.sampled_from(DOCUMENTED), st.data())
@settings(max_examples=500)
def test_any_changed_record(rule: dict[str, Any], data: st.DataObject) -> None:
    names = st.sampled_from([*rule, "payload_b64", "retain"])
    changes = data.draw(st.dictionaries(names, values | st.just(...), max_size=3))
    events_or_decode_error(value(rule, **changes))


@given(st.sampled_from(DOCUMENTED), st.data())
@settings(max_examples=500)
def test_any_damaged_record(rule: dict[str, Any], data: st.DataObject) -> None:
    record = bytearray(value(rule, payload_b64="AAAA"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(record) - 1))
        record[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    events_or_decode_error(bytes(record))
