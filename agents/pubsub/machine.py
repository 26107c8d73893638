"""The pubsub agent's machine: one log for each topic, every subscriber its own read offset.

Rule 1: every transition of a subscriber's reading is in this file, `forgetting.py` or `state.py`; leases and members are in
`agents/delivery/`, what is kept besides in `agents/keeping.py`. Rule 2: no IO, no clock, no chance.

ON published: unless its id was seen, append; hand to every online subscriber with room. QoS 0 is not stored unless a rule
says so: it is handed once to those that are online. ON joined: a known subscriber reads on behind its offset, a new one
from the start that the rule says. ON acked: the offset moves over the unbroken run of what is done with. ON unsubscribed:
the offset is forgotten, unless another filter of the client matches; groups, and sessions that ended, keep theirs for
`offset_retention_s`. ON tick: what is too old is trimmed, and offsets before it move up. ON rewind: the subscriber reads
on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from agents.delivery.dead import DeadMessage
from agents.delivery.leasing import Done, in_turn
from agents.delivery.machine import READ_MIN
from agents.delivery.window import AHEAD_MAX, Waiting, holds
from agents.due import DEAD, INDEX, MESSAGE, SUBSCRIBER, WINDOW, due_member
from agents.effects import NO_SOURCE, Effect, HandOut, Refusal, SetIndex, Unindex
from agents.keeping import expired_entries
from agents.ports import Read, ReadEntry, ReadIndex
from agents.pubsub.forgetting import Forgetting
from agents.pubsub.readers import TOPICS
from agents.pubsub.state import reader_key, shown, split_reader, subscriber_named
from schemas.errors import DecodeError
from schemas.events import (
    DeliveryFailed,
    Event,
    MessageAcked,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
    SubscriberJoined,
    SubscriberLeft,
)

# One tick looks at no more index entries than this; what is left over is still due, so that another tick follows.
SWEEP_ENTRIES_MAX: Final = 4_096
# A publish into a log that is too long takes off the oldest; after a rule has made it shorter, up to this many.
OVERFLOW_MAX: Final = 8


class PubsubMachine(Forgetting):
    """The transitions of one partition."""

    of_logs = (INDEX, MESSAGE)

    def __init__(self) -> None:
        """An empty partition without rules; `restore` follows."""
        super().__init__()
        self._forget_entries()

    def _forget_entries(self) -> None:
        # Supplied for a batch: where messages are in their index; the oldest entries of indexes, and how many were
        # asked for; the logs whose head is being read.
        self._places: dict[tuple[str, str], int | None] = {}
        self._oldest: dict[str, tuple[list[tuple[str, int]], int]] = {}
        self._heads: dict[ReadIndex, str] = {}

    # -- published ------------------------------------------------------------------------------------------

    def touched_by(self, event: MessagePublished | MessageAcked) -> Iterable[str]:
        """See `DeliveryMachine`."""
        if isinstance(event, MessagePublished):
            return self.readers_of(event.topic)
        return self.readers_of_client(event.client_id, event.topic)

    def published(self, offset: int, event: MessagePublished, now_ms: int, score: int) -> Done:
        """See the head of this file."""
        plan = self._keeper.plans.of(event.topic)
        if plan.error is not None:
            raise DecodeError(plan.error)
        if not self._keeper.seen.add(event.message_id, now_ms):
            return []
        done: Done = []
        if event.expires_at is None or event.expires_at > now_ms:
            indexed = event.qos > 0 or plan.store_qos0
            done += self._keeper.published(offset, event, score, indexed=indexed)
            if indexed:
                done += self._append(offset, event.topic, event.message_id, score, now_ms)
            else:
                done += self._pass_on(offset, event, score)
        if plan.commands["message.publish"]:
            done += self._keeper.commands(offset, event)
        return done

    def _append(self, offset: int, topic: str, message_id: str, score: int, now_ms: int) -> Done:
        log, delivery = self._logs.touch(offset, topic), self._keeper.plans.of(topic).delivery
        done: Done = []
        if not log.length:
            done.append(SetIndex(TOPICS, topic, 0))
        if not log.number:
            log.cursor = log.read_to = score - 1  # what the index holds before is somebody else's
        before = log.last
        limit = None if delivery is None else delivery.max_length
        if limit is not None and log.complete() and len(log.ahead) < AHEAD_MAX:
            log.append(message_id, score)
        log.number += 1
        log.length += 1
        log.last = score
        for _ in range(OVERFLOW_MAX):
            if limit is None or log.length <= limit:
                break
            oldest = log.next()
            assert oldest is not None, (
                "a log that is too long has an oldest message, and it is read"
            )
            done += self._trim(offset, topic, [(oldest.message_id, oldest.score)])
        online = self.readers_of(topic)
        for key in dict.fromkeys((*online, *self.expected(topic))):
            reader = self._windows[key]
            if reader.read_to >= before and len(reader.ahead) < AHEAD_MAX and score > log.cursor:
                reader.append(message_id, score)
        for key in online:
            done += self.dispatch(offset, key, now_ms)
        return done

    def _pass_on(self, offset: int, event: MessagePublished, score: int) -> Done:
        """QoS 0, not stored: to every subscriber that is online and has room, once."""
        delivery = self._keeper.plans.of(event.topic).delivery
        if delivery is None or self.pauses():
            return []
        done: Done = []
        waiting = Waiting(score, event.message_id)
        for subscriber, reaches in self.subscribers_of(event.topic).items():
            reader = self.window(offset, reader_key(subscriber, event.topic))
            reach = in_turn(reaches, reader.turn, waiting, delivery.max_inflight)
            if reach is not None:
                reader.turn = reach.name
                hand_out = HandOut(
                    offset, 0, reach.member.client_id, reach.member.epoch, event.message_id,
                    event.topic, reach.qos, 1, event.expires_at, stored=False,
                )  # fmt: skip
                done.append(hand_out)
        return done

    # -- done with ------------------------------------------------------------------------------------------

    def acked_by_client(self, offset: int, event: MessageAcked, now_ms: int) -> Done:
        """See the head of this file. Where a client has copies of several subscribers, each ack is for one of them."""
        for key in self.readers_of_client(event.client_id, event.topic):
            reader = self.window(offset, key)
            message_id = reader.known_as(event.message_id)
            lease = reader.leases.get(message_id)
            if lease is not None and holds(lease.holders, event.client_id):
                return self.acked(offset, key, message_id, now_ms)
            waiting = reader.returned_as(message_id)
            if waiting is not None and holds(waiting.holders, event.client_id):
                reader.remove(message_id)
                reader.finish(waiting.score, message_id)
                return self.note_waiting(key, reader)
        return []

    def acknowledged(self, offset: int, key: str, message_id: str, score: int) -> Done:
        """See `Leasing`."""
        self._windows[key].finish(score, message_id)
        return []

    def given_up(self, offset: int, key: str, waiting: Waiting, reason: str, now_ms: int) -> Done:
        """See `Leasing`: for this subscriber the message is dead; the others go on with it."""
        subscriber, topic = split_reader(key)
        self._windows[key].finish(waiting.score, waiting.message_id)
        before = self._dead.held.get(waiting.message_id)
        known = () if before is None else before.subscribers
        others = tuple(each for each in known if each != subscriber)
        dead = DeadMessage(
            topic=topic, message_id=waiting.message_id, reason=f"{shown(subscriber)}: {reason}",
            deliveries=waiting.deliveries, at=now_ms, score=waiting.score,
            subscribers=(*others, subscriber),
        )  # fmt: skip
        return self._dead.add(offset, dead)

    def dropped(self, offset: int, topic: str, message_id: str) -> Done:
        """See `DeliveryMachine`: the body goes, if the log does not have it any more."""
        dead = self._dead.held[message_id]
        done = self._dead.take(offset, topic, message_id)
        if done is None or dead is None:
            return []
        if dead.score <= self._logs[topic].cursor:
            self._keeper.let_go(topic, message_id)
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
            if reader.made_at is not None and reader.returned_as(message_id) is None:
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
        for lease in list(reader.leases.values()):
            done += self.release(lease)
        made_at, turn, lost = reader.made_at, reader.turn, reader.lost
        reader.clear()
        reader.made_at, reader.turn, reader.lost = made_at, turn, lost
        reader.cursor = reader.read_offset = min(max(event.after, log.cursor), log.last)
        reader.message_id = event.message_id or ""
        reader.number = log.number if reader.cursor >= log.last else log.trimmed
        reader.forget_ahead()
        done += self.note_waiting(key, reader)
        for reach in self.reaching(key):
            done += self.start_round(reach.name, reach.member)
        return done

    # -- trimmed --------------------------------------------------------------------------------------------

    def _trim(self, offset: int, topic: str, entries: Sequence[tuple[str, int]]) -> Done:
        """Take the oldest messages off a log. The bodies of dead ones are kept."""
        log = self._logs.touch(offset, topic)
        names = [message_id for message_id, _ in entries]
        for message_id, score in entries:
            log.ahead.pop(message_id, None)
            log.cursor, log.floor_id = score, message_id
            if self._dead.held.get(message_id) is None:
                self._keeper.let_go(topic, message_id)
        log.read_to = max(log.read_to, log.cursor)
        log.trimmed += len(entries)
        log.length -= len(entries)
        done: Done = [Unindex(offset, topic, tuple(names))]
        if not log.length:
            done.append(SetIndex(TOPICS, topic, None))
        return done

    def came_due(self, offset: int, kind: str, key: str, message_id: str, now_ms: int) -> Done:
        """See `DeliveryMachine`."""
        if kind == SUBSCRIBER:
            return self.subscriber_due(offset, key, now_ms)
        if kind == DEAD:
            return self.dropped(offset, key, message_id)
        if kind == MESSAGE:
            done = self._expire(offset, key, message_id)
        else:
            done = self._sweep_index(key, now_ms)
        for reader in self.readers_of(key):
            done += self.dispatch(offset, reader, now_ms)
        return done

    def _sweep_index(self, topic: str, now_ms: int) -> Done:
        lifetime = self._keeper.plans.of(topic).index_lifetime_ms
        if lifetime is None:
            return []  # the rules changed: nothing of this topic expires any more
        entries, limit = self._oldest[topic]
        expired, next_end = expired_entries(entries, limit, lifetime, now_ms)
        log = self._logs[topic]
        ours = [entry for entry in entries[: len(expired)] if entry[1] > log.cursor]
        done = self._trim(NO_SOURCE, topic, ours) if ours else []
        if next_end is not None:
            done.append(self._due.falls_due(due_member(INDEX, topic), next_end))
        return done

    def _expire(self, offset: int, topic: str, message_id: str) -> Done:
        """A message with an expiry of its own leaves a gap in the log; whoever has it keeps it for himself."""
        if self._places.get((topic, message_id)) is not None:
            self._logs.touch(offset, topic).length -= 1
        for reader in self._windows.values():
            reader.ahead.pop(message_id, None)
        self._logs[topic].ahead.pop(message_id, None)
        return [*self._keeper.expire(topic, message_id)]

    # -- what steps want besides ----------------------------------------------------------------------------

    def more_needed(self, key: str, publishes: int) -> int:
        """See `DeliveryMachine`."""
        return 0

    def wanted_besides(self, events: Sequence[Event]) -> list[Read]:
        """See `DeliveryMachine`: logs and what they retain, those that come and go, what may be dead already."""
        published = [x for x in events if isinstance(x, MessagePublished)]
        orders = [x for x in events if isinstance(x, OperatorRequeue | OperatorDrop)]
        topics = [event.topic for event in (*published, *orders)]
        reads: list[Read] = [*self.unknown_logs(topics), *self._keeper.unknown(topics)]
        self.expect(events)
        reads += self.unknown_subscribers(self.subscribers_in(events))
        reads += self._dead.unknown(self._returning(events))
        return reads or self._heads_needed(published)

    def _returning(self, events: Sequence[Event]) -> list[str]:
        """The messages that may come back from somebody's hands, and turn out to be dead."""
        keys: dict[str, None] = {}
        for event in events:
            if isinstance(event, SubscriberJoined | SubscriberLeft | DeliveryFailed):
                for _, member in self._members.of_client(event.client_id):
                    keys.update(dict.fromkeys(member.leases.values()))
        return self._leased(keys)

    def _leased(self, keys: Iterable[str]) -> list[str]:
        windows = (self._windows.get(key) for key in keys)
        return [each for window in windows if window is not None for each in window.leases]

    def _heads_needed(self, published: Sequence[MessagePublished]) -> list[Read]:
        """The oldest messages of logs that will be too long, and whether they are dead."""
        reads: list[Read] = []
        for topic in dict.fromkeys(event.topic for event in published):
            log, delivery = self._logs[topic], self._keeper.plans.of(topic).delivery
            count = sum(event.topic == topic for event in published)
            if delivery is None or delivery.max_length is None:
                continue
            too_long = log.length + count - delivery.max_length
            need = min(max(too_long, 0), count * OVERFLOW_MAX)
            if need > len(log.ahead) and not log.complete():
                limit = max(need - len(log.ahead), READ_MIN)
                read = ReadIndex(topic, limit, log.read_to)
                self._heads[read] = topic
                reads.append(read)
            else:
                reads += self._dead.unknown(list(log.ahead)[:need])
        return reads

    def wanted_by_due(self, overdue: Sequence[tuple[str, str, str]]) -> list[Read]:
        """See `DeliveryMachine`."""
        topics = [key for kind, key, _ in overdue if kind in (INDEX, MESSAGE, DEAD)]
        reads: list[Read] = [*self.unknown_logs(topics), *self._keeper.unknown(topics)]
        reads += self.unknown_subscribers(key for kind, key, _ in overdue if kind == SUBSCRIBER)
        indexes = [topic for kind, topic, _ in overdue if kind == INDEX]
        limit = SWEEP_ENTRIES_MAX // max(len(indexes), 1) + 1
        reads += [ReadIndex(topic, limit) for topic in indexes if topic not in self._oldest]
        messages = [(topic, each) for kind, topic, each in overdue if kind == MESSAGE]
        reads += [ReadEntry(*each) for each in messages if each not in self._places]
        if reads:
            return reads
        dead = [each for kind, _, each in overdue if kind == DEAD]
        swept = [each for entries, _ in self._oldest.values() for each, _ in entries]
        overdue_leases = self._leased(key for kind, key, _ in overdue if kind == WINDOW)
        return [*self._dead.unknown([*dead, *swept, *overdue_leases])]

    def supply_besides(self, read: Read, answer: Any) -> None:
        """See `DeliveryMachine`."""
        match read:
            case ReadEntry():
                self._places[read.topic, read.message_id] = answer
            case ReadIndex() if read in self._heads:
                log = self._logs[self._heads.pop(read)]
                log.supply(answer, read.limit, log.last)
            case ReadIndex():
                self._oldest[read.topic] = answer, read.limit
            case _:
                super().supply_besides(read, answer)

    def finish(self) -> Sequence[Effect]:
        """See `DeliveryMachine`."""
        self._forget_entries()
        return super().finish()

    # -- after a refusal ------------------------------------------------------------------------------------

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """A foreign key was in the way of a message: it is not stored. Who has a copy keeps it for himself."""
        if isinstance(event, MessagePublished) and refusal.part in ("body", "index"):
            self._logs.touch(refusal.offset, event.topic).length -= 1
        return self._keeper.refused(event, refusal)
