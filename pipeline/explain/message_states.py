"""The state of a message, computed from its agent's states and from the records about it. No IO, no clock.

The agent's state comes first, since it is exact: leases, returned messages, and the message's place (score) in the
topic's index. Only what the state no longer shows is taken from the log: acks, drops and expiry.

The topic's window (queue) or log (pubsub) tells what an index entry means:

- Queue: an entry up to `cursor` was delivered before, or is older than the queue. An entry up to `last` waits.
- Pubsub: an entry up to `cursor` was deleted from the log. Each subscriber has a cursor of its own for the rest.
- Both: an entry after `last` belongs to a transaction that is not complete. On a Redis Cluster it is stored before the
  fence.

Records after the agent's applied offset have no effect yet, so they are ignored: the message is `waiting` if its
publish is one of them.
"""

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

DELETED_AT_TICK: Final = "the next tick deletes it"
DELETED_UNRECORDED: Final = "the topic exceeded max_length, or its rules changed"
LATE: Final = "late: it was a dead letter, which the acknowledgement took back"


class Known(Struct, frozen=True, kw_only=True):
    """What is known of a message, apart from its topic's window or log.

    - `plan`: what the rules in force do with its topic.
    - `score`: its place in the topic's index, None if it is not there. A score is a time in µs.
    - `applied`: the agent's applied offset, -1 before the first record.
    - `events`: the records about it that the search found, in the order of the log.
    - `before`: how many index entries come before it.
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
        """Its last publish, if the search found one."""
        found = [each for each in self.events if each.kind == "published"]
        return found[-1] if found else None

    def applied_events(self, kind: str) -> list[LogEvent]:
        """The events of a kind that the agent has applied."""
        return [each for each in self.events if each.kind == kind and each.offset <= self.applied]

    def expired_at(self) -> int | None:
        """When it expired; None if it has not."""
        published, lifetime = self.published, self.plan.index_lifetime_ms
        at = None if published is None else published.at
        if self.score is not None:
            at = self.score // 1000
        ends = [at + lifetime] if at is not None and lifetime is not None else []
        if published is not None and published.expires_at is not None:
            ends.append(published.expires_at)
        return min((end for end in ends if end <= self.now_ms), default=None)


def member_of(name: str) -> tuple[str | None, str]:
    """Split a member's name into its shared group, if any, and its client id."""
    group, separator, client_id = name.partition("\0")
    return (group, client_id) if separator else (None, name)


def leased(lease: Lease) -> MessageState:
    """The state of a message with this lease."""
    group, client_id = member_of(lease.member)
    return MessageState(
        state="leased",
        client_id=client_id,
        group=group,
        since=lease.leased_at,
        until=None if lease.silent else lease.until,
        # The agent counts a delivery when the bridge reports it.
        attempt=lease.deliveries + (not lease.sent),
        sent=lease.sent,
        stored=lease.stored,
    )


def _dead(dead: DeadMessage, subscriber: str | None = None) -> MessageState:
    holders = [
        client_id for client_id, _, held_for in dead.holders if subscriber in (None, held_for)
    ]
    return MessageState(
        state="dead", since=dead.at, deliveries=dead.deliveries, reason=dead.reason,
        holders=tuple(dict.fromkeys(holders)),
    )  # fmt: skip


def _ready(known: Known, waiting: Waiting | None, online: int) -> MessageState:
    """Ready for delivery, or expired if no tick has deleted it yet. `waiting` is its entry if it was returned."""
    deliveries = 0 if waiting is None else waiting.deliveries
    expired = known.expired_at()
    if expired is not None:
        return MessageState(
            state="expired", since=expired, deliveries=deliveries, reason=DELETED_AT_TICK
        )
    return MessageState(state="ready", deliveries=deliveries, online=online, before=known.before)


def _ended(known: Known, counts: Callable[[str], bool] = lambda client_id: True) -> MessageState:
    """The state of a message that is neither stored nor leased, from the log alone.

    An ack is taken only from a client for which `counts` is true.
    """
    published = known.published
    if published is not None and published.offset > known.applied:
        return MessageState(state="waiting", since=published.at)
    dropped = known.applied_events("drop")
    if dropped:
        return MessageState(state="dropped", since=dropped[-1].at)
    for event in reversed(known.applied_events("acked")):
        if counts(event.client_id or ""):
            return MessageState(state="acked", client_id=event.client_id, since=event.at)
    for event in reversed(known.applied_events("sent")):
        if event.qos == 0 and counts(event.client_id or ""):
            reason = "a copy of QoS 0 is done when it is sent"
            return MessageState(
                state="acked", client_id=event.client_id, since=event.at, reason=reason
            )
    if published is not None and published.qos == 0 and not known.plan.store_qos0:
        return MessageState(state="passed_on", since=published.at)
    expired = known.expired_at()
    if expired is not None:
        return MessageState(state="expired", since=expired)
    return MessageState(state="gone", reason=DELETED_UNRECORDED)


# -- topics without a delivery rule ------------------------------------------------------------------------------------


def of_message(known: Known) -> MessageState:
    """The state of a message whose topic has no delivery rule."""
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
        return MessageState(state="not_stored", reason="its QoS is 0")
    if expired is not None:
        return MessageState(state="expired", since=expired)
    return MessageState(state="gone", reason="its rules changed, or another program deleted it")


def _stored(known: Known) -> MessageState:
    """Stored, or expired if no tick has deleted it yet."""
    expired = known.expired_at()
    if expired is not None:
        return MessageState(state="expired", since=expired, reason=DELETED_AT_TICK)
    assert known.score is not None, "the index has it"
    return MessageState(state="stored", since=known.score // 1000)


# -- queues ------------------------------------------------------------------------------------------------------------


def of_queue(known: Known, window: QueueWindow, online: int) -> MessageState:
    """The state of a message of a queue with `online` consumers."""
    message_id, score = known.message_id, known.score
    lease = window.leases.get(message_id)
    if lease is not None:
        return structs.replace(leased(lease), online=online)
    waiting = window.returned_as(message_id)
    if waiting is not None:
        return _ready(known, waiting, online)
    if score is not None and window.cursor < score <= window.last:
        return _ready(known, None, online)
    if known.dead is not None and not known.dead.requeued:
        return _dead(known.dead)
    if score is not None and score > window.last > 0:
        return MessageState(state="waiting", since=score // 1000)
    if score is not None:
        reason = "it was stored before its topic was a queue"
        return MessageState(state="stored", since=score // 1000, reason=reason)
    state = _ended(known)
    if state.state == "acked" and _was_dead(known, state.since or 0):
        return structs.replace(state, reason=LATE)
    return state


def _was_dead(known: Known, acked_at: int) -> bool:
    """True if an acknowledgement found the message among the dead letters."""
    died = [each.at for each in known.events if each.kind == "dead_letter" and each.at <= acked_at]
    requeued = [each.at for each in known.applied_events("requeue")]
    return bool(died) and max(died) >= max(requeued, default=0)


# -- pubsub ------------------------------------------------------------------------------------------------------------


def of_log(known: Known, log: TopicLog) -> MessageState:
    """The state of a message in the log of its pubsub topic, without regard to subscribers."""
    if known.score is not None and known.score > log.last:
        return MessageState(state="waiting", since=known.score // 1000)
    if known.score is not None and known.score > log.cursor:
        return _stored(known)
    if known.dead is not None and not known.dead.requeued:
        return _dead(known.dead)
    # The acks of one subscriber do not end a message for the others.
    return MessageState(state="retained") if known.retained else _ended(known, lambda _: False)


class SubscriberView(Struct, frozen=True, kw_only=True):
    """One subscriber and its place in one topic.

    - `known`: how the subscriber is known by each filter.
    - `reader`: its cursor, leases and read offset in the topic. `reader.made_at` is None before the first delivery.
    - `online`: how many of its members are online. `clients` are their client ids.
    """

    subscriber: str
    known: Subscriber
    reader: Reader
    online: int = 0
    clients: frozenset[str] = field(default_factory=frozenset)

    @property
    def is_group(self) -> bool:
        """True if it is a shared subscription."""
        return self.subscriber.startswith(GROUP)


def start_of(view: SubscriberView, topic: str, log: TopicLog, plan: TopicPlan) -> int | None:
    """The score after which a subscriber without a place will begin; None if it does not want the topic."""
    known = view.known.wants(topic)
    if known is None or plan.delivery is None:
        return None
    return log.cursor if plan.delivery.start == "earliest" else max(known.start, log.cursor)


def is_stored(log: TopicLog, reader: Reader, message_id: str, score: int) -> bool:
    """True if a message that a reader has leased or returned is still stored.

    The agent updates a reader only when it works on it. Until then the reader may list messages that left the log.
    """
    return score > log.cursor or message_id in reader.requeued


def of_pubsub(known: Known, topic: str, log: TopicLog, view: SubscriberView) -> MessageState | None:
    """The state of a message for one subscriber of its topic; None if it was never for that subscriber."""
    state = _of_pubsub(known, topic, log, view)
    return None if state is None else structs.replace(state, subscriber=shown(view.subscriber))


def _of_pubsub(
    known: Known, topic: str, log: TopicLog, view: SubscriberView
) -> MessageState | None:
    message_id, reader = known.message_id, view.reader
    lease = reader.leases.get(message_id)
    if lease is not None:
        stored = lease.stored and is_stored(log, reader, message_id, lease.score)
        return structs.replace(leased(lease), online=view.online, stored=stored)
    waiting = reader.returned_as(message_id)
    # A requeued message does not expire with its topic. It is kept as long as a dead letter.
    if waiting is not None and message_id in reader.requeued:
        return MessageState(state="ready", deliveries=waiting.deliveries, online=view.online)
    if waiting is not None and waiting.score > log.cursor:
        return _ready(known, waiting, view.online)
    dead = known.dead
    if dead is not None and view.subscriber in dead.subscribers:
        return _dead(dead, view.subscriber)
    if known.score is not None and reader.read_offset < known.score <= reader.cursor:
        reason = "ahead of the read offset: an earlier message is not done"
        return structs.replace(_passed(known, view), state="acked", reason=reason)
    cursor: int | None = reader.cursor
    if reader.made_at is None:
        cursor = start_of(view, topic, log, known.plan)
        if cursor is None:
            return None
    if known.score is None or known.score <= log.cursor:
        return _ended(known, _counts(view))
    assert cursor is not None, "a reader that was made has a cursor"
    if known.score > log.last:
        return MessageState(state="waiting", since=known.score // 1000)
    if known.score > cursor:
        return _ready(known, None, view.online)
    return _passed(known, view)


def _passed(known: Known, view: SubscriberView) -> MessageState:
    """The state of a message before the subscriber's cursor: acknowledged if the log shows an ack, else behind."""
    state = _ended(known, _counts(view))
    return state if state.state == "acked" else MessageState(state="behind")


def _counts(view: SubscriberView) -> Callable[[str], bool]:
    """Make the predicate that is true for the client ids whose acks are the subscriber's.

    The clients of a group are those of its online members. The acks of a member that has left are not recognised.
    """
    if not view.is_group:
        return lambda client_id: client_id == view.subscriber
    return lambda client_id: client_id in view.clients
