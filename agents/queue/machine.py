"""The queue agent's machine: one message, one consumer, the ack deletes it.

Rule 1: every transition of a queued message is in this file; leases and members are in `agents/delivery/`, what is kept
besides in `agents/topics/storage.py`. Rule 2: no IO, no clock, no chance.

ON published: unless its id was seen, store, append, hand out. QoS 0 is not stored unless a rule says so: it is handed
once to one member with room, and waits a few seconds for one. ON acked, by a client that holds or held a lease of it: delete, also if it is dead by now; hand out. ON tick: what is
due goes: expired messages, overdue leases, dead letters that are too old. ON requeue: a dead message is appended anew.
A message that expires, overflows or is superseded while it is leased is gone for everyone but the holder, whose ack is
welcome and whose failure ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import structs

from millpond.agents.delivery.dead_messages import DeadMessage, dead_holders
from millpond.agents.delivery.leasing import WAITING, Done
from millpond.agents.delivery.machine import DeliveryMachine
from millpond.agents.delivery.members import Reach
from millpond.agents.delivery.rounds import PAGE_MAX, literal_prefix
from millpond.agents.delivery.window import Waiting, holds
from millpond.agents.effects import NO_SOURCE, Effect, Output, Refusal, Reindex, SetDue, Unindex
from millpond.agents.ports import LoadedState
from millpond.agents.queue.indexes import Indexes
from millpond.agents.queue.state import QueueWindow, pack, unpack
from millpond.agents.reads import Read, ReadNames
from millpond.agents.topics.due_times import DEAD, INDEX, MESSAGE, due_member
from millpond.agents.topics.state_cache import StateCache
from millpond.agents.topics.storage import earliest, expired_entries
from millpond.schemas.events import (
    AgentName,
    Event,
    MessageAcked,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
)
from millpond.schemas.rules import Rules

# A publish into a queue that is too long takes out the oldest; after a rule has made it shorter, up to this many.
OVERFLOW_MAX: Final = 8
# How long a QoS 0 message waits for a member that can take it. A SUBACK precedes the member's join in the log by milliseconds,
# or by the seconds for which the sessions agent lags. A message that comes right after the SUBACK must not be lost.
QOS_0_WAIT_MS: Final = 5_000
QOS_0_WAITING_MAX: Final = (
    1_000  # messages that a topic holds; beyond that a QoS 0 message does not wait
)
ACKED_EARLY: Final = "acked\0"  # marks an id among those seen: its ack came before its publish
OVERFLOWED: Final = "the queue was longer than max_length"


class QueueMachine(DeliveryMachine[QueueWindow]):
    """State and transitions of one partition. The key of a window is its topic."""

    agent: AgentName = "queue"

    def __init__(self) -> None:
        """An empty partition without rules; `restore` follows."""
        super().__init__(self.new_windows())
        self._indexes = Indexes()

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        super().restore(partition_state, stored, rules)
        self._indexes = Indexes()  # a batch that was given up may have read some

    # -- what `agents/delivery/` asks -----------------------------------------------------------------------

    def new_windows(self) -> StateCache[QueueWindow]:
        return StateCache(unpack)

    def packed(self, window: QueueWindow) -> bytes | None:
        return None if window.blank() else pack(window)

    def topic_of(self, key: str) -> str:
        return key

    def own_key(self, name: str, topic: str) -> str:
        """See `Membership`: all members of a topic share its window."""
        return topic

    def reaching(self, key: str) -> list[Reach]:
        return self._members.reaching(key)

    def touched_by(self, event: MessagePublished | MessageAcked) -> Iterable[str]:
        return (event.topic,)

    def touched_by_operator(
        self, event: OperatorRequeue | OperatorDrop | OperatorRewind
    ) -> Iterable[str]:
        return (event.topic,)

    def last_of(self, key: str) -> int:
        return self._windows[key].last

    def something_waits(self, key: str, window: QueueWindow) -> bool:
        return window.ready > 0 or bool(window.silent)

    def unread(self, key: str) -> int:
        window = self._windows[key]
        if window.complete():
            return 0
        return window.ready - len(window.returned) - len(window.ahead)

    def more_needed(self, key: str, publishes: int) -> int:
        """See `DeliveryMachine`: the oldest have to be known that a full queue drops."""
        delivery, window = self.delivery(key), self._windows[key]
        if delivery is None or delivery.max_length is None or not publishes:
            return 0
        too_long = window.length + publishes - delivery.max_length
        return min(max(too_long, 0), publishes * OVERFLOW_MAX)

    def page(self, name: str, topic_filter: str, after: str, *, everything: bool) -> ReadNames:
        """See `Rounds`. What nobody took waits: there is nothing else to look at."""
        return ReadNames(None, WAITING, literal_prefix(topic_filter), after, PAGE_MAX)

    def key_on_page(self, name: str, topic_filter: str, entry: str, *, everything: bool) -> str:
        return entry

    def note_waiting(self, key: str, window: QueueWindow) -> Done:
        """See `Leasing`. An empty queue in which nobody takes turns is as good as a new one."""
        if window.empty() and (not window.turn or len(self.reaching(key)) <= 1):
            window.clear()
        return super().note_waiting(key, window)

    # -- published ------------------------------------------------------------------------------------------

    def published(self, offset: int, event: MessagePublished, now_ms: int, score: int) -> Done:
        new = self._storage.is_new(event, now_ms)
        if not new or self._is_known(event.topic, event.message_id):
            return []
        plan = self._storage.plans.of(event.topic)
        done: Done = []
        expired = event.expires_at is not None and event.expires_at <= now_ms
        acked = ACKED_EARLY + event.message_id in self._storage.seen
        if not expired:
            indexed = (event.qos > 0 or plan.store_qos0) and not acked
            stored = event
            passed_on: Done = []
            if event.qos == 0 and not indexed and not acked:
                passed_on = self.pass_on(offset, event.topic, event, score)
                if not passed_on and self._may_wait(event):
                    indexed, stored = True, _waiting(event, now_ms)
            done += self._storage.published(offset, stored, score, indexed=indexed)
            done += passed_on
            if indexed:
                self._windows[event.topic].expiring |= stored.expires_at is not None
                done += self._append(offset, event.topic, event.message_id, score, now_ms)
            elif event.qos == 0 and not acked:
                done += self.note_waiting(event.topic, self._windows[event.topic])
        if plan.commands["message.publish"]:
            done += self._storage.commands(offset, event)
        return done

    def _may_wait(self, event: MessagePublished) -> bool:
        """True if a QoS 0 message that no member takes now is kept for one. It pushes no other message out of the queue, and a
        retained entry keeps it anyhow. Where the broker delivers, its subscribers have it.
        """
        topic, delivery = event.topic, self.delivery(event.topic)
        retained = event.retain and self._storage.plans.of(topic).retain
        if delivery is None or retained or any(each.newest for each in self.reaching(topic)):
            return False
        room = QOS_0_WAITING_MAX if delivery.max_length is None else delivery.max_length
        return self._windows[topic].length < min(room, QOS_0_WAITING_MAX)

    def _append(self, offset: int, topic: str, message_id: str, score: int, now_ms: int) -> Done:
        """A stored message is the topic's newest; the oldest go if there are too many."""
        window, delivery = self.window(offset, topic), self.delivery(topic)
        window.first(score)
        known = window.complete()
        limit = None if delivery is None else delivery.max_length
        window.length += 1
        window.last = score
        if known:
            window.append(message_id, score)
            self._ahead_total += 1
        else:
            self._indexes.places[topic, message_id] = score
        done: Done = []
        for _ in range(OVERFLOW_MAX):
            if delivery is None or limit is None or window.length <= limit:
                break
            done += self._overflow(offset, topic, now_ms, dead=delivery.dead_on_overflow)
        return [*done, *self.dispatch(offset, topic, now_ms)]

    def _overflow(self, offset: int, topic: str, now_ms: int, *, dead: bool) -> Done:
        window = self._windows[topic]
        oldest = window.oldest()
        assert oldest is not None, "a queue that is too long has an oldest message, and it is read"
        if not dead:
            return self._unstore(offset, topic, oldest.message_id)
        window.unstore(oldest.message_id)
        return self.given_up(offset, topic, oldest, OVERFLOWED, now_ms)

    # -- acked ----------------------------------------------------------------------------------------------

    def acked_by_client(self, offset: int, event: MessageAcked, now_ms: int) -> Done:
        """See the head of this file. Where the broker delivers, any of its clients' acks is the first one."""
        topic, client_id = event.topic, event.client_id
        window = self.window(offset, topic)
        found = self.acked_copy(client_id, topic, event.message_id)
        message_id = window.known_as(event.message_id) if found is None else found[1].message_id
        done = self._acked_message(offset, event, message_id, now_ms)
        done += self._taken_back(offset, event)
        return done if found is None else [*done, *self.freed(offset, topic, found[:1], now_ms)]

    def _acked_message(
        self, offset: int, event: MessageAcked, message_id: str, now_ms: int
    ) -> Done:
        topic, client_id = event.topic, event.client_id
        window, trusted = self._windows[topic], event.broker_delivers
        lease = window.leases.get(message_id)
        if lease is not None:
            if not (trusted or holds(lease.holders, client_id)):
                return []
            return self.acked(offset, topic, message_id, client_id, now_ms)
        waiting = window.returned_as(message_id)
        if waiting is not None and not (trusted or holds(waiting.holders, client_id)):
            return []
        if waiting is not None or (trusted and self._is_stored(topic, message_id)):
            done = self._unstore(offset, topic, message_id)
            return [*done, *self.note_waiting(topic, window)]
        if trusted:
            self._storage.seen.add(ACKED_EARLY + message_id, now_ms)
        return []

    def _taken_back(self, offset: int, event: MessageAcked) -> Done:
        """A dead message that its holder has done after all is deleted, as if it had been acknowledged in time."""
        found = self._dead.held_by(event.topic, event.client_id, event.message_id)
        return [] if found is None else self.dropped(offset, event.topic, found[0].message_id)

    def acknowledged(self, offset: int, key: str, message_id: str, score: int) -> Done:
        """See `Leasing`: the ack deletes."""
        self._leaves(key, message_id)
        return self._unindex(offset, key, message_id)

    def _unindex(self, offset: int, topic: str, message_id: str) -> Done:
        done: Done = [*self._storage.unindex(offset, topic, (message_id,))]
        if self._windows[topic].expiring:
            done.append(SetDue(due_member(MESSAGE, topic, message_id), None))
        return done

    # -- what is stored no more -----------------------------------------------------------------------------

    def _is_stored(self, topic: str, message_id: str) -> bool:
        window = self._windows[topic]
        lease = window.leases.get(message_id)
        if lease is not None:
            return lease.stored
        if message_id in window.ahead or window.returned_as(message_id) is not None:
            return True
        if window.complete():
            return False
        return self._indexes.between(window.cursor, window.last, topic, message_id)

    def _is_known(self, topic: str, message_id: str) -> bool:
        """Whether a message is stored, leased, retained, or was so in this batch: a store removes last, and could not keep it."""
        here = message_id in self._windows[topic].leases or self._is_stored(topic, message_id)
        kept = here or self._storage.retains(topic, message_id)
        return kept or (topic, message_id) in self._indexes.left

    def _leaves(self, topic: str, message_id: str) -> None:
        """A stored message that is not in the window any more is not in the index either."""
        self._windows[topic].length -= 1
        self._indexes.left[topic, message_id] = None

    def _forget(self, topic: str, message_id: str) -> None:
        """A stored message goes; if it is leased, it is its holder's alone."""
        self._windows[topic].unstore(message_id)
        self._leaves(topic, message_id)

    def _unstore(self, offset: int, topic: str, message_id: str) -> Done:
        """A stored message goes."""
        self._forget(topic, message_id)
        return self._unindex(offset, topic, message_id)

    def given_up(self, offset: int, key: str, waiting: Waiting, reason: str, now_ms: int) -> Done:
        """See `Leasing`: the message leaves the queue, and is kept as dead."""
        self._leaves(key, waiting.message_id)
        dead = DeadMessage(
            topic=key, message_id=waiting.message_id, reason=reason,
            deliveries=waiting.deliveries, at=now_ms, holders=dead_holders(waiting.holders),
        )  # fmt: skip
        return [
            Unindex(offset, key, (waiting.message_id,)),
            SetDue(due_member(MESSAGE, key, waiting.message_id), None),
            *self._dead.add(offset, dead),
        ]

    def requeued(self, offset: int, event: OperatorRequeue, now_ms: int, score: int) -> Done:
        topic, message_id = event.topic, event.message_id
        done = self._dead.take(offset, topic, message_id)
        if done is None or self._is_stored(topic, message_id):
            return done or []
        window = self.window(offset, topic)
        lease = window.leases.get(message_id)
        if lease is not None:
            # Dead by overflow, and still in somebody's hands: that copy counts no more.
            done += self.release(lease)
            window.remove(message_id)
            done += self.freed(offset, topic, (lease.member,), now_ms)
        end = earliest(score // 1000, self._storage.plans.of(topic).index_lifetime_ms, None)
        done.append(Reindex(offset, topic, message_id, score, end))
        if end is not None:
            done.append(self._due.falls_due(due_member(INDEX, topic), end))
        return [*done, *self._append(offset, topic, message_id, score, now_ms)]

    # -- tick -----------------------------------------------------------------------------------------------

    def came_due(
        self, offset: int, kind: str, key: str, message_id: str, now_ms: int, score: int
    ) -> Done:
        if kind == DEAD:
            return self.dropped(offset, key, message_id)
        if kind == MESSAGE:
            done: Done = []
            if self._is_stored(key, message_id):
                done += self._unstore(NO_SOURCE, key, message_id)
            elif self._dead.held.get(message_id) is not None:
                return []  # given up in this very tick
            done += self._storage.expire(key, message_id)
        else:
            done = self._sweep_index(key, now_ms)
        self.window(offset, key)
        return [*done, *self.dispatch(offset, key, now_ms)]

    def too_old(self, key: str, now_ms: int) -> Done:
        """See `Leasing`. What a sweep has left over is due by itself."""
        if key in self._indexes.oldest:
            return []
        return [self._due.falls_due(due_member(INDEX, key), now_ms)]

    def _sweep_index(self, topic: str, now_ms: int) -> Done:
        """The index entries that are too old by the rules in force, and their bodies."""
        lifetime = self._storage.plans.of(topic).index_lifetime_ms
        if lifetime is None:
            return []  # the rules changed: nothing of this topic expires any more
        entries, limit = self._indexes.oldest[topic]
        expired, next_end = expired_entries(entries, limit, lifetime, now_ms)
        expired = [each for each in expired if (topic, each) not in self._indexes.left]
        for message_id in expired:
            if self._is_stored(topic, message_id):
                self._forget(topic, message_id)
        done: Done = [*self._storage.unindex(NO_SOURCE, topic, expired)]
        if next_end is not None:
            done.append(self._due.falls_due(due_member(INDEX, topic), next_end))
        return done

    # -- what steps want besides ----------------------------------------------------------------------------

    def wanted_besides(self, events: Sequence[Event]) -> list[Read]:
        """See `DeliveryMachine`: the place of what may be stored already, and of what a broker's client acknowledges."""
        messages: dict[tuple[str, str], None] = {}
        for event in events:
            match event:
                case MessagePublished() | OperatorRequeue():
                    messages[event.topic, event.message_id] = None
                case MessageAcked(message_id=message_id, topic=topic, broker_delivers=True):
                    messages[topic, self._windows[topic].known_as(message_id)] = None
        return self._unknown_places(messages)

    def _unknown_places(self, messages: Iterable[tuple[str, str]]) -> list[Read]:
        return self._indexes.unknown_places(
            message for message in messages if not self._windows[message[0]].complete()
        )

    def wanted_by_due(self, overdue: Sequence[tuple[str, str, str]]) -> list[Read]:
        """See `DeliveryMachine`: dead messages, the oldest entries of indexes, the places of messages."""
        reads: list[Read] = [*self._dead.unknown(each for kind, _, each in overdue if kind == DEAD)]
        reads += self._indexes.unknown_oldest(
            [topic for kind, topic, _ in overdue if kind == INDEX]
        )
        messages = [(topic, each) for kind, topic, each in overdue if kind == MESSAGE]
        if all(self._windows.get(topic) is not None for topic, _ in messages):
            reads += self._unknown_places(messages)
        return reads

    def leaving(self, key: str, overdue: Sequence[tuple[str, str, str]]) -> int:
        """See `DeliveryMachine`: what expires."""
        entries, _ = self._indexes.oldest.get(key, ((), 0))
        return len(entries) + sum(due[:2] == (MESSAGE, key) for due in overdue)

    def supply_besides(self, read: Read, answer: Any) -> None:
        self._indexes.supply(read, answer)

    def finish(self) -> Sequence[Effect]:
        self._indexes = Indexes()
        return super().finish()

    # -- after a refusal ------------------------------------------------------------------------------------

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """A foreign key was in the way of a message: it is not stored, and the queue has it no longer."""
        if isinstance(event, MessagePublished) and refusal.part in ("body", "index"):
            topic, message_id = event.topic, event.message_id
            window = self.window(refusal.offset, topic)
            if self._is_stored(topic, message_id):
                self._forget(topic, message_id)
            effects = [x for x in self.note_waiting(topic, window) if not isinstance(x, Output)]
            return [*effects, *self._storage.refused(event, refusal)]
        return self._storage.refused(event, refusal)


def _waiting(event: MessagePublished, now_ms: int) -> MessagePublished:
    """A QoS 0 message as it waits: it expires soon."""
    end = now_ms + QOS_0_WAIT_MS
    expires_at = end if event.expires_at is None else min(event.expires_at, end)
    return structs.replace(event, expires_at=expires_at)
