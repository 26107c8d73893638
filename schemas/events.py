"""Canonical events: what a broker saw, as one JSON object per Kafka record (README, "Events").

Times are milliseconds since the epoch. Unknown fields are ignored, so that a newer bridge may write them.
Every type is named in `Event`; nothing else decodes.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct, field

# Bounds of what is accepted from outside. The latest time is the last millisecond of the year 9999.
TIME_MS_MAX = 253_402_300_799_999
TEXT_BYTES_MAX = 65_535  # [MQTT-1.5.4]: a UTF-8 string is at most 65,535 bytes
MESSAGE_ID_LENGTH_MAX = 256  # EMQX writes 32 hex characters; others may be longer

TimeMs = Annotated[int, Meta(ge=0, le=TIME_MS_MAX)]
QoS = Annotated[int, Meta(ge=0, le=2)]
Text = Annotated[str, Meta(max_length=TEXT_BYTES_MAX)]
# A client id is part of names that a null character separates; no client may have one ([MQTT-1.5.4-2]).
ClientId = Annotated[str, Meta(max_length=TEXT_BYTES_MAX, pattern=r"^[^\0]*\Z")]
Topic = Annotated[str, Meta(min_length=1, max_length=TEXT_BYTES_MAX)]
Offset = Annotated[int, Meta(ge=0)]
MessageId = Annotated[str, Meta(min_length=1, max_length=MESSAGE_ID_LENGTH_MAX)]
PayloadEncoding = Literal["utf-8", "base64"]
AgentName: TypeAlias = Literal["sessions", "messages", "queue", "pubsub"]


class Base(Struct, frozen=True, kw_only=True, gc=False, tag_field="type"):
    """What every event says: when the bridge stamped it, and which broker node it came from."""

    at: TimeMs
    node: Text


class ClientConnected(Base, frozen=True, kw_only=True, tag="client.connected"):
    """A connection was accepted. `connection_id` tells it from every other one of that client; `told_again` in a
    snapshot.
    """

    client_id: ClientId
    username: Text | None = None
    connection_id: Text
    connected_at: TimeMs
    clean_start: bool = True
    session_expiry_s: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)] = 0
    protocol: Text = "MQTT"
    told_again: bool = False


class ClientDisconnected(Base, frozen=True, kw_only=True, tag="client.disconnected"):
    """The connection named by `connection_id` is gone."""

    client_id: ClientId
    connection_id: Text
    reason: Text


class SessionCreated(Base, frozen=True, kw_only=True, tag="session.created"):
    """A session began without earlier state.

    `began_at` is when its first connection did, on the clock of the node. It is told where events may come late or in
    another order: then what was subscribed since stays, and a session that began before is not told as a new one.
    """

    client_id: ClientId
    began_at: TimeMs | None = None


class SessionResumed(Base, frozen=True, kw_only=True, tag="session.resumed"):
    """A client came back to its session and keeps its subscriptions."""

    client_id: ClientId


class SessionSubscribed(Base, frozen=True, kw_only=True, tag="session.subscribed"):
    """One filter was granted; shared subscriptions keep their `$share/{group}/` prefix.

    `proxied` if the bridge subscribed the client to it, by a command. `retain_handling` says when retained messages
    are wanted (MQTT 5.0, 3.8.3.1): 0 always, 1 with a new subscription, 2 never. `told_again` in a snapshot, where it
    is no SUBSCRIBE. `broker_delivers` where the bridge cannot reach this client alone: then the broker routes to it
    what is published from now on, and Millpond hands it only what was stored before. Not `reachable` where Millpond
    delivers, and the bridge cannot reach this client: no delivery agent serves it.
    """

    client_id: ClientId
    topic_filter: Topic
    qos: QoS
    proxied: bool = False
    broker_delivers: bool = False
    reachable: bool = True
    retain_handling: Annotated[int, Meta(ge=0, le=2)] = 0
    told_again: bool = False


class SessionUnsubscribed(Base, frozen=True, kw_only=True, tag="session.unsubscribed"):
    """One filter was given up."""

    client_id: ClientId
    topic_filter: Topic


class SessionTerminated(Base, frozen=True, kw_only=True, tag="session.terminated"):
    """A session ended for good, with its subscriptions."""

    client_id: ClientId
    reason: Text


class SessionDiscarded(Base, frozen=True, kw_only=True, tag="session.discarded"):
    """A clean start threw the client's earlier session away."""

    client_id: ClientId


class SessionTakenOver(Base, frozen=True, kw_only=True, tag="session.takenover"):
    """A newer connection of the client took its session."""

    client_id: ClientId


class ControlSubscribe(Base, frozen=True, kw_only=True, tag="control.subscribe"):
    """An application wants a client subscribed; written by the worker that heard of it."""

    client_id: ClientId
    topic_filter: Topic
    qos: QoS


class ControlUnsubscribe(Base, frozen=True, kw_only=True, tag="control.unsubscribe"):
    """An application wants a client's subscription ended; written by the worker that heard of it."""

    client_id: ClientId
    topic_filter: Topic


class NodeStarted(Base, frozen=True, kw_only=True, tag="node.started"):
    """A broker node came up; written to every partition."""


class NodeStopped(Base, frozen=True, kw_only=True, tag="node.stopped"):
    """A broker node went down; written to every partition."""


class NodeSyncStarted(Base, frozen=True, kw_only=True, tag="node.sync.started"):
    """A snapshot of the node's clients and subscriptions follows, up to its `completed`."""

    sync_id: Text


class NodeSyncCompleted(Base, frozen=True, kw_only=True, tag="node.sync.completed"):
    """The snapshot `sync_id` is whole."""

    sync_id: Text


class Message(Base, frozen=True, kw_only=True):
    """A message as its publisher gave it. `message_id` is the broker's own and is kept as it is."""

    message_id: MessageId
    topic: Topic
    qos: QoS
    retain: bool
    client_id: ClientId
    username: Text | None = None
    payload: str
    payload_encoding: PayloadEncoding = "utf-8"
    published_at: TimeMs
    expires_at: TimeMs | None = None
    user_properties: dict[str, str] = field(default_factory=dict)


class MessagePublished(Message, frozen=True, kw_only=True, tag="message.published"):
    """A client published."""


class MessageRetained(Message, frozen=True, kw_only=True, tag="message.retained"):
    """What the broker retains of a topic now, as a bridge found it that had to ask: a publish that may have been told
    before, without its retain flag. With an empty payload nothing is retained.
    """


class MessageDelivered(Base, frozen=True, kw_only=True, tag="message.delivered"):
    """The broker handed one message to one client."""

    message_id: MessageId
    topic: Topic
    client_id: ClientId
    from_client_id: Text | None = None
    qos: QoS


class MessageAcked(Base, frozen=True, kw_only=True, tag="message.acked"):
    """One client acknowledged one message (PUBACK, or PUBREC at QoS 2); `broker_delivers` if its broker may have routed
    the message to it, and not Millpond handed it over.
    """

    message_id: MessageId
    topic: Topic
    client_id: ClientId
    from_client_id: Text | None = None
    qos: QoS
    broker_delivers: bool = False


class SubscriberJoined(Base, frozen=True, kw_only=True, tag="subscriber.joined"):
    """A client may now be served by the delivery agents; written by sessions.

    `topic_filter` is the client's own, with `$share/{group}/` if it has one. `session` names the session: the
    offset, in the client's partition of mqtt.clients, of the connect that created it. `source_offset` is that of
    the event which this follows from; of two records about one client and filter the higher one holds.
    `broker_delivers` as in `SessionSubscribed`. `subscribed_at` is the log's time at the subscription itself: nothing
    published after its SUBACK is older.
    """

    client_id: ClientId
    topic_filter: Topic
    qos: QoS
    session: Offset
    source_offset: Offset
    broker_delivers: bool = False
    subscribed_at: TimeMs = 0


class SubscriberLeft(Base, frozen=True, kw_only=True, tag="subscriber.left"):
    """A client is no longer to be served; see `SubscriberJoined`."""

    client_id: ClientId
    topic_filter: Topic
    reason: Literal["unsubscribed", "session_ended", "disconnected"]
    session: Offset
    source_offset: Offset


class Sent(Struct, frozen=True, array_like=True, gc=False):
    """One copy that the broker has handed over: `alias` is the id that it gave the copy, if that is another than the
    message's; nobody acknowledges a copy of `qos` 0.
    """

    lease: Text
    client_id: ClientId
    message_id: MessageId
    alias: MessageId | None = None
    qos: QoS = 1


class DeliveriesSent(Base, frozen=True, kw_only=True, tag="deliveries.sent"):
    """A bridge has handed these copies to its broker, in this order."""

    agent: AgentName
    sent: tuple[Sent, ...]


class DeliveryFailed(Base, frozen=True, kw_only=True, tag="delivery.failed"):
    """A copy was not handed over: the client is not there, the command came too late (or after one of its epoch that
    failed), the broker refused; or, before a command was written, the message was gone from the store, or too large.
    """

    agent: AgentName
    lease: Text
    client_id: ClientId
    message_id: MessageId
    reason: Literal["no_client", "stale", "bridge", "gone", "too_large"]


class MembersActive(Base, frozen=True, kw_only=True, tag="members.active"):
    """These clients have acknowledged copies, perhaps only copies of other partitions: the time for the acknowledgement
    of what they have of this one starts again. Written to the agent's partition, by the bridge that knows of the copies.
    """

    agent: AgentName
    client_ids: tuple[ClientId, ...]


class OperatorRequeue(Base, frozen=True, kw_only=True, tag="operator.requeue"):
    """Deliver a dead letter of a topic once more, as if for the first time, behind what waits there by now."""

    topic: Topic
    message_id: MessageId


class OperatorDrop(Base, frozen=True, kw_only=True, tag="operator.drop"):
    """Delete a dead letter of a topic."""

    topic: Topic
    message_id: MessageId


class OperatorRewind(Base, frozen=True, kw_only=True, tag="operator.rewind"):
    """Have one subscriber of a pubsub topic read on behind a place in the log: a score of the topic's index.

    `message_id` is what its read offset shows from then on: the last message that is not behind that place, if any.
    """

    topic: Topic
    subscriber: Text
    after: Annotated[int, Meta(ge=0)]
    message_id: MessageId | None = None


class RulesChanged(Base, frozen=True, kw_only=True, tag="rules.changed"):
    """From this record on, `agent` folds its partition by `rules` (canonical JSON of the rule set)."""

    agent: AgentName
    rules: str


class Tick(Base, frozen=True, kw_only=True, tag="tick"):
    """Time in the log: `agent` does what is due at this record's timestamp."""

    agent: AgentName


# fmt: off
Event: TypeAlias = (
    ClientConnected | ClientDisconnected | SessionCreated | SessionResumed | SessionSubscribed
    | SessionUnsubscribed | SessionTerminated | SessionDiscarded | SessionTakenOver
    | ControlSubscribe | ControlUnsubscribe | NodeStarted | NodeStopped | NodeSyncStarted | NodeSyncCompleted | MessagePublished | MessageRetained | MessageDelivered
    | MessageAcked | SubscriberJoined | SubscriberLeft | DeliveriesSent | DeliveryFailed
    | MembersActive | OperatorRequeue | OperatorDrop | OperatorRewind | RulesChanged | Tick
)
# fmt: on
