"""Who is remembered as a subscriber, and how its read offsets are forgotten: at once in what decides, a piece with every
tick in the store.
"""

from __future__ import annotations

from collections.abc import Iterable

from millpond.agents.delivery.leasing import Done
from millpond.agents.delivery.rounds import BESIDES, PAGE_MAX
from millpond.agents.pubsub.readers import READERS, Readers, known_by
from millpond.agents.pubsub.state import Reader, reader_key, shown, split_reader, subscriber_of
from millpond.agents.reads import Read, ReadNames
from millpond.agents.topics.due_times import SUBSCRIBER, due_member
from millpond.schemas.events import SubscriberJoined


class Forgetting(Readers):
    """The subscribers of one partition."""

    def window(self, offset: int, key: str) -> Reader:
        """See `Leasing`. One that was given up is as good as forgotten, even if no tick has come by yet."""
        if self._counters.forgetting:
            self._besides += self._forget_reader(offset, key)
        return super().window(offset, key)

    def remember(self, name: str, topic_filter: str, event: SubscriberJoined, score: int) -> Done:
        key = subscriber_of(name, topic_filter)
        subscriber = self._subscribers.touch(event.source_offset, key)
        subscriber.known.setdefault(topic_filter, known_by(event, score))
        subscriber.gone_at = None
        return []

    def forget(self, offset: int, name: str, topic_filter: str, now_ms: int, score: int) -> Done:
        """See `Membership`. A group goes on without one of its members."""
        if subscriber_of(name, topic_filter) != name:
            return self.went(name, topic_filter, now_ms, ended=False)
        subscriber = self._subscribers.touch(offset, name)
        if subscriber.known.pop(topic_filter, None) is None:
            return []
        subscriber.given_up[topic_filter] = score
        leased = dict.fromkeys(self._members[name].leases.values())
        return self._start_forgetting(offset, name, leased, now_ms, score)

    def went(self, name: str, topic_filter: str, now_ms: int, *, ended: bool) -> Done:
        """See `Membership`. A group has gone with its last member, whatever that went for."""
        subscriber = subscriber_of(name, topic_filter)
        if subscriber == name:
            return self._gone(name, now_ms) if ended else []
        return [] if self._members.group(shown(subscriber)) else self._gone(subscriber, now_ms)

    def _gone(self, key: str, now_ms: int) -> Done:
        if not self._subscribers[key].known:
            return []  # nothing of it is remembered
        subscriber = self._subscribers.touch(0, key)
        subscriber.gone_at = now_ms
        return [self._due.falls_due(due_member(SUBSCRIBER, key), now_ms + self._retention_ms())]

    def _retention_ms(self) -> int:
        rules = self.rules.delivery_rules_of(self.agent)
        return max((each.offset_retention_s * 1000 for each in rules), default=0)

    def subscriber_due(self, offset: int, key: str, now_ms: int, score: int) -> Done:
        """A subscriber that has gone for good may have been away for too long."""
        subscriber = self._subscribers.touch(offset, key)
        if subscriber.gone_at is None:
            return []
        end = subscriber.gone_at + self._retention_ms()
        if end > now_ms:
            return [self._due.falls_due(due_member(SUBSCRIBER, key), end)]
        subscriber.given_up.update((each, score) for each in subscriber.known)
        subscriber.known.clear()
        return self._start_forgetting(offset, key, self.leased((), (key,)), now_ms, score)

    def _start_forgetting(
        self, offset: int, subscriber: str, leased: Iterable[str], now_ms: int, started: int
    ) -> Done:
        """What is in somebody's hands is given up at once, all else a piece with every tick."""
        done: Done = []
        for key in leased:
            names = [lease.member for lease in self._windows[key].leases.values()]
            done += self._forget_reader(offset, key)
            done += self.freed(offset, key, dict.fromkeys(names), now_ms)
        self._counters.forgetting += 1
        return [*done, *self.queue_work(f"{BESIDES}{started}\0{subscriber}\0")]

    def wanted_by_work(self) -> list[Read]:
        """See `Rounds`: the subscribers that forget some readers, too."""
        names = [name for name, _ in self._work or () if name.startswith(BESIDES)]
        forgetting = self.unknown_subscribers(split_forgetting(name)[1] for name in names)
        return [*super().wanted_by_work(), *forgetting]

    def page_besides(self, name: str) -> ReadNames:
        """See `Rounds`: readers of the subscriber that forgets some."""
        _, subscriber, after = split_forgetting(name)
        behind = reader_key(subscriber, after) if after else ""
        return ReadNames(None, READERS, reader_key(subscriber, ""), behind, PAGE_MAX)

    def work_besides(self, offset: int, name: str, now_ms: int) -> Done:
        """See `Rounds`: forget the readers that were given up."""
        started, subscriber, _ = split_forgetting(name)
        state = self._subscribers.touch(offset, subscriber)
        keys = self._pages[self.page_besides(name)]
        done: Done = []
        for key in keys:
            made_at = self._windows[key].made_at
            if made_at is not None and state.has_given_up(self.topic_of(key), made_at):
                done += self._forget_reader(offset, key)
        if len(keys) >= PAGE_MAX:
            after = self.topic_of(keys[-1])
            return [*done, *self.queue_work(f"{BESIDES}{started}\0{subscriber}\0{after}")]
        self._counters.forgetting -= 1
        state.given_up = {each: at for each, at in state.given_up.items() if at > started}
        return done

    def _forget_reader(self, offset: int, key: str) -> Done:
        """A reader is no more, if its filter was given up; what it had leased is nobody's."""
        subscriber, topic = split_reader(key)
        reader = self.touched(offset, key)
        state = self._subscribers.get(subscriber)  # whoever has given up something is known
        if reader.made_at is None or state is None or not state.has_given_up(topic, reader.made_at):
            return []
        done: Done = []
        for lease in list(reader.leases.values()):
            done += self.release(lease)
        reader.clear()
        self._made[key] = None
        return [*done, *self.note_waiting(key, reader)]


def split_forgetting(name: str) -> tuple[int, str, str]:
    """When it was started (a score), the subscriber, and the topic behind which it goes on. A group's name has the
    separator in front.
    """
    started, _, rest = name.removeprefix(BESIDES).partition("\0")
    subscriber, _, after = rest.rpartition("\0")
    return int(started), subscriber, after
