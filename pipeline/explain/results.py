"""What is known of a message or a topic, as data. `--json` and the web page's API print these structs as they are.

Times are ms since the epoch. None is "never" or "not known".
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from msgspec import Struct, field

from millpond.pipeline.kafka.log_reader import Searched
from millpond.pipeline.operate.dead_letters import StoredMessage
from millpond.schemas.events import AgentName

# The state of a published message, as a whole or for one subscriber.
State: TypeAlias = Literal[
    "waiting",  # in Kafka; the agent has not read it yet
    "stored",  # in Redis, and no agent delivers messages of its topic
    "ready",  # waits for a delivery
    "leased",  # delivered, or being delivered, to a client
    "acked",  # acknowledged
    "behind",  # before the subscriber's read offset, and the log shows no ack
    "expired",  # too old
    "dead",  # a dead letter
    "dropped",  # deleted by an operator
    "passed_on",  # QoS 0: delivered to the clients that were online, and not stored
    "retained",  # stored only as the retained message of its topic
    "not_stored",  # no rule stores it
    "gone",  # no longer stored, for another reason
]
EventKind: TypeAlias = Literal[
    "published", "retained", "delivered", "acked", "sent", "failed", "requeue", "drop", "rewind", "dead_letter",
]  # fmt: skip


class LogEvent(Struct, frozen=True, kw_only=True):
    """One record about a message, or one entry of a report.

    `at` is the record's time in the log. `message_id` is the id in the record: for a copy it may be an id that the
    broker chose. `client_id` is the publisher, or the client of the copy. `detail` is the reason of a failure or dead
    letter.
    """

    kind: EventKind
    kafka_topic: str
    partition: int
    offset: int
    at: int
    message_id: str
    topic: str | None = None
    client_id: str | None = None
    qos: int | None = None
    lease: str | None = None
    expires_at: int | None = None
    detail: str | None = None


class MessageState(Struct, frozen=True, kw_only=True):
    """The state of a message, for one `subscriber` of a pubsub topic or as a whole.

    - `since`: when the state began.
    - `client_id`, `group`: the client that has the lease or has acknowledged, and its shared group.
    - `until`: the deadline of the lease; None if another client may take it over. `attempt`: the number of this delivery, from 1.
    - `sent`: the bridge has reported that it sent the copy.
    - `stored`: false for a lease whose message is no longer stored.
    - `deliveries`: how many deliveries were not acknowledged.
    - `holders`: the clients whose acknowledgement takes a dead letter back.
    - `online`: how many clients could get the message.
    - `before`: how many stored messages of the topic come first.
    - `words`: the state as a sentence.
    """

    state: State
    subscriber: str | None = None
    client_id: str | None = None
    group: str | None = None
    since: int | None = None
    until: int | None = None
    attempt: int | None = None
    sent: bool = False
    stored: bool = True
    deliveries: int = 0
    online: int | None = None
    before: int | None = None
    reason: str | None = None
    holders: tuple[str, ...] = ()
    words: str = ""


class StoredMessageFacts(Struct, frozen=True, kw_only=True):
    """What Redis stores of a message.

    `index_score` is its place in the topic's index, and `expires_at` the end of that entry. The agent deletes the body
    together with its last entry; `body_expires_at` is only a safety net.
    """

    message: StoredMessage | None
    body_expires_at: int | None
    index_score: int | None
    expires_at: int | None
    retained: bool
    retained_until: int | None
    receipts: dict[str, int]


class MessageFacts(Struct, frozen=True, kw_only=True):
    """All that is known of a message.

    `agent` owns its topic, and has applied the log up to offset `applied`. The first of `states` is that of the message
    as a whole; one for each subscriber of a pubsub topic follows.
    """

    message_id: str
    topic: str
    agent: AgentName
    partition: int
    applied: int | None
    states: list[MessageState]
    stored: StoredMessageFacts
    events: list[LogEvent]
    searched: list[Searched]
    notes: list[str] = field(default_factory=list)


class LeaseFacts(Struct, frozen=True, kw_only=True):
    """One lease of a topic. `number` is unique in its partition. For the other fields see `MessageState`."""

    message_id: str
    client_id: str
    group: str | None
    number: int
    since: int
    until: int | None
    attempt: int
    sent: bool
    stored: bool
    subscriber: str | None = None


class MemberFacts(Struct, frozen=True, kw_only=True):
    """A client that could get messages of a topic.

    - `in_hand`: its leases in this partition, of all topics. `max_inflight` is their limit.
    - `unconfirmed`: its leases that the bridge has not reported yet.
    - `rests_until`: the end of its back-off, after `failures` failed commands in a row.
    - `broker_delivers`: the broker delivers new messages to it, and Millpond only older ones.
    - `subscribers`: the pubsub subscribers that it belongs to.
    """

    client_id: str
    group: str | None
    qos: int
    in_hand: int
    max_inflight: int
    unconfirmed: int
    rests_until: int | None
    failures: int
    broker_delivers: bool
    subscribers: tuple[str, ...] = ()


class SubscriberFacts(Struct, frozen=True, kw_only=True):
    """One subscriber of a pubsub topic.

    - `online`: how many of its clients are online.
    - `begun`: it has a place in the topic. It gets one with its first delivery.
    - `read_offset`: the last message before which all are done; `read_offset_at` is that message's time.
    - `ready`: how many messages wait for delivery; `returned` of them were delivered before.
    - `leased`: how many messages its clients have.
    - `done_ahead`: how many messages after the read offset are done.
    - `lost`: how many messages expired or were deleted before it had read them.
    - `gone_at`: when it left for good.
    """

    subscriber: str
    online: int
    begun: bool
    read_offset: str | None
    read_offset_at: int | None
    ready: int
    returned: int
    leased: int
    done_ahead: int
    lost: int
    gone_at: int | None


class TopicFacts(Struct, frozen=True, kw_only=True):
    """All that is known of a topic.

    `ready` and `leased` are None if no agent delivers its messages. For pubsub they are sums over all subscribers.
    `expired_time` is in seconds. `retained` is the id of the retained message. `dead` counts dead letters.
    """

    topic: str
    agent: AgentName
    partition: int
    applied: int | None
    rule: dict[str, Any] | None
    expired_time: int | None
    messages: int
    ready: int | None
    leased: int | None
    oldest: int | None
    newest: int | None
    retained: str | None
    dead: int
    members: list[MemberFacts]
    subscribers: list[SubscriberFacts]
    leases: list[LeaseFacts]
    notes: list[str]
