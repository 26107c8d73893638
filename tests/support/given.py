"""Rules, events and records for the Given part of tests. Defaults stand for what a test does not care about."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from millpond.agents.ports import Record
from millpond.schemas import codec, keys
from millpond.schemas.events import (
    AgentName,
    Event,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    MessageRetained,
    SubscriberJoined,
    SubscriberLeft,
    Tick,
)
from millpond.schemas.rules import Rules
from millpond.schemas.rules.toml import parse_toml

POOL = '[pool.pool1]\nserver = "127.0.0.1:6379"\n'


def a_rule(**settings: Any) -> str:
    """Write one `[[rule]]` table in TOML."""
    lines = ["[[rule]]"]
    for name, value in {"pool": "pool1", **settings}.items():
        match value:
            case bool():
                text = "true" if value else "false"
            case str():
                text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            case _:
                text = repr(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"


def rules(*tables: str) -> Rules:
    """Make a rule set of `[[rule]]` tables, on one pool."""
    return parse_toml(POOL + "".join(tables), "millpond.toml")


def store(topic: str = "#", **settings: Any) -> str:
    """A rule that stores messages."""
    return a_rule(hook="message.publish", topic=topic, action="on_message_publish", **settings)


def retain(topic: str = "#", **settings: Any) -> str:
    """A rule that stores retained messages."""
    return a_rule(hook="message.publish", topic=topic, action="on_message_retain", **settings)


def clear_retained(topic: str = "#") -> str:
    """A rule that lets an empty retained publish clear the retained message."""
    return a_rule(hook="message.publish", topic=topic, action="on_retain_delete")


def receipt(hook: str = "message.acked", topic: str = "#", **settings: Any) -> str:
    """A rule that writes receipts."""
    return a_rule(hook=hook, topic=topic, action="on_message_receipt", **settings)


def command(text: str, hook: str = "message.publish", topic: str = "#") -> str:
    """A rule with a user command."""
    return a_rule(hook=hook, topic=topic, commands=[text])


def published(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessagePublished:
    """A QoS 1 publish."""
    values: dict[str, Any] = {
        "at": 1_000, "node": "n", "qos": 1, "retain": False, "client_id": "pub",
        "payload": "hello", "published_at": 1_000, **fields,
    }  # fmt: skip
    return MessagePublished(message_id=message_id, topic=topic, **values)


def retained(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessageRetained:
    """A bridge's event about a message that the broker retains."""
    return broker_retains(published(message_id, topic, **fields))


def broker_retains(event: MessagePublished) -> MessageRetained:
    """A bridge's event, after it found this publish retained at the broker."""
    return MessageRetained(**structs.asdict(event))


def acked(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessageAcked:
    """An acknowledgement by one subscriber."""
    values: dict[str, Any] = {"at": 5_000, "node": "n", "client_id": "sub", "qos": 1, **fields}
    return MessageAcked(message_id=message_id, topic=topic, **values)


def delivered(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessageDelivered:
    """A delivery to one subscriber, as the broker reports it."""
    values: dict[str, Any] = {"at": 4_000, "node": "n", "client_id": "sub", "qos": 1, **fields}
    return MessageDelivered(message_id=message_id, topic=topic, **values)


def key_and_value(event: Event) -> tuple[bytes, bytes]:
    """Encode an event as the key and value of a record."""
    return keys.record_key(event).encode(), codec.encode(event)


def record(event: Event, offset: int, timestamp: int) -> Record:
    """An event as a record of the log."""
    return Record(offset, timestamp, *key_and_value(event))


def tick(agent: AgentName) -> Tick:
    """A tick for an agent."""
    return Tick(at=0, node="n", agent=agent)


def queue(topic: str = "queue/#", **settings: Any) -> str:
    """A delivery rule of queue."""
    return a_rule(
        hook="session.subscribed", topic=topic, action="on_message_fetch_for_queue", **settings
    )


def pubsub(topic: str = "pubsub/#", **settings: Any) -> str:
    """A delivery rule of pubsub."""
    return a_rule(
        hook="session.subscribed", topic=topic, action="on_message_fetch_for_pubsub", **settings
    )


def joined(client: str, topic_filter: str, **fields: Any) -> SubscriberJoined:
    """An announcement: a member joined."""
    values = {"at": 0, "node": "n", "qos": 1, "session": 1, "source_offset": 0, **fields}
    return SubscriberJoined(client_id=client, topic_filter=topic_filter, **values)


def left(client: str, topic_filter: str, **fields: Any) -> SubscriberLeft:
    """An announcement: a member left."""
    values = {
        "at": 0, "node": "n", "session": 1, "source_offset": 0, "reason": "session_ended", **fields,
    }  # fmt: skip
    return SubscriberLeft(client_id=client, topic_filter=topic_filter, **values)
