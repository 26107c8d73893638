"""What can be told of messages and topics, as plain data. Times are ms since the epoch; None is never, or not known."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct, field

from millpond.pipeline.operate.dead_letters import StoredMessage
from millpond.schemas.events import AgentName

# Of a message that was published: what it is now, as a whole or for one subscriber.
State: TypeAlias = Literal[
    "waiting",  # in Kafka; the agent has not read it yet
    "stored",  # kept, and nobody delivers messages of its topic
    "ready",  # to be handed out
    "leased",  # in somebody's hands
    "acked",  # done with
    "behind",  # before the subscriber's read offset
    "expired",  # too old
    "dead",  # given up on
    "dropped",  # deleted by an operator
    "passed_on",  # QoS 0: handed to who was online, and not stored
    "retained",  # not stored, but what its topic retains
    "not_stored",  # by the rules
    "gone",  # not stored any more, for another reason
]
EventKind: TypeAlias = Literal[
    "published", "retained", "delivered", "acked", "sent", "failed", "requeue", "drop", "rewind", "dead_letter",
]  # fmt: skip


class LogEvent(Struct, frozen=True, kw_only=True):
    """A record about a message: where it is, what it says happened, and to whose copy. `message_id` is the one it names:
    that of a copy may be the broker's own. `detail` is the reason of what failed, or of a dead letter.
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


class Searched(Struct, frozen=True, kw_only=True):
    """Which records of a partition were looked at: from `first` up to, not with, `stop`, of those up to `end` that the
    log has from `start` on.
    """

    kafka_topic: str
    partition: int
    start: int
    first: int
    stop: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether the log has no more."""
        return self.first <= self.start and self.stop >= self.end


class MessageState(Struct, frozen=True, kw_only=True):
    """What a message is, for one `subscriber` of a pubsub topic, or as a whole.

    Of a lease: `client_id` (in `group`) has it `since`, `until` it returns (None if another client may take it over), as the delivery number `attempt`; `sent` once
    the bridge has handed it over, not `stored` once it is the holder's alone. `deliveries` were not acknowledged before.
    `online` clients may be served. The acknowledgement of one of its `holders` takes a dead letter back. `before` are stored messages of the topic that come first.
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
    """What Redis has of a message. `index_score` is its place in the topic's index; bodies are also let go by index and
    retained entry, `body_expires_at` is only a safety net.
    """

    message: StoredMessage | None
    body_expires_at: int | None
    index_score: int | None
    expires_at: int | None
    retained: bool
    retained_until: int | None
    receipts: dict[str, int]


class MessageFacts(Struct, frozen=True, kw_only=True):
    """All that is known of a message. `agent` owns its topic by the rules; `applied` is the offset that it has come to."""

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
