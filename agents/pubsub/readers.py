"""Who reads which topic from where: how readers are made, moved up, looked for, and forgotten.

The transitions that events cause are in `machine.py`; this is what all of them stand on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from millpond.agents.delivery.leasing import WAITING, Done
from millpond.agents.delivery.machine import DeliveryMachine
from millpond.agents.delivery.members import HeldFilter, Reach, make_reach, member_name
from millpond.agents.delivery.rounds import PAGE_MAX, literal_prefix
from millpond.agents.delivery.window import Window
from millpond.agents.effects import Effect, Output, SetIndex, SetState, ShowOffset
from millpond.agents.ports import LoadedState
from millpond.agents.pubsub.state import (
    GROUP,
    KnownFilter,
    Reader,
    Subscriber,
    TopicLog,
    pack,
    reader_key,
    shown,
    split_reader,
    subscriber_of,
    unpack_log,
    unpack_reader,
    unpack_subscriber,
)
from millpond.agents.reads import Read, ReadNames, ReadStates
from millpond.agents.topics.due_times import MESSAGE, SUBSCRIBER, WINDOW
from millpond.agents.topics.state_cache import StateCache
from millpond.schemas.events import (
    AgentName,
    Event,
    OperatorRewind,
    SubscriberJoined,
    SubscriberLeft,
)
from millpond.schemas.rules import Rules
from millpond.schemas.topics import has_wildcard, matches, split_share

TOPICS: Final = "topics"  # the index of topics that have a log
READERS: Final = "readers"  # the index of readers


class Readers(DeliveryMachine[Reader]):
    """The readers of one partition. The key of a window is that of a reader."""

    agent: AgentName = "pubsub"

    def __init__(self) -> None:
        """An empty partition without rules; `restore` follows."""
        super().__init__(self.new_windows())
        self._forget_memory()

    def _forget_memory(self) -> None:
        self._logs: StateCache[TopicLog] = StateCache(unpack_log)
        self._subscribers: StateCache[Subscriber] = StateCache(unpack_subscriber)
        # Who joins in the batch by which filters, with their starts; and the readers of plain ones, by topic.
        self._joining: dict[str, dict[tuple[str, int], None]] = {}
        self._expected: dict[str, dict[str, None]] = {}
        self._made: dict[
            str, int | None
        ] = {}  # readers that the batch has made (0) or forgotten (None)
        self._shown: dict[str, str] = {}  # the read offsets that are shown, of readers touched
        self._unmade: dict[str, None] = {}  # readers that were read ahead for before they are made
        self._noted: dict[str, None] = {}  # readers that began to wait or do so no more
        self._besides: Done = []  # what came of looking at a reader
        self._of_topics: dict[str, dict[str, list[Reach]]] = {}
        self._version = self._now_ms = 0

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        super().restore(partition_state, stored, rules)
        self._forget_memory()

    def alone(self, event: Event) -> bool:
        """A member that comes with a wildcard reads topics that the batch may not have loaded; one that has unsubscribed
        may come again at once, and then begins elsewhere, as does one that is rewound.
        """
        match event:
            case SubscriberJoined():
                return has_wildcard(event.topic_filter)
            case SubscriberLeft():
                return event.reason == "unsubscribed"
            case OperatorRewind():
                return True
            case _:
                return super().alone(event)

    def wanted(self, events: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """See `millpond.agents.ports.Machine`. Where those who join begin decides what is to be read."""
        self.expect(events)
        self._now_ms = now_ms
        return super().wanted(events, now_ms)

    def dispatch(self, offset: int, key: str, now_ms: int) -> Done:
        """See `Leasing`. A reader that begins anew has nothing in memory: a tick reads for it."""
        done, reader = super().dispatch(offset, key, now_ms), self._windows[key]
        delivery = self.delivery(key)
        if self.served_by_ticks(key):
            left = reader.waits
        else:
            left = reader.next() is None and self.unread(key) > 0
        if delivery is None or not left or self.pauses():
            return done
        for reach in self.reaching(key):
            if self._members.room(reach.name, delivery.max_inflight):
                done += self.start_round(reach.name, self._members[reach.name])
        return done

    def served_by_ticks(self, key: str) -> bool:
        """See `Leasing`. While its subscriber forgets readers like it, an event of a batch may have it begin anew, and
        the next event finds nothing in memory. Only a tick has read for it.
        """
        if not self._counters.forgetting:
            return False
        subscriber, topic = split_reader(key)
        state = self._subscribers.get(subscriber)
        return state is not None and any(matches(each, topic) for each in state.given_up)

    # -- what `agents/delivery/` asks -----------------------------------------------------------------------

    def new_windows(self) -> StateCache[Reader]:
        return StateCache(unpack_reader)

    def packed(self, window: Reader) -> bytes | None:
        return None if window.made_at is None else pack(window)

    def topic_of(self, key: str) -> str:
        return key.rpartition("\0")[2]

    def own_key(self, name: str, topic: str) -> str:
        return reader_key(subscriber_of(name, topic), topic)

    def subscribers_of(self, topic: str) -> dict[str, list[Reach]]:
        """The subscribers of a topic that are online, each with its members."""
        if self._version != self._members.version or len(self._of_topics) > PAGE_MAX * PAGE_MAX:
            self._version = self._members.version
            self._of_topics = {}
        if topic not in self._of_topics:
            self._of_topics[topic] = self._find_subscribers(topic)
        return self._of_topics[topic]

    def _find_subscribers(self, topic: str) -> dict[str, list[Reach]]:
        found: dict[tuple[str, str], list[HeldFilter]] = {}
        for topic_filter, name, held in self._members.holding(topic):
            found.setdefault((subscriber_of(name, topic_filter), name), []).append(held)
        reaches: dict[str, list[Reach]] = {}
        for (subscriber, name), held_ones in sorted(found.items(), key=lambda each: each[0]):
            reaches.setdefault(subscriber, []).append(make_reach(name, held_ones))
        return reaches

    def reaching(self, key: str) -> list[Reach]:
        subscriber, topic = split_reader(key)
        if not subscriber.startswith(GROUP):
            return self._members.reach(subscriber, topic)
        subscription = shown(subscriber)
        topic_filter = split_share(subscription)[1]
        return [
            make_reach(name, [self._members[name].filters[topic_filter]])
            for name in self._members.group(subscription)
        ]

    def readers_of(self, topic: str) -> list[str]:
        """The keys of the readers of a topic that are online."""
        return [reader_key(subscriber, topic) for subscriber in self.subscribers_of(topic)]

    def readers_of_client(self, client_id: str, topic: str) -> list[str]:
        """The keys of a client's readers of a topic: its own, those of its groups, and those it has leases of."""
        keys = {reader_key(client_id, topic): None}
        for name, member in self._members.of_client(client_id):
            if name == client_id:
                continue
            for topic_filter in member.filters:
                if matches(topic_filter, topic):
                    keys[reader_key(subscriber_of(name, topic_filter), topic)] = None
            left = (copy.key for copy in member.left.values())
            keys.update(
                (key, None)
                for key in (*member.leases.values(), *left)
                if self.topic_of(key) == topic
            )
        return list(keys)

    def last_of(self, key: str) -> int:
        return self._logs[self.topic_of(key)].last

    def something_waits(self, key: str, window: Reader) -> bool:
        if window.made_at is None:
            return False
        if window.silent and split_reader(key)[0].startswith(GROUP):
            return True  # for another member of the group
        return bool(window.returned) or window.cursor < self.last_of(key)

    def unread(self, key: str) -> int:
        reader, log = self._windows[key], self._logs[self.topic_of(key)]
        return log.length if reader.read_to < log.last else 0

    def note_waiting(self, key: str, window: Reader) -> Done:
        """See `Leasing`. Where nothing is ahead the reader is at the log's end, whatever has gone from it meanwhile."""
        last = self.last_of(key)
        if window.made_at is not None and not window.ahead and not self.unread(key):
            window.cursor = max(window.cursor, last)
        window.advance()
        if super().note_waiting(key, window):
            self._noted[key] = None
        return []

    def page(self, name: str, topic_filter: str, after: str, *, everything: bool) -> ReadNames:
        """See `Rounds`. A member that has come has no reader yet of topics that it has never read."""
        prefix = literal_prefix(topic_filter)
        if everything:
            return ReadNames(None, TOPICS, prefix, after, PAGE_MAX)
        subscriber = subscriber_of(name, topic_filter)
        behind = reader_key(subscriber, after) if after else ""
        return ReadNames(None, WAITING, reader_key(subscriber, prefix), behind, PAGE_MAX)

    def key_on_page(self, name: str, topic_filter: str, entry: str, *, everything: bool) -> str:
        if everything:
            return reader_key(subscriber_of(name, topic_filter), entry)
        return entry

    # -- making and moving up -------------------------------------------------------------------------------

    def touched(self, offset: int, key: str) -> Reader:
        """A reader as it is, that the record at `offset` may change."""
        reader = super().window(offset, key)
        self._shown.setdefault(key, reader.message_id)
        return reader

    def window(self, offset: int, key: str) -> Reader:
        """See `Leasing`. A reader is made when it is first looked at, and moves up to what its log still has."""
        reader = self.touched(offset, key)
        subscriber, topic = split_reader(key)
        log = self._logs[topic]
        if reader.made_at is None:
            self._make(key, reader, self._subscribers.get(subscriber), log)
        elif reader.cursor < log.cursor or reader.read_offset < log.cursor:
            reader.move_up(log)
        if reader.cursor >= log.last:
            reader.number = log.number
        return reader

    def read_from(self, key: str) -> int:
        """See `DeliveryMachine`. A reader that is yet to be made will start where its subscriber does."""
        reader = self._windows[key]
        if reader.made_at is not None or reader.read_to:
            return reader.read_to
        self._unmade[key] = None
        return min(self.starts(key))

    def starts(self, key: str) -> list[int]:
        """Where a reader that is yet to be made may begin, as far as its batch and what is known tell."""
        (subscriber, topic), delivery = split_reader(key), self.delivery(key)
        log = self._logs[topic]
        if delivery is None or delivery.start == "earliest":
            return [log.cursor]
        known = self._subscribers.get(subscriber)
        wants = None if known is None else known.wants(topic)
        places = [] if wants is None else [wants.start]
        places += [
            min(start or log.last, log.last)  # if not before the join, then at it: see `known_by`
            for wanted, start in self._joining.get(subscriber, ())
            if matches(wanted, topic)
        ]
        return [max(log.cursor, each) for each in places] or [log.cursor]

    def _make(self, key: str, reader: Reader, subscriber: Subscriber | None, log: TopicLog) -> None:
        topic = self.topic_of(key)
        known = None if subscriber is None else subscriber.wants(topic)
        delivery = self.delivery(key)
        if known is None or delivery is None:
            return  # nobody of that name reads it
        start = log.cursor if delivery.start == "earliest" else max(known.start, log.cursor)
        reader.made_at = known.since
        reader.number = log.gone if start == log.cursor else log.number
        reader.start(start)
        self._made[key] = 0

    # -- what steps want ------------------------------------------------------------------------------------

    def unknown(self, keys: Iterable[str]) -> list[ReadStates]:
        """See `DeliveryMachine`: with the readers their logs, and the subscribers of those that are not made yet."""
        every = list(keys)
        reads = [*super().unknown(every), *self.unknown_logs(map(self.topic_of, every))]
        if reads:
            return reads
        asked = (
            key for key in every if self._counters.forgetting or self._windows[key].made_at is None
        )
        return self.unknown_subscribers(split_reader(key)[0] for key in asked)

    def unknown_logs(self, topics: Iterable[str]) -> list[ReadStates]:
        """The reads for logs that are not known."""
        unknown = self._logs.unknown(topics)
        return [ReadStates(unknown, "logs")] if unknown else []

    def unknown_subscribers(self, subscribers: Iterable[str]) -> list[ReadStates]:
        """The reads for subscribers that are not known."""
        unknown = self._subscribers.unknown(subscribers)
        return [ReadStates(unknown, "subscribers")] if unknown else []

    def expected(self, topic: str) -> Iterable[str]:
        """The readers of those who join in the batch."""
        return self._expected.get(topic, ())

    def expect(self, events: Sequence[Event]) -> None:
        """Note who joins in a batch: what is published in it before that is for them, too."""
        for event in events:
            if isinstance(event, SubscriberJoined):
                name, topic_filter = member_name(event.client_id, event.topic_filter)
                subscriber = subscriber_of(name, topic_filter)
                self._joining.setdefault(subscriber, {})[topic_filter, start_of(event)] = None
                key = reader_key(subscriber, topic_filter)
                self._expected.setdefault(topic_filter, {})[key] = None

    def subscribers_in(self, events: Sequence[Event]) -> Iterator[str]:
        """The subscribers that come or go."""
        for event in events:
            if isinstance(event, SubscriberJoined | SubscriberLeft):
                name, topic_filter = member_name(event.client_id, event.topic_filter)
                yield subscriber_of(name, topic_filter)
                member = self._members.get(name)
                if member is not None:
                    yield from (subscriber_of(name, each) for each in member.filters)
                    yield from (split_reader(key)[0] for key in member.leases.values())

    def due_windows(self, overdue: Sequence[tuple[str, str, str]]) -> dict[str, None]:
        keys: dict[str, None] = {}
        for kind, key, _ in overdue:
            if kind == WINDOW:
                keys[key] = None
            elif kind in self.of_logs:
                keys.update(dict.fromkeys(self.readers_of(key)))
        topics = [key for kind, key, _ in overdue if kind == MESSAGE]
        subscribers = [key for kind, key, _ in overdue if kind == SUBSCRIBER]
        return keys | self.leased(topics, subscribers)

    def leased(self, topics: Sequence[str], subscribers: Sequence[str]) -> dict[str, None]:
        """The readers of these topics or subscribers of which somebody has something in hand."""
        if not (topics or subscribers):
            return {}
        members = self._members.awake().values()
        every = {key: None for member in members for key in member.leases.values()}
        parts = {key: split_reader(key) for key in sorted(every)}
        return {
            key: None
            for key, (subscriber, topic) in parts.items()
            if topic in topics or subscriber in subscribers
        }

    of_logs: tuple[
        str, ...
    ] = ()  # the kinds of due things after which a log's readers are looked at

    def supply_besides(self, read: Read, answer: Any) -> None:
        assert isinstance(read, ReadStates), "nothing else is wanted"
        (self._logs if read.table == "logs" else self._subscribers).supply(answer)

    # -- the end of a batch ---------------------------------------------------------------------------------

    def reading_ahead(self) -> Iterator[Iterable[Window]]:
        """See `DeliveryMachine`: logs that are too long read their oldest messages."""
        yield self._logs.values()
        yield from super().reading_ahead()

    def finish(self) -> Sequence[Effect]:
        effects = [each for each in self._besides if not isinstance(each, Output)]
        self._besides = []
        for key in self._unmade:
            if self._windows[key].made_at is None:
                self._windows[key].forget_ahead()  # it may be made elsewhere than was thought
        for key, message_id in self._shown.items():
            reader = self._windows[key]
            if reader.message_id != message_id:
                subscriber, topic = split_reader(key)
                effects.append(ShowOffset(0, shown(subscriber), topic, reader.message_id or None))
        effects += [SetIndex(READERS, key, score) for key, score in self._made.items()]
        for key in self._noted:
            effects.append(SetIndex(WAITING, key, 0 if self._windows[key].waits else None))
        self._shown, self._made, self._noted, self._unmade = {}, {}, {}, {}
        self._joining, self._expected = {}, {}
        for _, topic, _, log in self._logs.finish():
            effects.append(SetState(topic, pack(log), "logs"))
        for _, key, _, subscriber_state in self._subscribers.finish():
            blank = not (subscriber_state.known or subscriber_state.given_up)
            effects.append(SetState(key, None if blank else pack(subscriber_state), "subscribers"))
        return [*effects, *super().finish()]

    def settled(self) -> None:
        super().settled()
        self._logs.settled()
        self._subscribers.settled()


def known_by(event: SubscriberJoined, score: int) -> KnownFilter:
    """How a subscriber is known by a join at this place in the log.

    Its subscription came before its join. So a start behind the join is a fault of the clock that stamped the
    subscription, and messages behind the join would be passed.
    """
    return KnownFilter(score, min(start_of(event) or score, score))


def start_of(event: SubscriberJoined) -> int:
    """The place in the log behind which all is that was published after the subscription; 0 if that is not told.

    Clients and messages have different logs, so only a time can tell. What is of the same millisecond is behind it.
    """
    return event.subscribed_at * 1000 - 1 if event.subscribed_at else 0
