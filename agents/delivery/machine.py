"""What the driver sees of a delivery agent: what its steps want, what they get, and who decides about an event.

The decisions themselves are in `leasing.py`, `silence.py`, `membership.py`, `rounds.py` and the agent's own `machine.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import msgspec

from millpond.agents.delivery.dead_messages import DeadMessages
from millpond.agents.delivery.leasing import Counters, Done, W
from millpond.agents.delivery.members import Members, member_name
from millpond.agents.delivery.policy import TopicPolicy
from millpond.agents.delivery.window import Window
from millpond.agents.effects import Effect, Output, SetDue, SetRules, SetState
from millpond.agents.ports import LoadedState
from millpond.agents.reads import (
    Read,
    ReadAllStates,
    ReadBelow,
    ReadDue,
    ReadEntry,
    ReadIndex,
    ReadNames,
    ReadStates,
)
from millpond.agents.topics.due_times import MEMBER, RETAINED, WINDOW, split_due
from millpond.schemas.events import (
    AgentName,
    DeliveriesSent,
    DeliveryFailed,
    Event,
    MembersActive,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    MessageRetained,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
    RulesChanged,
    Sent,
    SubscriberJoined,
    SubscriberLeft,
    Tick,
)
from millpond.schemas.leases import lease_number
from millpond.schemas.rules import Rules
from millpond.schemas.topics import has_wildcard, intersects

READ_MIN: Final = 256  # entries of an index read at once, when any are needed
# Entries of indexes in memory, of all windows: 20 MiB or so. Beyond that, those of the windows that were used the longest
# ago are forgotten, until half of the limit is left: so counting them is rare. They are read again as needed.
AHEAD_TOTAL_MAX: Final = 131_072


class DeliveryMachine(TopicPolicy[W]):
    """One partition of a delivery agent."""

    agent: AgentName

    # -- what the driver asks -----------------------------------------------------------------------------

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        self._due.restore(partition_state)
        self._storage.restore(partition_state, stored, rules)
        self._counters = msgspec.convert(partition_state.get("delivery", {}), Counters)
        self._members = Members(self._ignores_wildcards)
        self._windows = self.new_windows()
        self._dead = DeadMessages(self._due, self._counters)
        self._members_cursor: int | None = 0  # None once all of them are known
        self._ahead_reads: dict[ReadIndex, list[str]] = {}
        self._ahead_total = 0
        self.forget_work()

    def _ignores_wildcards(self, topic: str) -> bool:
        return self._storage.plans.ignores_wildcards(topic)

    def partition_state(self) -> dict[str, Any]:
        counters = msgspec.to_builtins(self._counters)
        seen, due = self._storage.seen.partition_state(), self._due.partition_state()
        return {**seen, **due, "delivery": counters}

    @property
    def next_due_ms(self) -> int | None:
        """Work that waits is due at once."""
        return 0 if self._counters.work else self._due.next_ms

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        return self._storage.rules

    def owns(self, key: str) -> bool:
        """The topics of this agent's delivery rules, and wildcards that may match one of them."""
        if not has_wildcard(key):
            return self.rules.owner(key) == self.agent
        filters = (rule.topic_filter for rule in self.rules.delivery_rules_of(self.agent))
        return any(intersects(each, key) for each in filters)

    def alone(self, event: Event) -> bool:
        """Some read indexes, so everything before must be in them; new rules decide what is owned. What is requeued
        enters the index that it may just have left, and within a batch a store removes last.
        """
        return isinstance(event, Tick | MessageRetained | RulesChanged | OperatorRequeue)

    def wanted(self, events: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """The windows of the events; then what lies ahead of them, as far as there is room for it."""
        if self._members_cursor is not None:
            return [ReadAllStates(self._members_cursor, "members")]
        if len(events) == 1 and isinstance(events[0], Tick):
            return self._wanted_by_tick(now_ms)
        freed: Counter[str] = Counter()
        for event in events:
            for key, count in self._touches(event):
                freed[key] += count
        reads: list[Read] = [*self.unknown(freed)]
        may_be_dead = OperatorRequeue | OperatorDrop | MessageRetained
        reads += self._dead.unknown([x.message_id for x in events if isinstance(x, may_be_dead)])
        reads += self._dead.unknown_acked(
            [x.message_id for x in events if isinstance(x, MessageAcked)]
        )
        reads += self._storage.wanted_by_retained(events)
        reads += self._members.unknown(_told_of(events))
        if reads:
            return reads
        appended = Counter(key for x in events for key in self._appended_to(x))
        reported = len(self.reported_early(events))
        for key, count in freed.items():
            room = self.room(key) + count + reported
            need = min(room, self.unread(key) + len(self._windows[key].ahead))
            self.want_ahead(reads, key, need + self.more_needed(key, appended[key]))
        return [*reads, *self.wanted_besides(events)]

    def _appended_to(self, event: Event) -> Iterable[str]:
        match event:
            case MessagePublished():
                return self.touched_by(event)
            case OperatorRequeue():
                return self.touched_by_operator(event)
            case _:
                return ()

    def reported_early(self, events: Sequence[Event]) -> list[Sent | DeliveryFailed]:
        """The reports of leases that these events are yet to bring, as in a replay."""
        reports: list[Sent | DeliveryFailed] = []
        for event in events:
            match event:
                case DeliveryFailed():
                    reports.append(event)
                case DeliveriesSent():
                    reports += event.sent
        return [each for each in reports if lease_number(each.lease) > self._counters.lease]

    def unknown(self, keys: Iterable[str]) -> list[ReadStates]:
        """The reads for windows, and for what their topics retain, where they are not known."""
        unknown = self._windows.unknown(keys)
        reads = [ReadStates(unknown, "windows")] if unknown else []
        return [*reads, *self._storage.unknown(map(self.topic_of, keys))]

    def _touches(self, event: Event) -> Iterator[tuple[str, int]]:
        """The windows that an event changes, and for how many more messages it may make room in each."""
        match event:
            case MessagePublished():
                yield from ((key, 0) for key in self.touched_by(event))
            case MessageAcked():
                yield from ((key, 1) for key in self.touched_by(event))
            case DeliveriesSent():
                yield from ((key, 1) for key in map(self.leased_key, event.sent) if key)
            case DeliveryFailed():
                key = self.leased_key(event)
                if key is not None:
                    yield key, 1
            case OperatorRequeue() | OperatorDrop() | OperatorRewind():
                yield from ((key, 1) for key in self.touched_by_operator(event))
            case SubscriberJoined() | SubscriberLeft():
                yield from self._touched_by_member(event)

    def _touched_by_member(
        self, event: SubscriberJoined | SubscriberLeft
    ) -> Iterator[tuple[str, int]]:
        name, topic_filter = member_name(event.client_id, event.topic_filter)
        joins, member = isinstance(event, SubscriberJoined), self._members.get(name)
        keys: dict[str, None] = {}
        if member is not None:
            left = (copy.key for copy in member.left.values())
            keys = dict.fromkeys((*member.leases.values(), *left))
        if joins and not has_wildcard(topic_filter):
            keys[self.own_key(name, topic_filter)] = None
        for key in keys:
            # One that comes back may be served at once where it had something in hand.
            delivery = self.delivery(key) if joins else None
            yield key, delivery.max_inflight if delivery else 0

    def room(self, key: str) -> int:
        """How many messages of a window its members could take now."""
        delivery = self.delivery(key)
        if delivery is None:
            return 0
        limit = delivery.max_inflight
        return sum(self._members.room(reach.name, limit) for reach in self.reaching(key))

    def want_ahead(self, reads: list[Read], key: str, need: int) -> None:
        """Read so much that reading more could not change what the steps decide."""
        window = self._windows[key]
        if len(window.ahead) >= need or not self.unread(key):
            return
        limit = max(need - len(window.ahead), READ_MIN)
        read = ReadIndex(self.topic_of(key), limit, self.read_from(key))
        self._ahead_reads.setdefault(read, []).append(key)
        if read not in reads:
            reads.append(read)

    def read_from(self, key: str) -> int:
        """Behind which place in the log (a score) a window's messages are not in memory."""
        return self._windows[key].read_to

    def _wanted_by_tick(self, now_ms: int) -> list[Read]:
        reads: list[Read] = [] if self._due.supplied is not None else [self._due.wanted()]
        reads += self.wanted_by_work()
        if reads:
            return reads
        overdue = self._due.overdue(now_ms)
        work = self.work_keys()
        reads += self.unknown([*self.due_windows(overdue), *(key for key, _ in work)])
        reads += self.wanted_by_due(overdue)
        reads += self._members.unknown(key for kind, key, _ in overdue if kind == MEMBER)
        if reads:
            return reads
        due = self.due_windows(overdue)
        # One tick hands out to all of them, one after the other, so their needs add up.
        need: Counter[str] = Counter()
        for key in due:
            need[key] += (
                self.room(key) + len(self._windows[key].leases) + self.leaving(key, overdue)
            )
        limit, names = self.inflight_max(), {name for name, _ in self._work or ()}
        for key, member in work:
            if member is None:
                # A member whose round ends in the same tick is served here, too.
                ending = sum(reach.name in names for reach in self.reaching(key))
                need[key] += self.room(key) + limit * ending
            else:
                # What is overdue in the same tick may be in its hands no more.
                kept = sum(leased not in due for leased in member.leases.values())
                need[key] += max(0, limit - kept)
        for key, count in need.items():
            self.want_ahead(reads, key, count)
        return reads

    def due_windows(self, overdue: Sequence[tuple[str, str, str]]) -> dict[str, None]:
        """The windows of what is due. A member's are seen to by its round."""
        return {key: None for kind, key, _ in overdue if kind != MEMBER}

    def supply(self, read: Read, answer: Any) -> None:
        match read:
            case ReadAllStates():
                cursor, packed = answer
                self._members.supply_all(packed)
                self._members_cursor = cursor or None
            case ReadStates(table="members"):
                self._members.supply(answer)
            case ReadStates(table="windows"):
                self._windows.supply(answer)
            case ReadStates(table="dead" | "aliases"):
                self._dead.supply(read, answer)
            case ReadStates(table="states"):
                self._storage.retained.supply(answer)
            case ReadEntry():
                self._storage.supply_place(read, answer)
                self.supply_besides(read, answer)
            case ReadDue():
                self._due.supplied = answer
            case ReadBelow():
                self._work = answer
            case ReadNames():
                self._pages[read] = answer
            case ReadIndex() if read in self._ahead_reads:
                for key in self._ahead_reads.pop(read):
                    self._windows[key].supply(answer, read.limit, self.last_of(key))
                    self._ahead_total += len(answer)
            case _:
                self.supply_besides(read, answer)

    def step(self, offset: int, event: Event, now_ms: int, score: int) -> Sequence[Effect | Output]:
        """One event. A topic or filter that is none, or rules that cannot be read, are a `DecodeError`."""
        match event:
            case MessagePublished():
                return self.published(offset, event, now_ms, score)
            case MessageRetained():
                dead = self._dead.held[event.message_id] is not None
                return self._storage.broker_retains(offset, event, score, dead=dead)
            case MessageAcked():
                done: Done = [*self._storage.reported(offset, event, now_ms)]
                self.active((event.client_id,), now_ms)
                return [*done, *self.acked_by_client(offset, event, now_ms)]
            case MessageDelivered():
                return self._storage.reported(offset, event, now_ms)
            case DeliveriesSent() | DeliveryFailed() | MembersActive():
                return self._told_by_bridge(offset, event, now_ms)
            case SubscriberJoined():
                return self.joined(offset, event, now_ms, score)
            case SubscriberLeft():
                return self.left(offset, event, now_ms, score)
            case OperatorRequeue() | OperatorDrop() | OperatorRewind():
                return self._ordered(offset, event, now_ms, score)
            case Tick():
                return self._tick(offset, now_ms, score)
            case RulesChanged():
                self._storage.rules_changed(Rules.from_canonical(event.rules))
                self._members.rules_changed()
                return [SetRules(event.rules), *self.resume()]
            case _:
                return ()  # another agent's concern

    def _told_by_bridge(
        self, offset: int, event: DeliveriesSent | DeliveryFailed | MembersActive, now_ms: int
    ) -> Done:
        """What became of copies, or who is at work on them."""
        if isinstance(event, DeliveriesSent):
            return self.sent(offset, event, now_ms)
        if isinstance(event, DeliveryFailed):
            return self.failed(offset, event, now_ms)
        self.active(event.client_ids, now_ms)
        return []

    def finish(self) -> Sequence[Effect]:
        """One write for each window and member that the batch changed, however often."""
        effects: list[Effect] = []
        for _, key, _, window in self._windows.finish():
            effects.append(SetState(key, self.packed(window), "windows"))
            window.trim()
        effects += [*self._members.finish(), *self._dead.finish(), *self._storage.finish()]
        self._forget_far_ahead()
        return effects

    def reading_ahead(self) -> Iterator[Iterable[Window]]:
        """What has entries of indexes in memory, the least recently used first in each group."""
        yield self._windows.values()

    def _forget_far_ahead(self) -> None:
        """Keep the entries of indexes that are in memory within their limit."""
        if self._ahead_total <= AHEAD_TOTAL_MAX:
            return
        # It only counts what comes: this is what is there.
        self._ahead_total = sum(len(x.ahead) for group in self.reading_ahead() for x in group)
        if self._ahead_total <= AHEAD_TOTAL_MAX:
            return
        for window in chain.from_iterable(self.reading_ahead()):
            if self._ahead_total <= AHEAD_TOTAL_MAX // 2:
                break
            self._ahead_total -= len(window.ahead)
            window.forget_ahead()

    def settled(self) -> None:
        self._windows.settled()
        self._members.settled()
        self._dead.settled()
        self._storage.settled()

    def _ordered(
        self,
        offset: int,
        event: OperatorRequeue | OperatorDrop | OperatorRewind,
        now_ms: int,
        score: int,
    ) -> Done:
        """An operator's order."""
        if isinstance(event, OperatorRequeue):
            return self.requeued(offset, event, now_ms, score)
        if isinstance(event, OperatorDrop):
            return self.dropped(offset, event.topic, event.message_id)
        return self.rewound(offset, event, now_ms, score)

    # -- what both agents do --------------------------------------------------------------------------------

    def dropped(self, offset: int, topic: str, message_id: str) -> Done:
        """ON drop, or a dead message's time is over: it is deleted."""
        done = self._dead.take(offset, topic, message_id)
        if done is None:
            return []
        self._storage.let_go(topic, message_id)
        return done

    def _tick(self, offset: int, now_ms: int, score: int) -> Done:
        done: Done = []
        waits = self._counters.waits
        for due in self._due.take(now_ms):
            done.append(SetDue(due, None))
            kind, key, message_id = split_due(due)
            if kind == WINDOW:
                done += self.overdue_leases(offset, key, now_ms)
            elif kind == MEMBER:
                done += self.member_due(key, now_ms)
            elif kind == RETAINED:
                done += self._storage.sweep_retained(key, now_ms)
            else:
                done += self.came_due(offset, kind, key, message_id, now_ms, score)
        return [*done, *self.do_work(offset, now_ms, waits)]


def _told_of(events: Sequence[Event]) -> Iterator[str]:
    """The members that come or go."""
    for event in events:
        if isinstance(event, SubscriberJoined | SubscriberLeft):
            yield member_name(event.client_id, event.topic_filter)[0]
