"""What EMQX's rule engine says of an event, as its Kafka data bridge wrote it: one JSON object, made canonical.

Messages are read whole. Clients are read as far as rule events go: they have no `session.created`, `.resumed` or
`.terminated`, so these follow from the connects.

- A connect with `clean_start` begins a session: `session.created` is told, with the time of the connect, then
  `client.connected`. What was subscribed before is over. One that comes late takes nothing away: the agent keeps what
  was subscribed since, and ignores a session older than the one it knows; a subscription that comes after its session's
  successor is ignored, too. An UNSUBSCRIBE that comes before its SUBSCRIBE ends nothing: then the filter stays.
- A connect without `clean_start` changes nothing of the session: whether EMQX had kept one is not told.
- A disconnect ends the connection, never the session. A rule's `client.disconnected` does not say when the session
  expires (no version's does), and looking back at the connect is no way out: that may be in another partition, or not yet
  here. So the subscriptions of a clean session stay known until the client comes back with `clean_start`. They do nothing
  until then: who is offline is not served.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint, shared
from millpond.schemas import codec
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import (
    TIME_MS_MAX,
    ClientConnected,
    ClientDisconnected,
    ClientId,
    Event,
    MessageAcked,
    MessageDelivered,
    MessageId,
    MessagePublished,
    PayloadEncoding,
    QoS,
    SessionCreated,
    SessionSubscribed,
    SessionUnsubscribed,
    Text,
    TimeMs,
    Topic,
)
from millpond.schemas.keys import RESERVED_TOPIC_PREFIX
from millpond.schemas.topics import filter_error, split_share, topic_name_error

NEVER_EXPIRES_S: Final = 0xFFFF_FFFF  # [MQTT5-3.1.2-11.2]
UNDEFINED: Final = "undefined"  # how an Erlang term for "none" becomes JSON

Undefined: TypeAlias = Literal["undefined"] | None
Count: TypeAlias = Annotated[int, Meta(ge=0)]


def own_topic(mountpoint: Mountpoint | None, client_id: str, topic: str) -> str:
    """A topic, or plain filter, as its client gave it; one that is not below the client's mountpoint stays as it is."""
    return topic if mountpoint is None else topic.removeprefix(mountpoint.of(client_id))


# -- what the rule engine writes


class EventHead(Struct, gc=False):
    """What any rule event says."""

    event: str


class RuleEvent(Struct, kw_only=True, gc=False):
    """What each that is read says besides."""

    timestamp: TimeMs
    node: Text


class Flags(Struct, gc=False):
    """Of a PUBLISH packet."""

    retain: bool = False


class Properties(Struct, gc=False):
    """Of a PUBLISH packet (MQTT 5.0, 3.3.2.3)."""

    expiry_interval_s: Count | Undefined = field(name="Message-Expiry-Interval", default=None)
    user: dict[str, str] | Undefined = field(name="User-Property", default=None)


class PublishEvent(RuleEvent, kw_only=True, gc=False):
    """`message.publish`; `clientid` is the publisher."""

    id: MessageId
    clientid: ClientId
    username: Text | None = None
    topic: Topic
    qos: QoS
    payload: str | None = None
    payload_b64: str | None = None
    flags: Flags | Undefined = None
    pub_props: Properties | Undefined = None
    publish_received_at: TimeMs | Undefined = None


class ReceiptEvent(RuleEvent, kw_only=True, gc=False):
    """`message.delivered` and `message.acked`; `clientid` is the receiver."""

    id: MessageId
    clientid: ClientId
    from_clientid: Text | None = None
    topic: Topic
    qos: QoS


class ConnectedEvent(RuleEvent, kw_only=True, gc=False):
    """`client.connected`."""

    clientid: ClientId
    username: Text | None = None
    peername: Text | None = None
    proto_name: Text | None = None
    clean_start: bool
    expiry_interval: Count | Undefined = None
    connected_at: TimeMs


class DisconnectedEvent(RuleEvent, kw_only=True, gc=False):
    """`client.disconnected`; `connected_at` since EMQX 5.8.6."""

    clientid: ClientId
    reason: Text
    peername: Text | None = None
    connected_at: TimeMs | Undefined = None
    disconnected_at: TimeMs | Undefined = None


class SubscriptionEvent(RuleEvent, kw_only=True, gc=False):
    """`session.subscribed` and `session.unsubscribed`; `topic` is the filter, with `$share/{group}/`."""

    clientid: ClientId
    topic: Topic
    qos: QoS | Undefined = None


# -- made canonical


def read(value: bytes | None, mountpoint: Mountpoint | None = None) -> tuple[Event, ...]:
    """The canonical events in a record that EMQX wrote; none, if it tells what nobody needs.

    Raises:
        DecodeError: not JSON, no rule event, a missing or mistyped field, a payload that is not base64, a topic or
            filter that cannot be. Nothing else is ever raised.
    """
    if value is None:
        raise DecodeError("the record has no value")
    try:
        name = _head.decode(value).event
        reader = _READERS.get(name)
        if reader is None:
            if name in UNNEEDED:
                return ()
            raise DecodeError(f"no rule event is called {name[:100]!r}")
        return reader(value, mountpoint)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error


def _published(value: bytes, mountpoint: Mountpoint | None) -> tuple[Event, ...]:
    rule = _publish.decode(value)
    topic = _topic(rule, mountpoint)
    if topic is None:
        return ()
    received_at = _present(rule.publish_received_at) or rule.timestamp
    flags, properties = _present(rule.flags), _present(rule.pub_props) or Properties()
    expiry_s = _present(properties.expiry_interval_s)
    payload, encoding = _payload(rule)
    published = MessagePublished(
        at=rule.timestamp, node=rule.node, message_id=rule.id, topic=topic, qos=rule.qos,
        retain=flags is not None and flags.retain, client_id=rule.clientid,
        username=_present(rule.username), payload=payload, payload_encoding=encoding,
        published_at=received_at,
        expires_at=None if expiry_s is None else min(received_at + expiry_s * 1000, TIME_MS_MAX),
        user_properties=_present(properties.user) or {},
    )  # fmt: skip
    return (published,)


def _payload(rule: PublishEvent) -> tuple[str, PayloadEncoding]:
    """From base64 if the rule's SQL gives that: bytes that are no UTF-8 do not survive as JSON text."""
    if rule.payload_b64 is not None:
        return codec.payload_text(b64decode(rule.payload_b64, validate=True))
    if rule.payload is None:
        raise DecodeError("the message has no payload")
    return rule.payload, "utf-8"


def _delivered(value: bytes, mountpoint: Mountpoint | None) -> tuple[Event, ...]:
    return _receipt(MessageDelivered, value, mountpoint)


def _acked(value: bytes, mountpoint: Mountpoint | None) -> tuple[Event, ...]:
    return _receipt(MessageAcked, value, mountpoint, broker_delivers=mountpoint is None)


def _receipt(
    kind: type[MessageDelivered | MessageAcked],
    value: bytes,
    mountpoint: Mountpoint | None,
    **marks: bool,
) -> tuple[Event, ...]:
    rule = _receipts.decode(value)
    topic = _topic(rule, mountpoint)
    if topic is None:
        return ()
    told = kind(
        at=rule.timestamp, node=rule.node, message_id=rule.id, topic=topic,
        client_id=rule.clientid, from_client_id=_present(rule.from_clientid), qos=rule.qos, **marks,
    )  # fmt: skip
    return (told,)


def _topic(rule: PublishEvent | ReceiptEvent, mountpoint: Mountpoint | None) -> str | None:
    """The topic without its mountpoint; None if it is a way of Millpond's own.

    EMQX runs rules before it calls ExHook: a copy that Millpond sends is seen on its way, below `$millpond/`.
    """
    topic = own_topic(mountpoint, rule.clientid, rule.topic)
    error = topic_name_error(topic)
    if error is not None:
        raise DecodeError(error)
    return None if topic.startswith(RESERVED_TOPIC_PREFIX) else topic


def _connected(value: bytes, mountpoint: Mountpoint | None) -> tuple[Event, ...]:
    rule = _connects.decode(value)
    expiry_s = _present(rule.expiry_interval) or 0
    connected = ClientConnected(
        at=rule.timestamp, node=rule.node, client_id=rule.clientid,
        username=_present(rule.username), connection_id=_connection_id(rule),
        connected_at=rule.connected_at, clean_start=rule.clean_start,
        session_expiry_s=min(expiry_s, NEVER_EXPIRES_S),
        protocol=_present(rule.proto_name) or "MQTT",
    )  # fmt: skip
    if not rule.clean_start:
        return (connected,)
    created = SessionCreated(
        at=rule.timestamp, node=rule.node, client_id=rule.clientid, began_at=rule.connected_at
    )
    return created, connected


def _disconnected(value: bytes, mountpoint: Mountpoint | None) -> tuple[Event, ...]:
    rule = _disconnects.decode(value)
    at = _present(rule.disconnected_at)
    disconnected = ClientDisconnected(
        at=rule.timestamp if at is None else at, node=rule.node, client_id=rule.clientid,
        connection_id=_connection_id(rule), reason=rule.reason,
    )  # fmt: skip
    return (disconnected,)


def _connection_id(rule: ConnectedEvent | DisconnectedEvent) -> str:
    """What tells a connection from every other one of its client: node and peer address, else when it began."""
    peer = _present(rule.peername)
    if peer is not None:
        return f"{rule.node}/{peer}"
    began = _present(rule.connected_at)
    if began is None:
        raise DecodeError("the event has neither peername nor connected_at")
    return f"{rule.node}/{began}"


def _subscribed(value: bytes, mountpoint: Mountpoint | None) -> tuple[Event, ...]:
    rule = _subscriptions.decode(value)
    qos = _present(rule.qos)
    if qos is None:
        raise DecodeError("the subscription has no QoS")
    topic_filter = _filter(rule, mountpoint)
    reachable = mountpoint is None or (
        topic_filter != rule.topic and mountpoint.can_serve(rule.clientid)
    )
    subscribed = SessionSubscribed(
        at=rule.timestamp, node=rule.node, client_id=rule.clientid, topic_filter=topic_filter,
        qos=qos, broker_delivers=mountpoint is None, reachable=reachable,
    )  # fmt: skip
    return (subscribed,)


def _unsubscribed(value: bytes, mountpoint: Mountpoint | None) -> tuple[Event, ...]:
    rule = _subscriptions.decode(value)
    unsubscribed = SessionUnsubscribed(
        at=rule.timestamp, node=rule.node, client_id=rule.clientid,
        topic_filter=_filter(rule, mountpoint),
    )  # fmt: skip
    return (unsubscribed,)


def _filter(rule: SubscriptionEvent, mountpoint: Mountpoint | None) -> str:
    """The filter as its client gave it: the mountpoint stands behind `$share/{group}/`."""
    group, plain = split_share(rule.topic)
    topic_filter = shared(group, own_topic(mountpoint, rule.clientid, plain))
    error = filter_error(topic_filter)
    if error is not None:
        raise DecodeError(error)
    return topic_filter


def _present(value: Any) -> Any:
    """A value that is one."""
    return None if value == UNDEFINED else value


_head: Final = msgspec.json.Decoder(EventHead)
_publish: Final = msgspec.json.Decoder(PublishEvent)
_receipts: Final = msgspec.json.Decoder(ReceiptEvent)
_connects: Final = msgspec.json.Decoder(ConnectedEvent)
_disconnects: Final = msgspec.json.Decoder(DisconnectedEvent)
_subscriptions: Final = msgspec.json.Decoder(SubscriptionEvent)

EventReader: TypeAlias = Callable[[bytes, Mountpoint | None], tuple[Event, ...]]


def _spellings(name: str) -> tuple[str, ...]:
    """How `client.connected` is called: in `event`, in `event_type`, as a rule's topic up to 5.9, and since 5.10."""
    old, new = name.replace(".", "_"), name.replace(".", "/")
    return name, old, f"$events/{old}", f"$events/{new}"


_READERS: Final[dict[str, EventReader]] = {
    spelling: reader
    for name, reader in (
        ("message.publish", _published),
        ("message.delivered", _delivered),
        ("message.acked", _acked),
        ("client.connected", _connected),
        ("client.disconnected", _disconnected),
        ("session.subscribed", _subscribed),
        ("session.unsubscribed", _unsubscribed),
    )
    for spelling in _spellings(name)
}

# The other events that a rule can select, `$events/#` among them: no agent needs them.
UNNEEDED: Final = frozenset(
    spelling
    for name in (
        "message.dropped", "delivery.dropped", "message.delivery_dropped", "client.connack",
        "client.ping", "client.check_authz_complete", "client.check_authn_complete",
        "client.check_acl_complete", "auth.check_authz_complete", "auth.check_authn_complete",
        "sys.alarm_activated", "sys.alarm_deactivated", "alarm.activated", "alarm.deactivated",
        "schema.validation_failed", "schema_validation.failed", "message.transformation_failed",
        "message_transformation.failed",
    )
    for spelling in _spellings(name)
)  # fmt: skip
