"""What takes messages off a log, and what has to be read for that.

Rule 1: every way that a stored message goes is in this file. Rule 2: no IO, no clock, no chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from msgspec import structs

from millpond.agents.delivery.leasing import Done
from millpond.agents.delivery.machine import READ_MIN
from millpond.agents.delivery.window import AHEAD_MAX, Window
from millpond.agents.effects import NO_SOURCE, Effect, SetIndex, Unindex
from millpond.agents.pubsub.forgetting import Forgetting
from millpond.agents.pubsub.readers import TOPICS
from millpond.agents.reads import Read, ReadEntry, ReadIndex
from millpond.agents.topics.due_times import (
    DEAD,
    INDEX,
    MESSAGE,
    RETAINED,
    SUBSCRIBER,
    WINDOW,
    due_member,
)
from millpond.agents.topics.storage import expired_entries, oldest_entries
from millpond.schemas.events import (
    DeliveryFailed,
    Event,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    SubscriberJoined,
    SubscriberLeft,
)

# A publish into a log that is too long takes off the oldest; after a rule has made it shorter, up to this many.
OVERFLOW_MAX: Final = 8


class Trimming(Forgetting):
    """The logs of one partition."""

    of_logs = (INDEX, MESSAGE)

    def _forget_memory(self) -> None:
        super()._forget_memory()
        self._forget_entries()

    def _forget_entries(self) -> None:
        self._refused: dict[str, None] = {}  # messages of which a part was
        # Supplied for a batch: where messages are in their index; the oldest entries of indexes, and how many were
        # asked for; the logs whose head is being read.
        self._places: dict[tuple[str, str], int | None] = {}
        self._oldest: dict[str, tuple[list[tuple[str, int]], int]] = {}
        self._heads: dict[ReadIndex, str] = {}
        self._expiring: Counter[str] = Counter()  # messages that a tick takes out of a log
        self._too_far: dict[int, Window] = {}  # what has more ahead in memory than it should

    # -- trimmed --------------------------------------------------------------------------------------------

    def _trim(self, offset: int, topic: str, entries: Sequence[tuple[str, int]]) -> Done:
        """Take the oldest messages off a log. The bodies of dead ones are kept."""
        log = self._logs.touch(offset, topic)
        names = [message_id for message_id, _ in entries]
        for message_id, score in entries:
            log.ahead.pop(message_id, None)
            log.cursor, log.floor_id = score, message_id
            if self._dead.held.get(message_id) is None:
                self._storage.let_go(topic, message_id)
        log.read_to = max(log.read_to, log.cursor)
        return [Unindex(offset, topic, tuple(names)), *self._shorter(offset, topic, len(names))]

    def _shorter(self, offset: int, topic: str, count: int) -> list[Effect]:
        """So many messages of a log are stored no more."""
        log = self._logs.touch(offset, topic)
        log.length -= count
        return [] if log.length else [SetIndex(TOPICS, topic, None)]

    def _sweep_index(self, topic: str, now_ms: int) -> Done:
        lifetime = self._storage.plans.of(topic).index_lifetime_ms
        if lifetime is None:
            return []  # the rules changed: nothing of this topic expires any more
        entries, limit = self._oldest[topic]
        expired, next_end = expired_entries(entries, limit, lifetime, now_ms)
        log = self._logs[topic]
        ours = [
            entry
            for entry in entries[: len(expired)]
            if entry[1] > log.cursor and self._places.get((topic, entry[0]), 0) is not None
        ]
        done = self._trim(NO_SOURCE, topic, ours) if ours else []
        # Also what expired by itself, and may come back from somebody's hands, is too old now.
        left = [score - 1 for _, score in entries[len(expired) :]]
        floor = min((now_ms - lifetime + 1) * 1000 - 1, log.last, *left[:1])
        if floor > log.cursor:
            self._logs.touch(NO_SOURCE, topic)
            log.cursor, log.floor_id = floor, ""
        if next_end is not None:
            done.append(self._due.falls_due(due_member(INDEX, topic), next_end))
        return done

    def _expire(self, offset: int, topic: str, message_id: str) -> Done:
        """A message with an expiry of its own leaves a gap in the log; whoever has it keeps it for himself."""
        place, log = self._places[topic, message_id], self._logs[topic]
        self._places[topic, message_id] = None
        done: Done = []
        if place is not None and place > log.cursor:
            done += self._shorter(offset, topic, 1)
        for key in self.leased((topic,), ()):
            lease = self.window(offset, key).leases.get(message_id)
            if lease is not None and lease.stored:
                self._windows[key].unstore(message_id)
        for reader in self._windows.values():
            reader.ahead.pop(message_id, None)
        log.ahead.pop(message_id, None)
        dead = self._dead.held[message_id]
        if dead is None:
            return [*done, *self._storage.expire(topic, message_id)]
        self._dead.held.change(offset, message_id, structs.replace(dead, score=0))
        return [*done, Unindex(offset, topic, (message_id,))]

    # -- what steps want besides ----------------------------------------------------------------------------

    def more_needed(self, key: str, publishes: int) -> int:
        """See `DeliveryMachine`: what a log that is too long loses cannot be handed out."""
        return self._too_long(self.topic_of(key), publishes)

    def want_ahead(self, reads: list[Read], key: str, need: int) -> None:
        """See `DeliveryMachine`: not what was trimmed, lies before a reader's start or goes in a tick; and one more,
        which tells whether anything waits.
        """
        topic = self.topic_of(key)
        reader = self._windows[key]
        reader.forget_trimmed(self._logs[topic].cursor)
        if reader.made_at is None:
            latest = max(self.starts(key))
            need += sum(score <= latest for score in reader.ahead.values())
        lifetime = self._storage.plans.of(topic).index_lifetime_ms
        if topic in self._oldest and lifetime is not None:
            need += len(expired_entries(*self._oldest[topic], lifetime, self._now_ms)[0])
        super().want_ahead(reads, key, need + 1 + self._expiring[topic])

    def _too_long(self, topic: str, publishes: int) -> int:
        """How many of the oldest messages go when there are so many new ones."""
        log, delivery = self._logs[topic], self._storage.plans.of(topic).delivery
        if delivery is None or delivery.max_length is None:
            return 0
        too_long = log.length + publishes - delivery.max_length
        return min(max(too_long, 0), publishes * OVERFLOW_MAX)

    def wanted_besides(self, events: Sequence[Event]) -> list[Read]:
        """See `DeliveryMachine`: logs and what they retain, those that come and go, what may be dead already."""
        published = [x for x in events if isinstance(x, MessagePublished)]
        orders = [x for x in events if isinstance(x, OperatorRequeue | OperatorDrop)]
        topics = [event.topic for event in (*published, *orders)]
        reads: list[Read] = [*self.unknown_logs(topics), *self._storage.unknown(topics)]
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
        early = (report.message_id for report in self.reported_early(events))
        return [*self._leased(keys), *early]

    def _leased(self, keys: Iterable[str]) -> list[str]:
        windows = (self._windows.get(key) for key in keys)
        return [each for window in windows if window is not None for each in window.leases]

    def _heads_needed(self, published: Sequence[MessagePublished]) -> list[Read]:
        """The oldest messages of logs that will be too long, and whether they are dead."""
        reads: list[Read] = []
        for topic, count in Counter(event.topic for event in published).items():
            log, need = self._logs[topic], self._too_long(topic, count)
            if need > len(log.ahead) and not log.complete():
                limit = max(need - len(log.ahead), READ_MIN)
                read = ReadIndex(topic, limit, log.read_to)
                self._heads[read] = topic
                reads.append(read)
            else:
                reads += self._dead.unknown(list(log.ahead)[:need])
        return reads

    def wanted_by_due(self, overdue: Sequence[tuple[str, str, str]]) -> list[Read]:
        topics = [key for kind, key, _ in overdue if kind in (INDEX, MESSAGE, RETAINED, DEAD)]
        reads: list[Read] = [*self.unknown_logs(topics), *self._storage.unknown(topics)]
        reads += self.unknown_subscribers(key for kind, key, _ in overdue if kind == SUBSCRIBER)
        indexes = [topic for kind, topic, _ in overdue if kind == INDEX]
        reads += oldest_entries(indexes, self._oldest)
        messages = [(topic, each) for kind, topic, each in overdue if kind == MESSAGE]
        self._expiring = Counter(topic for topic, _ in messages)
        reads += [ReadEntry(*each) for each in messages if each not in self._places]
        if reads:
            return reads
        dead = [each for kind, _, each in overdue if kind in (DEAD, MESSAGE)]
        swept = [each for entries, _ in self._oldest.values() for each, _ in entries]
        overdue_leases = self._leased(key for kind, key, _ in overdue if kind == WINDOW)
        return [*self._dead.unknown([*dead, *swept, *overdue_leases])]

    def supply_besides(self, read: Read, answer: Any) -> None:
        match read:
            case ReadEntry():
                self._places[read.topic, read.message_id] = answer
            case ReadIndex() if read in self._heads:
                log = self._logs[self._heads.pop(read)]
                log.supply(answer, read.limit, log.last)
                self._ahead_total += len(answer)
            case ReadIndex():
                self._oldest[read.topic] = answer, read.limit
            case _:
                super().supply_besides(read, answer)

    def finish(self) -> Sequence[Effect]:
        for window in self._too_far.values():
            window.forget_ahead()
        self._forget_entries()
        return super().finish()

    def _read_ahead(self, window: Window, message_id: str, score: int) -> None:
        """A new message is known to who knows all before it, up to the end of the batch."""
        window.append(message_id, score)
        self._ahead_total += 1
        if len(window.ahead) > AHEAD_MAX:
            self._too_far[id(window)] = window
