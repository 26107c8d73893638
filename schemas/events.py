"""Canonical events: one JSON object in each Kafka record (docs/reference/kafka.md).

**Who writes them.** Bridges write what a broker reported, and what became of commands. Workers write ticks, rules and
announcements. Operators write orders.

**Time.** Every time is in ms since the epoch. `at` is the writer's clock. Decisions use the timestamp of the record
instead, which Kafka sets.

**Format.** `type` names the event. Unknown fields are ignored, because a newer bridge may write them. A field with a
default may be missing. Names of types and fields are stored in Kafka for years: do not rename them.

**Order.** The key of a record (`schemas/keys.py`) decides its partition. Only events of one partition have an order.

Kinds of events, by the first part of the type:

| type | about |
|---|---|
| `client.*` | one connection of a client |
| `session.*` | the MQTT session of a client, and its subscriptions |
| `control.*` | orders of applications about subscriptions |
| `node.*` | a broker node, and snapshots of it |
| `message.*` | one message |
| `subscriber.*` | announcements of members, from the sessions agent to the delivery agents |
| `deliveries.sent`, `delivery.failed` | reports: what became of copies |
| `operator.*` | orders of operators |
| `rules.changed`, `tick` | the rules in force, and time |

A *snapshot* is everything connected and subscribed at a node. Its events lie between `node.sync.started` and
`node.sync.completed`, and carry `told_again`. They may repeat what is known. They are no connect and no SUBSCRIBE.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct, field

# Limits of what is accepted from outside.
TIME_MS_MAX = 253_402_300_799_999  # the last millisecond of the year 9999
TEXT_BYTES_MAX = 65_535  # [MQTT-1.5.4]: a UTF-8 string is at most 65,535 bytes
MESSAGE_ID_LENGTH_MAX = 256  # EMQX writes 32 hex characters; others may be longer

TimeMs = Annotated[int, Meta(ge=0, le=TIME_MS_MAX)]
QoS = Annotated[int, Meta(ge=0, le=2)]
Text = Annotated[str, Meta(max_length=TEXT_BYTES_MAX)]
# A null character separates the parts of private names. MQTT forbids it in client ids ([MQTT-1.5.4-2]).
ClientId = Annotated[str, Meta(max_length=TEXT_BYTES_MAX, pattern=r"^[^\0]*\Z")]
Topic = Annotated[str, Meta(min_length=1, max_length=TEXT_BYTES_MAX)]
Offset = Annotated[int, Meta(ge=0)]
MessageId = Annotated[str, Meta(min_length=1, max_length=MESSAGE_ID_LENGTH_MAX)]
PayloadEncoding = Literal["utf-8", "base64"]
AgentName: TypeAlias = Literal["sessions", "messages", "queue", "pubsub"]


class Base(Struct, frozen=True, kw_only=True, gc=False, tag_field="type"):
    """The fields of every event.

    at: When the event was written, by the clock of its writer.
    node: The broker node. `millpond` in records that workers and commands write.
    """

    at: TimeMs
    node: Text


class ClientConnected(Base, frozen=True, kw_only=True, tag="client.connected"):
    """A connection was accepted.

    connection_id: Identifies the connection among all of its client: node and peer address.
    session_expiry_s: How long the session outlives the connection. 0xFFFF_FFFF: for ever.
    told_again: True in a snapshot.
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
    """The connection `connection_id` ended."""

    client_id: ClientId
    connection_id: Text
    reason: Text


class SessionCreated(Base, frozen=True, kw_only=True, tag="session.created"):
    """A session began without earlier state.

    began_at: When its first connection began, by the clock of the node. Bridges give it where events can arrive late,
        twice or out of order. Subscriptions that were made since then stay. An event with the `began_at` of the
        known session, or an earlier one, does not begin a new session.
    """

    client_id: ClientId
    began_at: TimeMs | None = None


class SessionResumed(Base, frozen=True, kw_only=True, tag="session.resumed"):
    """A client returned to its session. Its subscriptions continue."""

    client_id: ClientId


class SessionSubscribed(Base, frozen=True, kw_only=True, tag="session.subscribed"):
    """The broker granted one filter.

    topic_filter: The client's filter. A shared subscription keeps its `$share/{group}/` prefix.
    proxied: True if the bridge made the subscription, by a command.
    broker_delivers: True if the bridge cannot reach this client alone. The broker then routes new messages to it, and
        Millpond delivers only messages that were stored before the subscription.
    reachable: False if Millpond delivers, but the bridge cannot reach this client. No delivery agent then serves it.
    retain_handling: When the client wants retained messages (MQTT 5.0, 3.8.3.1): 0 always, 1 with a new subscription,
        2 never.
    told_again: True in a snapshot.
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
    """One subscription ended by UNSUBSCRIBE."""

    client_id: ClientId
    topic_filter: Topic


class SessionTerminated(Base, frozen=True, kw_only=True, tag="session.terminated"):
    """A session ended, with its subscriptions."""

    client_id: ClientId
    reason: Text


class SessionDiscarded(Base, frozen=True, kw_only=True, tag="session.discarded"):
    """A clean start discarded the client's earlier session. The sessions agent ignores it and waits for the new one."""

    client_id: ClientId


class SessionTakenOver(Base, frozen=True, kw_only=True, tag="session.takenover"):
    """A newer connection took over the session. The sessions agent ignores it: the new connection reports itself."""

    client_id: ClientId


class ControlSubscribe(Base, frozen=True, kw_only=True, tag="control.subscribe"):
    """An application ordered a subscription on the control channel. The worker of the client's partition writes it."""

    client_id: ClientId
    topic_filter: Topic
    qos: QoS


class ControlUnsubscribe(Base, frozen=True, kw_only=True, tag="control.unsubscribe"):
    """An application ordered the end of a subscription. See ControlSubscribe."""

    client_id: ClientId
    topic_filter: Topic


class NodeStarted(Base, frozen=True, kw_only=True, tag="node.started"):
    """A broker node started. The bridge writes one to every partition."""


class NodeStopped(Base, frozen=True, kw_only=True, tag="node.stopped"):
    """A broker node stopped. The bridge writes one to every partition."""


class NodeSyncStarted(Base, frozen=True, kw_only=True, tag="node.sync.started"):
    """A snapshot of the node begins. It ends with the `node.sync.completed` of the same `sync_id`."""

    sync_id: Text


class NodeSyncCompleted(Base, frozen=True, kw_only=True, tag="node.sync.completed"):
    """The snapshot `sync_id` is complete. Connections and subscriptions of the node that are not in it have ended."""

    sync_id: Text


class Message(Base, frozen=True, kw_only=True):
    """A message as its publisher sent it.

    message_id: The broker's own id. Millpond never changes it.
    client_id, username: The publisher.
    published_at: When the broker received it.
    expires_at: When it expires, if it came with an expiry of its own.
    """

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
    """The broker now retains this message for its topic. With an empty payload it retains none.

    EMQX's hook does not report the retain flag of a publish. So its bridge asks the broker afterwards, and writes this.
    A `message.published` of the same message may precede it, with a false `retain`.
    """


class MessageDelivered(Base, frozen=True, kw_only=True, tag="message.delivered"):
    """The broker gave one message to one client. `from_client_id` is the publisher."""

    message_id: MessageId
    topic: Topic
    client_id: ClientId
    from_client_id: Text | None = None
    qos: QoS


class MessageAcked(Base, frozen=True, kw_only=True, tag="message.acked"):
    """One client acknowledged one message: PUBACK, or PUBREC at QoS 2.

    message_id: The id by which the client's broker knows the copy. It can be an alias (see Sent).
    broker_delivers: True if the broker may have routed the message itself. The client may then hold no lease of it.
    """

    message_id: MessageId
    topic: Topic
    client_id: ClientId
    from_client_id: Text | None = None
    qos: QoS
    broker_delivers: bool = False


class SubscriberJoined(Base, frozen=True, kw_only=True, tag="subscriber.joined"):
    """A member: the delivery agents may serve this client by this filter. The sessions agent announces it.

    topic_filter: The client's filter, with `$share/{group}/` if it has one.
    session: Names the session: the offset of the event that created it, in the client's partition of `mqtt.clients`.
    source_offset: The offset of the event that caused this announcement, in the same partition. Of two announcements
        about one client and filter, the one with the higher source offset holds.
    broker_delivers: As in SessionSubscribed.
    subscribed_at: The log's time of the SUBSCRIBE. 0: unknown. No message published after the SUBACK is older.
    """

    client_id: ClientId
    topic_filter: Topic
    qos: QoS
    session: Offset
    source_offset: Offset
    broker_delivers: bool = False
    subscribed_at: TimeMs = 0


class SubscriberLeft(Base, frozen=True, kw_only=True, tag="subscriber.left"):
    """The delivery agents no longer serve this client by this filter. For the fields see SubscriberJoined."""

    client_id: ClientId
    topic_filter: Topic
    reason: Literal["unsubscribed", "session_ended", "disconnected"]
    session: Offset
    source_offset: Offset


class Sent(Struct, frozen=True, array_like=True, gc=False):
    """One copy that the broker has sent.

    lease: The name of its lease.
    alias: The id that the broker gave to the copy. None if it is the message's own. Acknowledgements name the alias.
    qos: The QoS of the copy. No client acknowledges a copy of QoS 0.
    """

    lease: Text
    client_id: ClientId
    message_id: MessageId
    alias: MessageId | None = None
    qos: QoS = 1


class DeliveriesSent(Base, frozen=True, kw_only=True, tag="deliveries.sent"):
    """A report: the bridge gave these copies to its broker, in this order."""

    agent: AgentName
    sent: tuple[Sent, ...]


class DeliveryFailed(Base, frozen=True, kw_only=True, tag="delivery.failed"):
    """A report: a copy did not reach its client.

    reason: One of these.
        `no_client`: the client is not connected.
        `stale`: the command's validity had ended, or an earlier command of its epoch failed.
        `bridge`: the broker cannot send the message.
        `gone`: the store no longer has the message. A worker reports it, and no command was written.
        `too_large`: Kafka does not take the command. A worker reports it.
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
    """Deliver a dead message again. Its attempts count from 1 again.

    Queue puts it behind the messages that wait now. Pubsub delivers it first, to the subscribers that gave up on it.
    """

    topic: Topic
    message_id: MessageId


class OperatorDrop(Base, frozen=True, kw_only=True, tag="operator.drop"):
    """Delete a dead message."""

    topic: Topic
    message_id: MessageId


class OperatorRewind(Base, frozen=True, kw_only=True, tag="operator.rewind"):
    """Move the read offset of one pubsub subscriber in one topic.

    subscriber: A client id, or `$share/{group}/{filter}`.
    after: The new read offset: a score of the topic's index. The subscriber continues with the next message.
    message_id: The last message up to that place, which the view of the read offset then shows. None if there is none.
    """

    topic: Topic
    subscriber: Text
    after: Annotated[int, Meta(ge=0)]
    message_id: MessageId | None = None


class RulesChanged(Base, frozen=True, kw_only=True, tag="rules.changed"):
    """From this record on, `agent` uses `rules` in this partition: the canonical JSON of a rule set."""

    agent: AgentName
    rules: str


class Tick(Base, frozen=True, kw_only=True, tag="tick"):
    """Time in the log: `agent` handles what is due at this record's timestamp. Nothing expires without a tick."""

    agent: AgentName


# Every type of event. Nothing else decodes.
# fmt: off
Event: TypeAlias = (
    ClientConnected | ClientDisconnected
    | SessionCreated | SessionResumed | SessionSubscribed | SessionUnsubscribed
    | SessionTerminated | SessionDiscarded | SessionTakenOver
    | ControlSubscribe | ControlUnsubscribe
    | NodeStarted | NodeStopped | NodeSyncStarted | NodeSyncCompleted
    | MessagePublished | MessageRetained | MessageDelivered | MessageAcked
    | SubscriberJoined | SubscriberLeft
    | DeliveriesSent | DeliveryFailed | MembersActive
    | OperatorRequeue | OperatorDrop | OperatorRewind
    | RulesChanged | Tick
)
# fmt: on
