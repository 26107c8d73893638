"""Work that is more than one step's: members that go round many topics, and windows that go on after a pause.

It waits in one index of the partition, in order; every tick does a bounded piece of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple

from millpond.agents.delivery.leasing import RESUME, WAITING, WORK, Done, W
from millpond.agents.delivery.members import Member, Reach, Round
from millpond.agents.delivery.membership import Membership
from millpond.agents.effects import SetIndex
from millpond.agents.reads import Read, ReadBelow, ReadNames
from millpond.schemas.events import AgentName
from millpond.schemas.topics import WILDCARDS, has_wildcard, matches

# What one tick does: some ms of Redis.
ROUNDS_MAX: Final = 16  # members on their round
FILTERS_MAX: Final = 16  # of one of them
PAGE_MAX: Final = 64  # windows that a wildcard leads to, or that go on after a pause


# In front of the name of work that is nobody's round. No member's name begins so ([MQTT-1.5.4-2]).
BESIDES: Final = "\0besides\0"


class Stop(NamedTuple):
    """Where a member is on its round: a window, by which filter it came there, and its topic."""

    key: str
    topic_filter: str
    topic: str


class Rounds(Membership[W]):
    """The work of one partition."""

    agent: AgentName

    def forget_work(self) -> None:
        """What was supplied for a tick is done, or was for nothing."""
        self._work: Sequence[tuple[str, int]] | None = None
        self._pages: dict[ReadNames, list[str]] = {}

    @abstractmethod
    def page(self, name: str, topic_filter: str, after: str, *, everything: bool) -> ReadNames:
        """How to read what waits for a member by a wildcard, or `everything` there is, behind a topic."""

    @abstractmethod
    def key_on_page(self, name: str, topic_filter: str, entry: str, *, everything: bool) -> str:
        """The window that an entry of such a page stands for."""

    def wanted_by_work(self) -> list[Read]:
        """The members whose turn it is, and what waits for them."""
        if self._counters.work and self._work is None:
            return [ReadBelow(WORK, self._counters.place + 1, ROUNDS_MAX)]
        reads: dict[Read, None] = {}
        for name, _ in self._work or ():
            if name == RESUME:
                reads[self._resume_page()] = None
                continue
            if name.startswith(BESIDES):
                reads[self.page_besides(name)] = None
                continue
            for _, page in self._way(name, self._members[name]):
                if page is not None:
                    reads[page] = None
        return [read for read in reads if read not in self._pages]

    def work_keys(self) -> list[tuple[str, Member | None]]:
        """The windows that this tick's work looks at, and for which member; None for all."""
        found: list[tuple[str, Member | None]] = []
        for name, _ in self._work or ():
            if name == RESUME:
                found += [(key, None) for key in self._pages[self._resume_page()]]
                continue
            if name.startswith(BESIDES):
                found += [(key, None) for key in self._pages[self.page_besides(name)]]
                continue
            member = self._members[name]  # one on its round is not forgotten
            found += [(stop.key, member) for stop in self._stops(name, member)[0]]
        return found

    def _resume_page(self) -> ReadNames:
        return ReadNames(None, WAITING, "", self._counters.resume_after, PAGE_MAX)

    def _way(self, name: str, member: Member) -> list[tuple[str, ReadNames | None]]:
        """The filters from where a member is on its round, and what is to be read for each; None for a plain one."""
        at = member.round
        filters = [
            each
            for each in sorted(member.filters)
            if each > at.topic_filter
            or (each == at.topic_filter and (has_wildcard(each) or not at.after))
        ]
        way: list[tuple[str, ReadNames | None]] = []
        for each in filters[:FILTERS_MAX]:
            after = at.after if each == at.topic_filter else ""
            wild = has_wildcard(each)
            page = self.page(name, each, after, everything=at.everything) if wild else None
            way.append((each, page))
        return way

    def _stops(self, name: str, member: Member) -> tuple[list[Stop], tuple[str, str] | None]:
        """The next windows on a member's round, and where it goes on behind them; None at the end."""
        stops: dict[str, Stop] = {}
        topic_filter = ""
        for topic_filter, page in self._way(name, member):
            if page is None:
                key = self.own_key(name, topic_filter)
                stops.setdefault(key, Stop(key, topic_filter, topic_filter))
                continue
            entries = self._pages[page]
            for entry in entries:
                topic = self.topic_of(entry)
                ignored = self._members.ignores(name, topic_filter, topic)
                if matches(topic_filter, topic) and not ignored:
                    everything = member.round.everything
                    key = self.key_on_page(name, topic_filter, entry, everything=everything)
                    stops.setdefault(key, Stop(key, topic_filter, topic))
            if len(entries) >= page.limit:
                return list(stops.values()), (topic_filter, self.topic_of(entries[-1]))
        later = next((each for each in sorted(member.filters) if each > topic_filter), None)
        return list(stops.values()), None if later is None else (later, "")

    @abstractmethod
    def unread(self, key: str) -> int:
        """How many messages of a window lie ahead and are not in memory."""

    def page_besides(self, name: str) -> ReadNames:
        """What a tick has to read for other work of the agent's own."""
        raise AssertionError(f"no such work: {name!r}")

    def work_besides(self, offset: int, name: str, now_ms: int) -> Done:
        """A piece of other work of the agent's own."""
        raise AssertionError(f"no such work: {name!r}")

    def do_work(self, offset: int, now_ms: int, waits: int) -> Done:
        """A piece for each whose turn it is. So many windows had begun to wait when it was read which do."""
        done: Done = []
        for name, _ in self._work or ():
            self._counters.work -= 1
            done.append(SetIndex(WORK, name, None))
            if name == RESUME:
                done += self._resumption(offset, now_ms)
                continue
            if name.startswith(BESIDES):
                done += self.work_besides(offset, name, now_ms)
                continue
            member = self._members[name]
            self._members.touch(name)
            if member.filters:
                done += self._go_round(offset, name, member, now_ms, waits)
            else:
                member.round = Round()
        self.forget_work()
        return done

    def _resumption(self, offset: int, now_ms: int) -> Done:
        done: Done = []
        keys = self._pages.get(self._resume_page())
        if keys is None:
            return self.queue_work(RESUME)  # it has been told to begin anew, in this very tick
        for key in keys:
            done += self.dispatch(offset, key, now_ms)
        if self._counters.paused or len(keys) < PAGE_MAX:
            self._counters.resuming = False
            return [*done, *self._interrupted()]
        self._counters.resume_after = keys[-1]
        return [*done, *self.queue_work(RESUME)]

    def _interrupted(self) -> Done:
        """Those go on whose way through all there is was interrupted by a pause: nothing waits where they were not yet."""
        done: Done = []
        for name, member in sorted(self._members.awake().items()):
            at = member.round
            if at.everything and not at.active and member.filters and not self._counters.paused:
                done += self.start_round(name, member)
        return done

    def _go_round(self, offset: int, name: str, member: Member, now_ms: int, waits: int) -> Done:
        at = member.round
        if not at.topic_filter and not at.after:
            at.whole = waits == self._counters.waits
        stops, then = self._stops(name, member)
        last, done = self._serve(offset, name, stops, now_ms)
        if member.in_hand >= self.inflight_max() or not member.ready() or self.pauses():
            # No room for anything: it goes on from here when it has.
            topic_filter, topic = (at.topic_filter, at.after) if last is None else last[1:]
            member.round = Round(topic_filter, topic, everything=at.everything)
            return done
        if then is not None:
            at.topic_filter, at.after = then
            return [*done, *self.queue_work(name)]
        if not at.whole:
            # It began in the middle, or something has begun to wait since: that is in the index of what waits.
            member.round = Round(active=True, left_some=at.left_some)
            return [*done, *self.queue_work(name)]
        if not at.left_some:
            member.served = self._counters.waits
        member.round = Round()
        return done

    def inflight_max(self) -> int:
        """How much a member can have in hand, by any rule of this agent."""
        rules = self._storage.rules.delivery_rules_of(self.agent)
        return max((each.max_inflight for each in rules), default=0)

    def _serve(
        self, offset: int, name: str, stops: Sequence[Stop], now_ms: int
    ) -> tuple[Stop | None, Done]:
        """One message of each window, again and again; the stop of the last one."""
        done: Done = []
        last: Stop | None = None
        at, left = self._members[name].round, list(stops)
        while left:
            served = [stop for stop in left if self._hand_one(done, offset, name, stop.key, now_ms)]
            last, left = served[-1] if served else last, served
        for stop in stops:
            window = self._windows[stop.key]
            done += self.note_waiting(stop.key, window)
            at.left_some |= window.waits
            if window.next() is None and self.unread(stop.key):
                at.whole = (
                    False  # what was read for this tick is not what there is: it comes by once more
                )
        return last, done

    def _hand_one(self, done: Done, offset: int, name: str, key: str, now_ms: int) -> bool:
        self.window(offset, key)
        delivery, member = self.delivery(key), self._members[name]
        reach = self._reach(name, key)
        if delivery is None or reach is None or not member.ready():
            return False
        if member.in_hand >= delivery.max_inflight:
            return False  # what is next need not be known then
        waiting = self.first_for(done, key, reach, delivery, now_ms)
        if waiting is None:
            return False
        if self.expired(key, waiting, now_ms):
            done += self.too_old(key, now_ms)
            return False
        if self.pauses():
            return False
        done += self.lease(offset, key, waiting, reach, now_ms)
        return True

    def _reach(self, name: str, key: str) -> Reach | None:
        return next((reach for reach in self.reaching(key) if reach.name == name), None)


def literal_prefix(topic_filter: str) -> str:
    """How every topic begins that a filter matches; "a/#" also matches "a"."""
    if topic_filter.endswith("/#") and not any(
        each in WILDCARDS for each in topic_filter[:-2].split("/")
    ):
        return topic_filter[:-2]
    levels = topic_filter.split("/")
    plain = levels[: next((at for at, each in enumerate(levels) if each in WILDCARDS), len(levels))]
    return "".join(f"{level}/" for level in plain)
