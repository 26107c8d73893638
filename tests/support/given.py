"""What tests are given: rules, events and records, in few words."""

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
    """One `[[rule]]`, its values written as TOML."""
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
    """A rule set of these `[[rule]]` tables."""
    return parse_toml(POOL + "".join(tables), "millpond.toml")


def store(topic: str = "#", **settings: Any) -> str:
    """Messages of the topic are kept."""
    return a_rule(hook="message.publish", topic=topic, action="on_message_publish", **settings)


def retain(topic: str = "#", **settings: Any) -> str:
    """The topic's retained message is kept."""
    return a_rule(hook="message.publish", topic=topic, action="on_message_retain", **settings)


def clear_retained(topic: str = "#") -> str:
    """An empty retained publish clears what the topic retains."""
    return a_rule(hook="message.publish", topic=topic, action="on_retain_delete")


def receipt(hook: str = "message.acked", topic: str = "#", **settings: Any) -> str:
    """Who got a message, and when."""
    return a_rule(hook=hook, topic=topic, action="on_message_receipt", **settings)


def command(text: str, hook: str = "message.publish", topic: str = "#") -> str:
    """A command of the user's own."""
    return a_rule(hook=hook, topic=topic, commands=[text])


def published(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessagePublished:
    """A QoS 1 publish."""
    values: dict[str, Any] = {
        "at": 1_000, "node": "n", "qos": 1, "retain": False, "client_id": "pub",
        "payload": "hello", "published_at": 1_000, **fields,
    }  # fmt: skip
    return MessagePublished(message_id=message_id, topic=topic, **values)


def retained(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessageRetained:
    return broker_retains(published(message_id, topic, **fields))


def broker_retains(event: MessagePublished) -> MessageRetained:
    """What a bridge says that finds a publish retained."""
    return MessageRetained(**structs.asdict(event))


def acked(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessageAcked:
    """An acknowledgement by one subscriber."""
    values: dict[str, Any] = {"at": 5_000, "node": "n", "client_id": "sub", "qos": 1, **fields}
    return MessageAcked(message_id=message_id, topic=topic, **values)


def delivered(message_id: str = "m1", topic: str = "t", **fields: Any) -> MessageDelivered:
    """A delivery to one subscriber."""
    values: dict[str, Any] = {"at": 4_000, "node": "n", "client_id": "sub", "qos": 1, **fields}
    return MessageDelivered(message_id=message_id, topic=topic, **values)


def key_and_value(event: Event) -> tuple[bytes, bytes]:
    """The key and value of an event's record."""
    return keys.record_key(event).encode(), codec.encode(event)


def record(event: Event, offset: int, timestamp: int) -> Record:
    """An event as it is read from the log."""
    return Record(offset, timestamp, *key_and_value(event))


def tick(agent: AgentName) -> Tick:
    """Time in the log."""
    return Tick(at=0, node="n", agent=agent)


def queue(topic: str = "queue/#", **settings: Any) -> str:
    """The topic is a queue."""
    return a_rule(
        hook="session.subscribed", topic=topic, action="on_message_fetch_for_queue", **settings
    )


def pubsub(topic: str = "pubsub/#", **settings: Any) -> str:
    """The topic is a log with a read offset for each subscriber."""
    return a_rule(
        hook="session.subscribed", topic=topic, action="on_message_fetch_for_pubsub", **settings
    )


def joined(client: str, topic_filter: str, **fields: Any) -> SubscriberJoined:
    """A client may be served."""
    values = {"at": 0, "node": "n", "qos": 1, "session": 1, "source_offset": 0, **fields}
    return SubscriberJoined(client_id=client, topic_filter=topic_filter, **values)


def left(client: str, topic_filter: str, **fields: Any) -> SubscriberLeft:
    """A client is not to be served any more."""
    values = {
        "at": 0, "node": "n", "session": 1, "source_offset": 0, "reason": "session_ended", **fields,
    }  # fmt: skip
    return SubscriberLeft(client_id=client, topic_filter=topic_filter, **values)
