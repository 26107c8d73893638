"""Encoding and decoding: the golden bytes of every event and command, and bytes that do not decode."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millpond.schemas import commands, events
from millpond.schemas.codec import decode, decode_command, encode, payload_bytes, payload_text
from millpond.schemas.commands import Command
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import Event

AT: dict[str, Any] = {"at": 1542338754123, "node": "n@1"}
STAMP = '"at":1542338754123,"node":"n@1"'
CLIENT = {**AT, "client_id": "sub"}
MESSAGE = {**CLIENT, "message_id": "0005", "topic": "queue/a", "qos": 1}
PUBLISH = {**MESSAGE, "client_id": "pub", "retain": False, "published_at": 5}

# Kafka keeps these bytes for years. A change here is a change of the format.
GOLDEN: dict[str, tuple[Event, str]] = {
    "client.connected": (
        events.ClientConnected(
            **CLIENT, username="u", connection_id="c1", connected_at=7, clean_start=False,
            session_expiry_s=3600, protocol="MQTT 5",
        ),
        (f'{STAMP},"client_id":"sub","username":"u","connection_id":"c1","connected_at":7,'
        '"clean_start":false,"session_expiry_s":3600,"protocol":"MQTT 5","told_again":false'),
    ),
    "client.disconnected": (
        events.ClientDisconnected(**CLIENT, connection_id="c1", reason="normal"),
        f'{STAMP},"client_id":"sub","connection_id":"c1","reason":"normal"',
    ),
    "session.created": (
        events.SessionCreated(**CLIENT, began_at=4), f'{STAMP},"client_id":"sub","began_at":4'
    ),
    "session.resumed": (events.SessionResumed(**CLIENT), f'{STAMP},"client_id":"sub"'),
    "session.subscribed": (
        events.SessionSubscribed(**CLIENT, topic_filter="queue/+", qos=1),
        f'{STAMP},"client_id":"sub","topic_filter":"queue/+","qos":1,"proxied":false,"broker_delivers":false,"reachable":true,"retain_handling":0,"told_again":false',
    ),
    "session.unsubscribed": (
        events.SessionUnsubscribed(**CLIENT, topic_filter="queue/+"),
        f'{STAMP},"client_id":"sub","topic_filter":"queue/+"',
    ),
    "session.terminated": (
        events.SessionTerminated(**CLIENT, reason="expired"),
        f'{STAMP},"client_id":"sub","reason":"expired"',
    ),
    "session.discarded": (events.SessionDiscarded(**CLIENT), f'{STAMP},"client_id":"sub"'),
    "session.takenover": (events.SessionTakenOver(**CLIENT), f'{STAMP},"client_id":"sub"'),
    "control.subscribe": (
        events.ControlSubscribe(**CLIENT, topic_filter="a/+", qos=1),
        f'{STAMP},"client_id":"sub","topic_filter":"a/+","qos":1',
    ),
    "control.unsubscribe": (
        events.ControlUnsubscribe(**CLIENT, topic_filter="a/+"),
        f'{STAMP},"client_id":"sub","topic_filter":"a/+"',
    ),
    "node.started": (events.NodeStarted(**AT), STAMP),
    "node.stopped": (events.NodeStopped(**AT), STAMP),
    "node.sync.started": (events.NodeSyncStarted(**AT, sync_id="s"), f'{STAMP},"sync_id":"s"'),
    "node.sync.completed": (
        events.NodeSyncCompleted(**AT, sync_id="s"),
        f'{STAMP},"sync_id":"s"',
    ),
    "message.published": (
        events.MessagePublished(**PUBLISH, payload='{"cmd":1}', user_properties={"k": "é"}),
        (f'{STAMP},"message_id":"0005","topic":"queue/a","qos":1,"retain":false,"client_id":"pub",'
        '"username":null,"payload":"{\\"cmd\\":1}","payload_encoding":"utf-8","published_at":5,'
        '"expires_at":null,"user_properties":{"k":"é"}'),
    ),
    "message.retained": (
        events.MessageRetained(**PUBLISH, payload="", payload_encoding="base64"),
        (f'{STAMP},"message_id":"0005","topic":"queue/a","qos":1,"retain":false,"client_id":"pub",'
        '"username":null,"payload":"","payload_encoding":"base64","published_at":5,'
        '"expires_at":null,"user_properties":{}'),
    ),
    "message.delivered": (
        events.MessageDelivered(**MESSAGE),
        (f'{STAMP},"message_id":"0005","topic":"queue/a","client_id":"sub","from_client_id":null,'
        '"qos":1'),
    ),
    "message.acked": (
        events.MessageAcked(**MESSAGE, from_client_id="pub"),
        (f'{STAMP},"message_id":"0005","topic":"queue/a","client_id":"sub","from_client_id":"pub",'
        '"qos":1,"broker_delivers":false'),
    ),
    "subscriber.joined": (
        events.SubscriberJoined(
            **CLIENT, topic_filter="$share/g/queue/+", qos=1, session=8, source_offset=9
        ),
        (f'{STAMP},"client_id":"sub","topic_filter":"$share/g/queue/+","qos":1,"session":8,'
        '"source_offset":9,"broker_delivers":false,"subscribed_at":0'),
    ),
    "subscriber.left": (
        events.SubscriberLeft(
            **CLIENT, topic_filter="queue/a", reason="disconnected", session=8, source_offset=9
        ),
        (f'{STAMP},"client_id":"sub","topic_filter":"queue/a","reason":"disconnected","session":8,'
        '"source_offset":9'),
    ),
    "deliveries.sent": (
        events.DeliveriesSent(
            **AT, agent="queue",
            sent=(events.Sent("queue/7/1", "sub", "0005"), events.Sent("queue/7/2", "s", "6", "7", 0)),
        ),
        (f'{STAMP},"agent":"queue",'
        '"sent":[["queue/7/1","sub","0005",null,1],["queue/7/2","s","6","7",0]]'),
    ),
    "members.active": (
        events.MembersActive(**AT, agent="pubsub", client_ids=("sub", "s")),
        f'{STAMP},"agent":"pubsub","client_ids":["sub","s"]',
    ),
    "delivery.failed": (
        events.DeliveryFailed(
            **CLIENT, agent="queue", lease="queue/7/1", message_id="0005", reason="stale"
        ),
        (f'{STAMP},"agent":"queue","lease":"queue/7/1","client_id":"sub","message_id":"0005",'
        '"reason":"stale"'),
    ),
    "operator.requeue": (
        events.OperatorRequeue(**AT, topic="queue/a", message_id="0005"),
        f'{STAMP},"topic":"queue/a","message_id":"0005"',
    ),
    "operator.drop": (
        events.OperatorDrop(**AT, topic="queue/a", message_id="0005"),
        f'{STAMP},"topic":"queue/a","message_id":"0005"',
    ),
    "operator.rewind": (
        events.OperatorRewind(
            **AT, topic="pubsub/a", subscriber="sub", after=5, message_id="0005"
        ),
        f'{STAMP},"topic":"pubsub/a","subscriber":"sub","after":5,"message_id":"0005"',
    ),
    "rules.changed": (
        events.RulesChanged(**AT, agent="queue", rules="[]"),
        f'{STAMP},"agent":"queue","rules":"[]"',
    ),
    "tick": (events.Tick(**AT, agent="queue"), f'{STAMP},"agent":"queue"'),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_an_event_encodes_to_its_golden_bytes_and_back(name: str) -> None:
    event, fields = GOLDEN[name]
    value = f'{{"type":"{name}",{fields}}}'.encode()
    assert encode(event) == value
    assert decode(value) == event


def test_every_event_has_golden_bytes() -> None:
    assert {type(event) for event, _ in GOLDEN.values()} == set(get_args(Event))


COMMANDS: dict[str, tuple[Command, str]] = {
    "deliver": (
        commands.Deliver(
            client_id="sub", lease="queue/7/18823", valid_for_s=60, attempt=1, message_id="0005",
            topic="queue/a", qos=1, retain=False, payload="/w==", payload_encoding="base64",
        ),
        ('"client_id":"sub","lease":"queue/7/18823","epoch":0,"valid_for_s":60,"attempt":1,'
        '"message_id":"0005","topic":"queue/a","qos":1,"retain":false,"payload":"/w==",'
        '"payload_encoding":"base64","expires_at":null,"valid_until":null'),
    ),
    "subscribe": (
        commands.Subscribe(client_id="sub", topic_filters=(("a/+", 1), ("b", 0))),
        '"client_id":"sub","topic_filters":[["a/+",1],["b",0]],"valid_for_s":60',
    ),
    "unsubscribe": (
        commands.Unsubscribe(client_id="sub", topic_filters=("a/+",)),
        '"client_id":"sub","topic_filters":["a/+"],"valid_for_s":60',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_encodes_to_its_golden_bytes_and_back(name: str) -> None:
    command, fields = COMMANDS[name]
    value = f'{{"type":"{name}",{fields}}}'.encode()
    assert encode(command) == value
    assert decode_command(value) == command


def test_every_command_has_golden_bytes() -> None:
    assert {type(command) for command, _ in COMMANDS.values()} == set(get_args(Command))


@pytest.mark.parametrize(
    "value", [None, b"", b"{}", b'{"type":"tick"}', b"[" * 100_000, b"base64"], ids=range(6)
)
def test_an_undecodable_command_raises_decode_error(value: bytes | None) -> None:
    if value == b"base64":
        value = encode(COMMANDS["deliver"][0]).replace(b"/w==", b"%")
    with pytest.raises(DecodeError):
        decode_command(value)


def test_unknown_fields_are_ignored_and_missing_fields_get_their_defaults() -> None:
    value = (
        b'{"new":{"x":[1]},"type":"client.connected","at":0,"node":"","client_id":"",'
        b'"connection_id":"","connected_at":253402300799999}'
    )
    event = decode(value)
    assert isinstance(event, events.ClientConnected)
    assert (event.username, event.clean_start, event.session_expiry_s) == (None, True, 0)


GOOD = encode(GOLDEN["message.published"][0])


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"{}",
        b'{"type":"client.teleported"}',
        b'{"type":5}',
        b'{"type":"node.started","at":1}',
        b"\xff\xfe",
        GOOD + b"x",
        GOOD[:-1],
        b"[" * 100_000,
        GOOD.replace(b'"qos":1', b'"qos":3'),
        GOOD.replace(b'"qos":1', b'"qos":"1"'),
        GOOD.replace(b'"qos":1', b'"qos":true'),
        GOOD.replace(b'"retain":false', b'"retain":0'),
        GOOD.replace(b'"at":1542338754123', b'"at":-1'),
        GOOD.replace(b'"at":1542338754123', b'"at":253402300800000'),
        GOOD.replace(b'"at":1542338754123', b'"at":1e400'),
        GOOD.replace(b'"queue/a"', b'""'),
        GOOD.replace(b'"queue/a"', b'"' + b"x" * 65_536 + b'"'),
        GOOD.replace(b'"queue/a"', b'"\\ud800"'),
        GOOD.replace(b'"queue/a"', b'"\xed\xa0\x80"'),
        GOOD.replace(b'"0005"', b'""'),
        GOOD.replace(b'"0005"', b'"' + b"x" * 257 + b'"'),
        GOOD.replace(b'"utf-8"', b'"rot13"'),
        GOOD.replace(b'"utf-8"', b'"base64"'),
        GOOD.replace(b'"user_properties":{', b'"user_properties":{"n":1,'),
    ],
    ids=range(30),
)
def test_an_undecodable_event_raises_decode_error(value: bytes | None) -> None:
    with pytest.raises(DecodeError):
        decode(value)


@given(st.binary())
@example(b'{"type":"message.published","payload":"\\ud800"}')
def test_any_bytes_decode_or_raise_decode_error(value: bytes) -> None:
    with suppress(DecodeError):
        decode(value)


@given(
    st.sampled_from([encode(event) for event, _ in GOLDEN.values()]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 1), st.binary(max_size=4)), max_size=4),
)
def test_a_damaged_event_decodes_or_raises_decode_error(
    value: bytes, damages: list[tuple[int, int, bytes]]
) -> None:
    for place, length, replacement in damages:
        value = value[:place] + replacement + value[place + length :]
    with suppress(DecodeError):
        decode(value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
times = st.integers(0, events.TIME_MS_MAX)
published = st.builds(
    events.MessagePublished,
    at=times,
    node=texts,
    message_id=texts.filter(bool),
    topic=texts.filter(bool),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    client_id=texts.filter(lambda text: "\0" not in text),
    username=st.none() | texts,
    payload=texts,
    payload_encoding=st.just("utf-8"),
    published_at=times,
    expires_at=st.none() | times,
    user_properties=st.dictionaries(texts, texts, max_size=3),
)


@given(published)
def test_an_encoded_event_decodes_to_itself(event: events.MessagePublished) -> None:
    assert decode(encode(event)) == event


@given(st.binary())
@example(b"")
@example(b"\xff\x00")
@example("é".encode())
def test_a_payload_keeps_its_bytes(payload: bytes) -> None:
    text, encoding = payload_text(payload)
    event = decode(
        encode(events.MessagePublished(**PUBLISH, payload=text, payload_encoding=encoding))
    )
    assert isinstance(event, events.MessagePublished)
    assert payload_bytes(event) == payload
