"""User commands: which are allowed, which values enter them, and which must not run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.schemas import events
from millpond.schemas.codec import encode
from millpond.schemas.rules.command_keys import is_known, known_commands
from millpond.schemas.rules.rule import HOOKS
from millpond.schemas.rules.user_commands import (
    FORBIDDEN,
    VARIABLES,
    Values,
    command_error,
    command_values,
    forbidden_key,
    substitute,
)

CLIENT: dict[str, Any] = {"at": 1_999, "node": "n", "client_id": "c"}
MESSAGE = {**CLIENT, "message_id": "m", "topic": "t", "qos": 2}
PUBLISHED = events.MessagePublished(
    **MESSAGE, username="u", retain=False, payload="/w==", payload_encoding="base64", published_at=5
)
OF_HOOK: dict[str, events.Event] = {
    "client.connected": events.ClientConnected(
        **CLIENT, username="u", connection_id="x", connected_at=5
    ),
    "client.disconnected": events.ClientDisconnected(**CLIENT, connection_id="x", reason="normal"),
    "session.created": events.SessionCreated(**CLIENT),
    "session.subscribed": events.SessionSubscribed(**CLIENT, topic_filter="t", qos=2),
    "session.unsubscribed": events.SessionUnsubscribed(**CLIENT, topic_filter="t"),
    "message.publish": PUBLISHED,
    "message.delivered": events.MessageDelivered(**MESSAGE),
    "message.acked": events.MessageAcked(**MESSAGE),
}
EXPECTED = {
    "clientid": "c", "username": "u", "topic": "t", "qos": "2", "msgid": "m", "payload": b"\xff",
    "message": encode(PUBLISHED), "node": "n", "ts": "1",
}  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_the_event_of_a_hook_has_a_value_for_each_variable(hook: str) -> None:
    assert command_values(OF_HOOK[hook]) == {name: EXPECTED[name] for name in VARIABLES[hook]}


def test_an_absent_username_is_missing_and_other_events_have_no_values() -> None:
    anonymous = events.ClientConnected(**CLIENT, connection_id="x", connected_at=5)
    assert "username" not in command_values(anonymous)
    assert command_values(events.NodeStarted(at=1, node="n")) == {}


@pytest.mark.parametrize(
    "command",
    [
        "HSET ack:${clientid} ${topic} ${msgid}",
        "DEL mqtt:acked:${clientid}:${topic}",
        "incr seen:${msgid}",
        "SET $x {y} $ a}b ${qos}${qos}",
        "SET k millpond:",
        "GET",
        "TIME",
    ],
)
def test_a_command_on_named_keys_is_allowed(command: str) -> None:
    assert command_error("message.acked", command.split(" ")) is None


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("", "empty"),
        (" ", "empty"),
        ("SET  k v", "one space"),
        (" SET k v", "one space"),
        ("SET k v ", "one space"),
        ("${topic} k", "name of a command"),
        ("SET k ${payload}", "message.acked has no ${payload}, only ${clientid} ${topic}"),
        ("SET k ${}", "${}"),
        ("SET k ${topic", "not closed"),
        ("SET k ${client id}", "not closed"),
        ("SET millpond:{a} v", "Millpond's own"),
        ("mset k v millpond: v", "Millpond's own"),
        ("JSON.MGET a millpond:{a} $", "Millpond's own"),
        ("flushall", "flushall works on the whole keyspace"),
        ("KEYS *", "whole keyspace"),
        ("SCAN 0", "whole keyspace"),
        ("SWAPDB 0 1", "whole keyspace"),
        ("MIGRATE h 1 k 0 5", "whole keyspace"),
        ("CONFIG SET a b", "administers"),
        ("BLPOP k 0", "waits"),
        ("AUTH x", "connection"),
        ("MULTI", "transaction"),
        ("PUBLISH c m", "publishes"),
        ("EVAL x 0", "script"),
        ("FUNCTION LIST", "script"),
    ],
)
def test_any_other_command_is_refused_with_a_reason(command: str, reason: str) -> None:
    assert reason in str(command_error("message.acked", command.split(" ")))


def test_no_command_is_forbidden_twice() -> None:
    names = " ".join(FORBIDDEN.values()).split()
    assert len(names) == len(set(names))


def test_values_enter_after_the_split() -> None:
    fields = ["HSET", "ack:${clientid}:${unknown}", "${topic}", "${payload}"]
    values: Values = {"clientid": "ü 1", "topic": "a b", "payload": b"\xff  ${topic}"}
    arguments = substitute(fields, values)
    assert arguments == [b"HSET", "ack:ü 1:".encode(), b"a b", b"\xff  ${topic}"]


@given(st.binary())
def test_any_payload_stays_one_argument(payload: bytes) -> None:
    arguments = substitute(["SET", "<${payload}>", "${payload}"], {"payload": payload})
    assert arguments == [b"SET", b"<" + payload + b">", payload]


PRIVATE = "millpond:{app:queue:7}:applied"


@pytest.mark.parametrize(
    "command",
    [
        "SET ${topic} 1",
        "set ${topic} 1",
        "RENAME a ${topic}",
        "MSET a 1 ${topic} 2",
        "DEL a b ${topic}",
        "BITOP AND a ${topic}",
        "XGROUP CREATE ${topic} g $",
        "ZUNIONSTORE a 1 ${topic}",
        "SORT a STORE ${payload}",
        "SET ${payload} 1",
        "JSON.MGET a ${topic} $",
    ],
)
def test_a_key_that_became_a_private_key_is_refused(command: str) -> None:
    fields = command.split(" ")
    values: Values = {"topic": PRIVATE, "payload": PRIVATE.encode()}
    assert f"key of {fields[0]} begins" in str(forbidden_key(fields, substitute(fields, values)))
    harmless: Values = {"topic": "a/millpond:", "payload": b"p"}
    assert forbidden_key(fields, substitute(fields, harmless)) is None


@pytest.mark.parametrize(
    "command",
    [
        "SET last ${payload}",
        "HSET last:${topic} ${clientid} ${payload}",
        "hset last ${topic} ${topic}",
        "MSET a ${payload} b ${topic}",
        "LPUSH log ${payload} ${topic}",
        "XADD log * ${topic} ${payload}",
        "BITOP ${topic} a b",
        "SMOVE a b ${payload}",
        "JSON.SET doc $ ${payload}",
        "TIME",
    ],
)
def test_a_value_that_is_no_key_is_never_judged(command: str) -> None:
    fields = command.split(" ")
    values: Values = {"topic": PRIVATE, "payload": PRIVATE.encode(), "clientid": PRIVATE}
    assert forbidden_key(fields, substitute(fields, values)) is None


def test_each_command_of_the_table_stands_there_once() -> None:
    names = known_commands()
    assert len(names) == len(set(names))
    assert all(is_known(name) and is_known(name.lower()) for name in names)
    assert not is_known("JSON.SET")
    assert not any(command_error("message.acked", (name, "k")) for name in names)
