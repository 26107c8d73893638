"""The pubsub agent's machine: one log for each topic, every subscriber its own read offset.

Rule 1: every transition of a subscriber's reading is in this file, `forgetting.py`, `trimming.py` or `state.py`; leases and members are in
`agents/delivery/`, what is kept besides in `agents/topics/storage.py`. Rule 2: no IO, no clock, no chance.

ON published: unless its id was seen, append; hand to every online subscriber with room. QoS 0 is not stored unless a rule
says so: it is handed once to those that are online. ON joined: a known subscriber reads on behind its offset, a new one
from the start that the rule says. ON acked: the offset moves over the unbroken run of what is done with. ON unsubscribed:
the offset is forgotten, unless another filter of the client matches; groups, and sessions that ended, keep theirs for
`offset_retention_s`. ON tick: what is too old is trimmed, and offsets before it move up. ON rewind: the subscriber reads
on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millpond.agents.delivery.dead_messages import DeadMessage, dead_holders
from millpond.agents.delivery.leasing import Done
from millpond.agents.delivery.members import LeftCopy
from millpond.agents.delivery.window import Waiting, holds
from millpond.agents.effects import Effect, Refusal, SetIndex
from millpond.agents.pubsub.readers import TOPICS
from millpond.agents.pubsub.state import reader_key, shown, split_reader, subscriber_named
from millpond.agents.pubsub.trimming import OVERFLOW_MAX, Trimming
from millpond.agents.topics.due_times import DEAD, MESSAGE, SUBSCRIBER
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import (
    Event,
    MessageAcked,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
)


class PubsubMachine(Trimming):
    """The transitions of one partition."""

    # -- published ------------------------------------------------------------------------------------------

    def touched_by(self, event: MessagePublished | MessageAcked) -> Iterable[str]:
        if isinstance(event, MessagePublished):
            return dict.fromkeys((*self.readers_of(event.topic), *self.expected(event.topic)))
        readers = self.readers_of_client(event.client_id, event.topic)
        return dict.fromkeys((*readers, *self.expected(event.topic)))

    def published(self, offset: int, event: MessagePublished, now_ms: int, score: int) -> Done:
        topic, message_id = event.topic, event.message_id
        if not self._storage.is_new(event, now_ms) or self._storage.retains(topic, message_id):
            return []
        plan = self._storage.plans.of(event.topic)
        done: Done = []
        if event.expires_at is None or event.expires_at > now_ms:
            indexed = event.qos > 0 or plan.store_qos0
            done += self._storage.published(offset, event, score, indexed=indexed)
            if indexed:
                done += self._append(offset, event.topic, event.message_id, score, now_ms)
            else:
                for key in self.readers_of(event.topic):
                    done += self.pass_on(offset, key, event, score)
        if plan.commands["message.publish"]:
            done += self._storage.commands(offset, event)
        return done

    def _append(self, offset: int, topic: str, message_id: str, score: int, now_ms: int) -> Done:
        log, delivery = self._logs.touch(offset, topic), self._storage.plans.of(topic).delivery
        done: Done = []
        if not log.length:
            done.append(SetIndex(TOPICS, topic, 0))
        if not log.number:
            log.cursor = log.read_to = score - 1  # what the index holds before is somebody else's
        before = log.last
        limit = None if delivery is None else delivery.max_length
        if limit is not None and log.complete():
            self._read_ahead(log, message_id, score)
        log.number += 1
        log.length += 1
        log.last = score
        for _ in range(OVERFLOW_MAX):
            if limit is None or log.length <= limit:
                break
            oldest = log.next()
            if oldest is None or oldest.message_id == message_id:
                log.length = (
                    1  # something was published again, too late to be known: it was counted twice
                )
                break
            done += self._trim(offset, topic, [(oldest.message_id, oldest.score)])
        online = self.readers_of(topic)
        for key in dict.fromkeys((*online, *self.expected(topic))):
            reader = self._windows[key]
            if reader.made_at is None:
                self._unmade[key] = None
            if (log.length == 1 or reader.read_to >= before) and score > log.cursor:
                self._read_ahead(reader, message_id, score)
        for key in online:
            done += self.dispatch(offset, key, now_ms)
        return done

    # -- done with ------------------------------------------------------------------------------------------

    def acked_by_client(self, offset: int, event: MessageAcked, now_ms: int) -> Done:
        """See the head of this file. Where a client has copies of several subscribers, each ack is for one of them."""
        for key in self.readers_of_client(event.client_id, event.topic):
            found = self.acked_copy(event.client_id, key, event.message_id)
            done = self._acked_by_reader(offset, key, event, found, now_ms)
            if found is not None:
                return [*(done or ()), *self.freed(offset, key, found[:1], now_ms)]
            if done is not None:
                return done
        return self._taken_back(offset, event)

    def _acked_by_reader(
        self,
        offset: int,
        key: str,
        event: MessageAcked,
        found: tuple[str, LeftCopy] | None,
        now_ms: int,
    ) -> Done | None:
        """None if the reader knows no copy of that client."""
        reader, client_id = self.window(offset, key), event.client_id
        message_id = reader.known_as(event.message_id) if found is None else found[1].message_id
        lease = reader.leases.get(message_id)
        if lease is not None and holds(lease.holders, client_id):
            return self.acked(offset, key, message_id, client_id, now_ms)
        waiting = reader.returned_as(message_id)
        if waiting is not None and holds(waiting.holders, client_id):
            reader.remove(message_id)
            return self.note_waiting(key, reader)
        if found is not None:
            return self._taken_back(offset, event, split_reader(key)[0])
        return None

    def _taken_back(self, offset: int, event: MessageAcked, subscriber: str | None = None) -> Done:
        """A subscriber has done with a dead message after all. With the last one the message is dead no more."""
        found = self._dead.held_by(event.topic, event.client_id, event.message_id, subscriber)
        if found is None:
            return []
        dead = self._dead.acked_for(offset, *found)
        if dead.subscribers:
            return []
        if dead.kept:
            self._dead.requeued(offset, dead)
            return []
        return self.dropped(offset, event.topic, dead.message_id)

    def acknowledged(self, offset: int, key: str, message_id: str, score: int) -> Done:
        """See `Leasing`: the reader is done with it, since it has it no more."""
        return []

    def given_up(self, offset: int, key: str, waiting: Waiting, reason: str, now_ms: int) -> Done:
        """See `Leasing`: for this subscriber the message is dead; the others go on with it."""
        subscriber, topic = split_reader(key)
        before = self._dead.held.get(waiting.message_id)
        known = () if before is None else before.subscribers
        others = tuple(each for each in known if each != subscriber)
        holders = () if before is None else before.holders
        dead = DeadMessage(
            topic=topic, message_id=waiting.message_id, reason=f"{shown(subscriber)}: {reason}",
            deliveries=waiting.deliveries, at=now_ms, score=waiting.score,
            subscribers=(*others, subscriber),
            holders=(
                *(each for each in holders if each[2] != subscriber),
                *dead_holders(waiting.holders, subscriber),
            ),
            kept=before is not None and (before.requeued or before.kept),
        )  # fmt: skip
        return self._dead.add(offset, dead)

    def expires_at(self, key: str, waiting: Waiting) -> int | None:
        """See `Leasing`. What is requeued is kept as long as if it were dead."""
        requeued = waiting.message_id in self._windows[key].requeued
        return None if requeued else super().expires_at(key, waiting)

    def dropped(self, offset: int, topic: str, message_id: str) -> Done:
        """See `DeliveryMachine`: the body goes, if the log does not have it any more."""
        dead = self._dead.held[message_id]
        done = self._dead.take(offset, topic, message_id)
        if done is None or dead is None:
            return []
        if dead.score <= self._logs[topic].cursor:
            self._storage.let_go(topic, message_id)
        return done

    def came_due(
        self, offset: int, kind: str, key: str, message_id: str, now_ms: int, score: int
    ) -> Done:
        if kind == SUBSCRIBER:
            return self.subscriber_due(offset, key, now_ms, score)
        if kind == DEAD:
            return self.dropped(offset, key, message_id)
        if kind == MESSAGE:
            done = self._expire(offset, key, message_id)
        else:
            done = self._sweep_index(key, now_ms)
        for reader in self.readers_of(key):
            done += self.dispatch(offset, reader, now_ms)
        return done

    def touched_by_operator(
        self, event: OperatorRequeue | OperatorDrop | OperatorRewind
    ) -> Iterable[str]:
        """See `DeliveryMachine`: the readers that gave up on a message, or that is rewound."""
        if isinstance(event, OperatorRewind):
            return (reader_key(subscriber_named(event.subscriber), event.topic),)
        dead = self._dead.held.get(event.message_id)
        if dead is None or isinstance(event, OperatorDrop):
            return ()
        return [reader_key(each, event.topic) for each in dead.subscribers]

    def requeued(self, offset: int, event: OperatorRequeue, now_ms: int, score: int) -> Done:
        """Those who gave up on a message get it once more, first of all. Its body is kept as long as if it were dead."""
        topic, message_id = event.topic, event.message_id
        dead = self._dead.held[message_id]
        if dead is None or dead.topic != topic:
            return []
        done: Done = []
        for subscriber in dead.subscribers:
            key = reader_key(subscriber, topic)
            reader = self.window(offset, key)
            here = message_id in reader.leases or reader.returned_as(message_id) is not None
            comes = here or dead.score > reader.cursor or message_id in reader.requeued
            if reader.made_at is not None and not comes:
                reader.requeued.append(message_id)
                reader.take_back(Waiting(dead.score, message_id))
                done += self.dispatch(offset, key, now_ms)
        self._dead.requeued(offset, dead)
        return done

    def rewound(self, offset: int, event: OperatorRewind, now_ms: int, score: int) -> Done:
        """See the head of this file. What is in the subscriber's hands counts no more: it comes again, or is passed."""
        key = reader_key(subscriber_named(event.subscriber), event.topic)
        reader, log = self.window(offset, key), self._logs[event.topic]
        if reader.made_at is None:
            raise DecodeError(f"{event.subscriber!r} does not read {event.topic!r}")
        done: Done = []
        names = dict.fromkeys(reach.name for reach in self.reaching(key))
        for lease in list(reader.leases.values()):
            names[lease.member] = None
            done += self.release(lease)
        made_at, turn, lost = reader.made_at, reader.turn, reader.lost
        reader.clear()
        reader.made_at, reader.turn, reader.lost = made_at, turn, lost
        reader.cursor = reader.read_offset = min(max(event.after, log.cursor), log.last)
        reader.message_id = reader.cursor_id = event.message_id or ""
        reader.number = log.number if reader.cursor >= log.last else log.gone
        reader.forget_ahead()
        done += self.note_waiting(key, reader)
        for name in names:
            member = self._members.get(name)
            if member is not None and member.filters:
                done += self.start_round(name, member)
        return done

    # -- after a refusal ------------------------------------------------------------------------------------

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """A foreign key was in the way of a message: it is not stored. Who has a copy keeps it for himself."""
        if isinstance(event, MessagePublished) and refusal.part in ("body", "index"):
            again = event.message_id in self._refused  # body and index alike
            self._refused[event.message_id] = None
            shorter = [] if again else self._shorter(refusal.offset, event.topic, 1)
            return [*shorter, *self._storage.refused(event, refusal)]
        return self._storage.refused(event, refusal)
