"""The translation of EMQX's rule events, as its Kafka sink writes them, into canonical events.

A rule event is one JSON object. Messages, deliveries and acknowledgements have all that a canonical event needs.

Rule events of clients have no `session.created`, `.resumed` or `.terminated`. So the sessions follow from connects:

- A connect with `clean_start` begins a session. It becomes `session.created` with the time of the connect, and then
  `client.connected`. The sessions agent ends the older subscriptions.
- A connect without `clean_start` changes nothing of the session. The event does not say whether EMQX had kept one.
- A disconnect ends the connection, never the session. No version of EMQX puts the session expiry into
  `client.disconnected`. The connect has it, but may be in another partition, or arrive later. So the subscriptions of a
  clean session stay known until the client connects with `clean_start`. Offline clients are not served meanwhile.

Events may arrive late or twice. The sessions agent uses the time of `session.created`:

- A late `session.created` keeps the subscriptions that are newer than it.
- An older session than the known one is ignored. So are subscriptions of an older session.
- An UNSUBSCRIBE that arrives before its SUBSCRIBE has no effect, and the filter stays subscribed.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
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
from millpond.schemas.topics import (
    filter_error,
    shared,
    split_share,
    standard_filter,
    topic_name_error,
)

NEVER_EXPIRES_S: Final = 0xFFFF_FFFF  # [MQTT5-3.1.2-11.2]
UNDEFINED: Final = "undefined"  # EMQX's JSON for Erlang's `undefined`: no value

Undefined: TypeAlias = Literal["undefined"] | None
Count: TypeAlias = Annotated[int, Meta(ge=0)]


def own_topic(mountpoint: Mountpoint | None, client_id: str, topic: str) -> str:
    """A topic, or a filter without a group, as its client wrote it. Outside the mountpoint it stays unchanged."""
    return topic if mountpoint is None else topic.removeprefix(mountpoint.of(client_id))


# -- the objects that EMQX writes


class EventHead(Struct, gc=False):
    """The field that names the event."""

    event: str


class RuleEvent(Struct, kw_only=True, gc=False):
    """The fields that all events below share."""

    timestamp: TimeMs
    node: Text


class Flags(Struct, gc=False):
    """The flags of a PUBLISH packet."""

    retain: bool = False


class Properties(Struct, gc=False):
    """The properties of a PUBLISH packet (MQTT 5.0, 3.3.2.3)."""

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


# -- translation


def read(value: bytes | None, mountpoint: Mountpoint | None = None) -> tuple[Event, ...]:
    """The canonical events of a record that EMQX wrote. Empty for a rule event that no agent needs.

    Raises:
        DecodeError: not JSON, no rule event, a missing or mistyped field, a payload that is not base64, or an invalid
            topic or filter. Nothing else is ever raised.
    """
    if value is None:
        raise DecodeError("the record has no value")
    try:
        name = _head.decode(value).event
        reader = _READERS.get(name)
        if reader is None:
            if name in UNNEEDED:
                return ()
            raise DecodeError(f"unknown rule event {name[:100]!r}")
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
    """The payload, from `payload_b64` if the rule's SQL has it: non-UTF-8 bytes do not survive as JSON text."""
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
    receipt = kind(
        at=rule.timestamp, node=rule.node, message_id=rule.id, topic=topic,
        client_id=rule.clientid, from_client_id=_present(rule.from_clientid), qos=rule.qos, **marks,
    )  # fmt: skip
    return (receipt,)


def _topic(rule: PublishEvent | ReceiptEvent, mountpoint: Mountpoint | None) -> str | None:
    """The topic without its mountpoint. None for Millpond's own topics.

    EMQX runs rules before it calls ExHook. So rules see the copies of `millpond bridge emqx`, still below `$millpond/`.
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
    """The identity of a connection among those of its client: node and peer address, or else its start time."""
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
        topic_filter != standard_filter(rule.topic) and mountpoint.can_serve(rule.clientid)
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
    """The filter as its client wrote it. In a shared one the mountpoint stands behind the group."""
    group, plain = split_share(rule.topic)
    topic_filter = shared(group, own_topic(mountpoint, rule.clientid, plain))
    error = filter_error(topic_filter)
    if error is not None:
        raise DecodeError(error)
    return topic_filter


def _present(value: Any) -> Any:
    """The value, or None for EMQX's `undefined`."""
    return None if value == UNDEFINED else value


_head: Final = msgspec.json.Decoder(EventHead)
_publish: Final = msgspec.json.Decoder(PublishEvent)
_receipts: Final = msgspec.json.Decoder(ReceiptEvent)
_connects: Final = msgspec.json.Decoder(ConnectedEvent)
_disconnects: Final = msgspec.json.Decoder(DisconnectedEvent)
_subscriptions: Final = msgspec.json.Decoder(SubscriptionEvent)

EventReader: TypeAlias = Callable[[bytes, Mountpoint | None], tuple[Event, ...]]


def _spellings(name: str) -> tuple[str, ...]:
    """The names of `client.connected` in `event`, in `event_type`, as a rule's topic up to 5.9, and since 5.10."""
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

# The other events that a rule can select, for example with `$events/#`. No agent needs them.
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
