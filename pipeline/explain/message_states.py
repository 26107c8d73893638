"""What a message is now: worked out of its agent's own states, and of what the log says. No IO, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct, field, structs

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.agents.delivery.window import Lease, Waiting
from millpond.agents.pubsub.state import GROUP, Reader, Subscriber, TopicLog, shown
from millpond.agents.queue.state import QueueWindow
from millpond.agents.topics.plans import TopicPlan
from millpond.pipeline.explain.results import LogEvent, MessageState

TICK: Final = "the next tick takes it away"
LATE: Final = "late: it was a dead letter, which the acknowledgement took back"
DROPPED_SILENTLY: Final = "the topic was longer than max_length, or its rules changed"


class Known(Struct, frozen=True, kw_only=True):
    """What is known of a message as a whole. `score` is its place in the topic's index, if that has it; `applied` is the
    offset that its agent has come to, -1 before the first.
    """

    message_id: str
    plan: TopicPlan
    score: int | None
    applied: int
    now_ms: int
    events: Sequence[LogEvent] = ()
    dead: DeadMessage | None = None
    retained: bool = False
    before: int | None = None

    @property
    def published(self) -> LogEvent | None:
        """Its last publish, as far as the log was searched."""
        found = [each for each in self.events if each.kind == "published"]
        return found[-1] if found else None

    def since_published(self, kind: str) -> list[LogEvent]:
        """Events of a kind that the agent has read."""
        return [each for each in self.events if each.kind == kind and each.offset <= self.applied]

    def expired_at(self) -> int | None:
        """When it became too old, if it did."""
        published, lifetime = self.published, self.plan.index_lifetime_ms
        at = None if published is None else published.at
        if self.score is not None:
            at = self.score // 1000
        ends = [at + lifetime] if at is not None and lifetime is not None else []
        if published is not None and published.expires_at is not None:
            ends.append(published.expires_at)
        return min((end for end in ends if end <= self.now_ms), default=None)


def member_of(name: str) -> tuple[str | None, str]:
    """Group and client of a member, by its name."""
    group, separator, client_id = name.partition("\0")
    return (group, client_id) if separator else (None, name)


def leased(lease: Lease) -> MessageState:
    """A message in somebody's hands."""
    group, client_id = member_of(lease.member)
    return MessageState(
        state="leased",
        client_id=client_id,
        group=group,
        since=lease.leased_at,
        until=None if lease.silent else lease.until,
        attempt=lease.deliveries + (not lease.sent),
        sent=lease.sent,
        stored=lease.stored,
    )


def given_up(dead: DeadMessage, subscriber: str | None = None) -> MessageState:
    """A dead letter."""
    holders = [
        client_id for client_id, _, held_for in dead.holders if subscriber in (None, held_for)
    ]
    return MessageState(
        state="dead", since=dead.at, deliveries=dead.deliveries, reason=dead.reason,
        holders=tuple(dict.fromkeys(holders)),
    )  # fmt: skip


def waits(known: Known, waiting: Waiting | None, online: int) -> MessageState:
    """It is to be handed out, unless it is too old by now."""
    deliveries = 0 if waiting is None else waiting.deliveries
    expired = known.expired_at()
    if expired is not None:
        return MessageState(state="expired", since=expired, deliveries=deliveries, reason=TICK)
    return MessageState(state="ready", deliveries=deliveries, online=online, before=known.before)


def ended(known: Known, clients: Callable[[str], bool] = lambda client_id: True) -> MessageState:
    """It is stored no more, and in nobody's hands: what the log says that it came to. `clients` are those whose acks count."""
    published = known.published
    if published is not None and published.offset > known.applied:
        return MessageState(state="waiting", since=published.at)
    dropped = known.since_published("drop")
    if dropped:
        return MessageState(state="dropped", since=dropped[-1].at)
    for event in reversed(known.since_published("acked")):
        if clients(event.client_id or ""):
            return MessageState(state="acked", client_id=event.client_id, since=event.at)
    for event in reversed(known.since_published("sent")):
        if event.qos == 0 and clients(event.client_id or ""):
            reason = "a copy of QoS 0: that it was sent is its ack"
            return MessageState(
                state="acked", client_id=event.client_id, since=event.at, reason=reason
            )
    if published is not None and published.qos == 0 and not known.plan.store_qos0:
        return MessageState(state="passed_on", since=published.at)
    expired = known.expired_at()
    if expired is not None:
        return MessageState(state="expired", since=expired)
    return MessageState(state="gone", reason=DROPPED_SILENTLY)


# -- topics that nobody delivers ---------------------------------------------------------------------------------------


def of_message(known: Known) -> MessageState:
    """A message of a topic without a delivery rule."""
    published, expired = known.published, known.expired_at()
    if known.score is not None:
        return _stored(known)
    if published is not None and published.offset > known.applied:
        return MessageState(state="waiting", since=published.at)
    if known.retained:
        return MessageState(state="retained")
    if not known.plan.store:
        reason = "no rule stores messages of its topic"
        return MessageState(state="not_stored", reason=reason)
    if published is not None and published.qos == 0 and not known.plan.store_qos0:
        return MessageState(state="not_stored", reason="it is of QoS 0")
    if expired is not None:
        return MessageState(state="expired", since=expired)
    return MessageState(state="gone", reason="its rules changed, or somebody deleted it")


def _stored(known: Known) -> MessageState:
    """It is in its topic's index."""
    expired = known.expired_at()
    if expired is not None:
        return MessageState(state="expired", since=expired, reason=TICK)
    assert known.score is not None, "the index has it"
    return MessageState(state="stored", since=known.score // 1000)


# -- queues ------------------------------------------------------------------------------------------------------------


def of_queue(known: Known, window: QueueWindow, online: int) -> MessageState:
    """A message of a queue."""
    message_id, score = known.message_id, known.score
    lease = window.leases.get(message_id)
    if lease is not None:
        return structs.replace(leased(lease), online=online)
    waiting = window.returned_as(message_id)
    if waiting is not None:
        return waits(known, waiting, online)
    if score is not None and window.cursor < score <= window.last:
        return waits(known, None, online)
    if known.dead is not None and not known.dead.requeued:
        return given_up(known.dead)
    if score is not None and score > window.last > 0:
        return MessageState(state="waiting", since=score // 1000)
    if score is not None:
        reason = "it was stored before its topic was a queue"
        return MessageState(state="stored", since=score // 1000, reason=reason)
    state = ended(known)
    if state.state == "acked" and _was_dead(known, state.since or 0):
        return structs.replace(state, reason=LATE)
    return state


def _was_dead(known: Known, acked_at: int) -> bool:
    """True if an acknowledgement found the message among the dead letters."""
    died = [each.at for each in known.events if each.kind == "dead_letter" and each.at <= acked_at]
    requeued = [each.at for each in known.since_published("requeue")]
    return bool(died) and max(died) >= max(requeued, default=0)


# -- pubsub ------------------------------------------------------------------------------------------------------------


def of_log(known: Known, log: TopicLog) -> MessageState:
    """A message of a pubsub topic, whoever reads it."""
    if known.score is not None and known.score > log.last:
        return MessageState(state="waiting", since=known.score // 1000)
    if known.score is not None and known.score > log.cursor:
        return _stored(known)
    if known.dead is not None and not known.dead.requeued:
        return given_up(known.dead)
    return MessageState(state="retained") if known.retained else ended(known, lambda _: False)


class Reading(Struct, frozen=True, kw_only=True):
    """One subscriber of a topic. `clients` are those of its members, `online` how many of them may be served."""

    subscriber: str
    known: Subscriber
    reader: Reader
    online: int = 0
    clients: frozenset[str] = field(default_factory=frozenset)

    @property
    def group(self) -> bool:
        """Whether it is a shared subscription."""
        return self.subscriber.startswith(GROUP)


def start_of(reading: Reading, topic: str, log: TopicLog, plan: TopicPlan) -> int | None:
    """Where a reader that is yet to be made will begin; None if nobody of that name reads the topic."""
    since = reading.known.since(topic)
    if since is None or plan.delivery is None:
        return None
    return log.cursor if plan.delivery.start == "earliest" else max(since, log.cursor)


def still_in(log: TopicLog, reader: Reader, message_id: str, score: int) -> bool:
    """Whether what a reader has is still to be had: one that is looked at later than its log moves up only then."""
    return score > log.cursor or message_id in reader.requeued


def of_pubsub(known: Known, topic: str, log: TopicLog, reading: Reading) -> MessageState | None:
    """A message for one subscriber of its topic; None if it has never been for it."""
    state = _of_pubsub(known, topic, log, reading)
    return None if state is None else structs.replace(state, subscriber=shown(reading.subscriber))


def _of_pubsub(known: Known, topic: str, log: TopicLog, reading: Reading) -> MessageState | None:
    message_id, reader = known.message_id, reading.reader
    lease = reader.leases.get(message_id)
    if lease is not None:
        stored = lease.stored and still_in(log, reader, message_id, lease.score)
        return structs.replace(leased(lease), online=reading.online, stored=stored)
    waiting = reader.returned_as(message_id)
    if waiting is not None and message_id in reader.requeued:  # kept as long as if it were dead
        return MessageState(state="ready", deliveries=waiting.deliveries, online=reading.online)
    if waiting is not None and waiting.score > log.cursor:
        return waits(known, waiting, reading.online)
    dead = known.dead
    if dead is not None and reading.subscriber in dead.subscribers:
        return given_up(dead, reading.subscriber)
    if any(message_id == each for _, each in reader.done):
        reason = "ahead of the read offset: something before it is not done with"
        return structs.replace(_passed(known, reading), state="acked", reason=reason)
    cursor: int | None = reader.cursor
    if reader.made_at is None:
        cursor = start_of(reading, topic, log, known.plan)
        if cursor is None:
            return None
    if known.score is None or known.score <= log.cursor:
        return ended(known, _counts(reading))
    assert cursor is not None, "a reader that was made has a place"
    if known.score > log.last:
        return MessageState(state="waiting", since=known.score // 1000)
    if known.score > cursor:
        return waits(known, None, reading.online)
    return _passed(known, reading)


def _passed(known: Known, reading: Reading) -> MessageState:
    """The subscriber is past it: by an ack, as far as the log tells, or for another reason."""
    state = ended(known, _counts(reading))
    return state if state.state == "acked" else MessageState(state="behind")


def _counts(reading: Reading) -> Callable[[str], bool]:
    """Whose acks are the subscriber's: its own; of a group, those of the members that it has now."""
    if not reading.group:
        return lambda client_id: client_id == reading.subscriber
    return lambda client_id: client_id in reading.clients
