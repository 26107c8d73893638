"""Who may be served in a partition: the clients that are online with a filter that a delivery rule can match.

Every publish asks for them: they are in memory. Of the many that are idle there are only the bytes that the store has, a
third of what a member takes that is in use. Who has gone, and has nothing in hand any more, is in the store alone, and read
when there is word of it again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct, field

from millpond.agents.delivery.filter_tree import FilterTree
from millpond.agents.delivery.names import Names
from millpond.agents.delivery.window import Waiting
from millpond.agents.effects import SetState
from millpond.agents.reads import ReadStates
from millpond.schemas.topics import has_wildcard, split_share

TOPICS_REMEMBERED_MAX: Final = (
    10_000  # whose members were looked up; past that the memory starts anew
)
AWAKE_MAX: Final = 2_000  # members in use, a MiB or so; past that those that become idle are packed


class HeldFilter(Struct, frozen=True, array_like=True):
    """A filter that a member holds, since which place in the log (a score)."""

    qos: int
    since: int
    broker_delivers: bool


class Round(Struct, array_like=True):
    """A member's way through the topics that wait for it, or through `everything` there is when it has come: behind which
    topic of which filter it is. While it is `active`: whether it began with the first of them and nothing has begun to
    wait for it since; whether it had to leave something.
    """

    topic_filter: str = ""
    after: str = ""
    active: bool = False
    whole: bool = False
    left_some: bool = False
    everything: bool = False


class LeftCopy(Struct, frozen=True, array_like=True):
    """A copy that a client still has to acknowledge, of a lease that is over: the message went to another member, or is
    done with, or is dead. `number` was the lease's, `key` is the window's.
    """

    number: int
    key: str
    message_id: str
    alias: str | None

    @property
    def name(self) -> str:
        """What the copy is remembered by: there is one of a message of a window."""
        return copy_name(self.key, self.message_id)


class Member(Struct, array_like=True):
    """One client, or one client of a shared subscription's group.

    `joined_at` is the source offset of the latest word of it: older ones are ignored. Leases up to `epoch` are of a
    time that is over. `leases` are the numbers of those in its hands and the windows they are of. `rests_until` (ms) after
    `failures` commands in a row that did not reach it. `served` is how many topics had ever begun to wait when it had
    gone through all of its own. Without filters it is to be forgotten at `forget_at` (ms). `unconfirmed` counts
    its leases that nobody has reported yet, `awaited` those of them up to `epoch`: until they are, it gets nothing new, or
    that would overtake them. `acked_at` (ms) is when its client last acknowledged anything in this partition, or was
    said to be active; `acked_to` is the highest lease number that it has acknowledged. `left` are copies of leases that
    are over, which take up its room as long as its connection lasts: a client that is frozen would be sent more and more
    otherwise. `probes` counts those sent since `acked_at`.
    """

    client_id: str
    session: int
    joined_at: int
    filters: dict[str, HeldFilter] = field(default_factory=dict)
    leases: dict[int, str] = field(default_factory=dict)
    epoch: int = 0
    rests_until: int = 0
    failures: int = 0
    round: Round = field(default_factory=Round)
    served: int = 0
    forget_at: int = 0
    unconfirmed: int = 0
    awaited: int = 0
    acked_at: int = 0
    acked_to: int = 0
    left: dict[str, LeftCopy] = field(default_factory=dict)
    probes: int = 0

    @property
    def in_hand(self) -> int:
        """How much of its room is taken."""
        return len(self.leases) + len(self.left)

    def alive_until(self, timeout_ms: int) -> int:
        """Until when (ms) its last acknowledgement is a sign of life."""
        return self.acked_at + timeout_ms if self.acked_at else 0

    def spans(self, topic: str) -> bool:
        """Whether another topic than this one may wait for it."""
        return any(each != topic for each in self.filters)

    def away(self) -> bool:
        """Whether it has gone, and nothing is left to be done for it."""
        return not (self.filters or self.leases or self.round.active)

    def idle(self) -> bool:
        """Whether it is there, with room for all that anyone may have, and nothing is left to be done for it."""
        at_nothing = self.available() and not self.round.everything
        return at_nothing and bool(self.filters) and not self.in_hand

    def available(self) -> bool:
        """Whether it may be handed something now, if it has room. One on its round gets only what that brings."""
        return self.ready() and not self.round.active

    def ready(self) -> bool:
        """Whether its commands would be carried out, behind all that it was sent before."""
        return not self.rests_until and not self.awaited


class Reach(NamedTuple):
    """A member as one topic sees it: by its best filter. Where the broker delivers what is new, only what is not
    `newest` or older is for Millpond to hand over.
    """

    name: str
    qos: int
    newest: int | None

    def wants(self, waiting: Waiting) -> bool:
        """Whether a message is for Millpond to hand to it."""
        return self.newest is None or waiting.score <= self.newest


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Member).decode


class Members:
    """The members of one partition, by name, by filter, by client."""

    def __init__(self, ignores_wildcards: Callable[[str], bool] = lambda _: False) -> None:
        """None. `ignores_wildcards` says whether the rule of a topic serves no wildcard, except those of groups."""
        self._ignores_wildcards = ignores_wildcards
        self._awake: dict[str, Member] = {}  # by name
        self._asleep: dict[str, bytes] = {}  # the other names; all of these are idle
        self._woken: dict[str, bytes] = {}  # of those awake: whom the batch has only looked at
        self._holders = Names()  # by filter
        self._wildcards = FilterTree()
        self._in_groups: dict[str, tuple[str, ...]] = {}  # client id → names, in their order
        self._groups = Names()  # by $share/{group}/{filter}
        self._matching: dict[str, tuple[str, ...]] = {}
        self._reaches: dict[str, list[Reach]] = {}
        self.version = 0  # counts what changes who reaches what
        self._touched: dict[str, None] = {}
        # Whom the batch was told of or changes, and those of each batch that is not yet in the store: known until then,
        # even if there is no such member.
        self._passing: dict[str, None] = {}
        self._unsettled: deque[dict[str, None]] = deque()

    # -- who is in memory

    def supply_all(self, packed: Mapping[str, bytes]) -> None:
        """Some of all the members that the store has. Those that are away are asked for by name."""
        for name, state in packed.items():
            member = _decode(state)
            if member.away():
                continue
            self._put(name, member)
            for topic_filter in member.filters:
                self._hold(name, topic_filter)
            self._fall_asleep(name, member, state)

    def unknown(self, names: Iterable[str]) -> list[ReadStates]:
        """The reads for those that may be away."""
        asked = tuple(
            name for name in dict.fromkeys(names) if name not in self and not self._passes(name)
        )
        return [ReadStates(asked, "members")] if asked else []

    def supply(self, packed: Mapping[str, bytes | None]) -> None:
        """Those that are away, as they are in the store; None if there is no such member."""
        for name, state in packed.items():
            self._passing[name] = None
            if state is not None:
                self._put(name, _decode(state))

    def settled(self) -> None:
        """The oldest batch finished and not yet settled is in the store."""
        settled = self._unsettled.popleft()
        for name in settled:
            member = self._awake.get(name)
            if member is not None and member.away() and not self._passes(name):
                self._drop(name, member)

    def _passes(self, name: str) -> bool:
        return any(name in batch for batch in (self._passing, *self._unsettled))

    def _put(self, name: str, member: Member) -> None:
        self._awake[name] = member
        known = self._in_groups.get(member.client_id, ())
        if name != member.client_id and name not in known:
            self._in_groups[member.client_id] = tuple(sorted((*known, name)))

    def _drop(self, name: str, member: Member) -> None:
        del self._awake[name]
        if name == member.client_id:
            return
        left = tuple(other for other in self._in_groups[member.client_id] if other != name)
        if left:
            self._in_groups[member.client_id] = left
        else:
            del self._in_groups[member.client_id]

    def _fall_asleep(self, name: str, member: Member, packed: bytes) -> None:
        """Of a member that is idle, keep only the bytes that the store has, or will have."""
        if member.idle() and len(self._awake) > AWAKE_MAX:
            del self._awake[name]
            self._asleep[name] = bytes(memoryview(packed))  # the encoder leaves room behind it

    def _hold(self, name: str, topic_filter: str) -> None:
        self._holders.add(topic_filter, name)
        group, separator, _ = name.partition("\0")
        if separator:
            self._groups.add(f"{group}/{topic_filter}", name)
        if has_wildcard(topic_filter):
            self._wildcards.add(topic_filter)
        self._changed(name, topic_filter)

    def _changed(self, name: str, topic_filter: str) -> None:
        """A member holds a filter, or no longer: what was looked up is brought up to date, or forgotten."""
        self.version += 1
        if has_wildcard(topic_filter):
            self._matching.clear()
            self._reaches.clear()
            return
        reaches = self._reaches.get(topic_filter)
        if reaches is not None:
            at = bisect_left(reaches, name, key=_name_of)
            if at < len(reaches) and reaches[at].name == name:
                del reaches[at]
            reaches[at:at] = self.reach(name, topic_filter)

    # -- asking

    def __contains__(self, name: str) -> bool:
        """Whether it is in memory."""
        return name in self._awake or name in self._asleep

    def __getitem__(self, name: str) -> Member:
        """A member that is in memory."""
        if name in self._asleep:
            packed = self._woken[name] = self._asleep.pop(name)
            self._awake[name] = _decode(packed)
        return self._awake[name]

    def get(self, name: str) -> Member | None:
        """A member, if it is in memory."""
        if name in self._asleep:
            return self[name]
        return self._awake.get(name)

    def awake(self) -> Mapping[str, Member]:
        """All that are not idle, and some that are."""
        return self._awake

    def room(self, name: str, max_inflight: int) -> int:
        """How many messages more a member that is in memory may be handed now."""
        member = self._awake.get(name)
        if member is None:
            return max_inflight
        return max(0, max_inflight - member.in_hand) if member.available() else 0

    def in_use(self, client_id: str) -> Iterator[tuple[str, Member]]:
        """A client's memberships that have something in hand, by name. Those that are asleep have nothing."""
        for name in (client_id, *self._in_groups.get(client_id, ())):
            member = self._awake.get(name)
            if member is not None and member.in_hand:
                yield name, member

    def has_copy(self, client_id: str, key: str, message_id: str) -> bool:
        """True if a client still has a copy of a lease that is over."""
        name = copy_name(key, message_id)
        return any(name in member.left for _, member in self.in_use(client_id))

    def of_client(self, client_id: str) -> list[tuple[str, Member]]:
        """A client's memberships that are in memory: its own, then those in groups, by name."""
        names = (client_id, *self._in_groups.get(client_id, ()))
        return [(name, self[name]) for name in names if name in self]

    def matching(self, topic: str) -> tuple[str, ...]:
        """The filters that match a topic: itself, and the wildcards that somebody holds."""
        if self._wildcards.empty():
            return (topic,)
        known = self._matching.get(topic)
        if known is None:
            if len(self._matching) >= TOPICS_REMEMBERED_MAX:
                self._matching.clear()
            known = self._matching[topic] = (topic, *self._wildcards.matching(topic))
        return known

    def holding(self, topic: str) -> Iterator[tuple[str, str, HeldFilter]]:
        """The filters that match a topic, and who holds each how."""
        for topic_filter in self.matching(topic):
            for name in self._holders.of(topic_filter):
                if not self.ignores(name, topic_filter, topic):
                    yield topic_filter, name, self[name].filters[topic_filter]

    def ignores(self, name: str, topic_filter: str, topic: str) -> bool:
        """True if a member gets nothing of a topic by this filter, though it matches."""
        wild = has_wildcard(topic_filter) and not is_of_group(name)
        return wild and self._ignores_wildcards(topic)

    def rules_changed(self) -> None:
        """Forget which members each topic has: another rule may serve its wildcards."""
        self._reaches.clear()
        self.version += 1

    def group(self, subscription: str) -> list[str]:
        """The members of a shared subscription, `$share/{group}/{filter}`, by name."""
        return sorted(self._groups.of(subscription))

    def reach(self, name: str, topic: str) -> list[Reach]:
        """One member as a topic sees it; none if it has no filter that matches."""
        member = self.get(name)
        if member is None:
            return []
        held = [
            member.filters[each]
            for each in self.matching(topic)
            if each in member.filters and not self.ignores(name, each, topic)
        ]
        return [make_reach(name, held)] if held else []

    def reaching(self, topic: str) -> list[Reach]:
        """The members of a topic, by name."""
        known = self._reaches.get(topic)
        if known is None:
            if len(self._reaches) >= TOPICS_REMEMBERED_MAX:
                self._reaches.clear()
            known = self._reaches[topic] = self._find(topic)
        return known

    def _find(self, topic: str) -> list[Reach]:
        found: dict[str, list[HeldFilter]] = {}
        for _, name, held in self.holding(topic):
            found.setdefault(name, []).append(held)
        return [make_reach(name, found[name]) for name in sorted(found)]

    def turns(self, reaches: Sequence[Reach], turn: str, max_inflight: int) -> Iterator[Reach]:
        """The members with room, from the one behind the member served last."""
        first = bisect_right(reaches, turn, key=_name_of)
        for at in range(first, first + len(reaches)):
            reach = reaches[at % len(reaches)]
            if self.room(reach.name, max_inflight):
                yield reach

    # -- changing; whatever is changed in place is touched

    def touch(self, name: str) -> None:
        """This member's state has changed."""
        self._touched[name] = self._passing[name] = None
        self._woken.pop(name, None)

    def add(self, name: str, member: Member) -> None:
        """A member that there was none of before."""
        self._put(name, member)
        self.touch(name)

    def hold(self, name: str, topic_filter: str, held: HeldFilter) -> None:
        """A member is to be served by a filter."""
        self[name].filters[topic_filter] = held
        self._hold(name, topic_filter)
        self.touch(name)

    def let_go(self, name: str, topic_filter: str) -> None:
        """A member is no longer to be served by a filter."""
        known = self[name].filters.pop(topic_filter, None)
        self.touch(name)
        if known is None:
            return
        group, separator, _ = name.partition("\0")
        if separator:
            self._groups.remove(f"{group}/{topic_filter}", name)
        if self._holders.remove(topic_filter, name):
            self._wildcards.discard(topic_filter)
        self._changed(name, topic_filter)

    def remove(self, name: str) -> None:
        """Forget a member that holds no filter."""
        self._drop(name, self[name])
        self.touch(name)

    def finish(self) -> Iterator[SetState]:
        """The end of a batch: one write for each member that changed."""
        touched, self._touched = self._touched, {}
        self._unsettled.append(self._passing)
        self._passing = {}
        for name in touched:
            assert not (name in self._asleep or name in self._woken), "who changes is in use"
            member = self._awake.get(name)
            if member is None:
                yield SetState(name, None, "members")
                continue
            packed = _encode(member)
            self._fall_asleep(name, member, packed)
            yield SetState(name, packed, "members")
        for name, packed in self._woken.items():
            del self._awake[name]
            self._asleep[name] = packed
        self._woken = {}


def _name_of(reach: Reach) -> str:
    return reach.name


def make_reach(name: str, held: list[HeldFilter]) -> Reach:
    """How a member takes part, by the filters that match."""
    broker_delivers = all(each.broker_delivers for each in held)
    newest = max(each.since for each in held) if broker_delivers else None
    return Reach(name, max(each.qos for each in held), newest)


def client_of(name: str) -> str:
    """The client that a member is, by the member's name."""
    return name.rpartition("\0")[2]


def copy_name(key: str, message_id: str) -> str:
    """What a copy of a message of a window is remembered by."""
    return f"{key}\0{message_id}"


def is_of_group(name: str) -> bool:
    """True if a member is one client of a shared subscription's group."""
    return "\0" in name


def member_name(client_id: str, topic_filter: str) -> tuple[str, str]:
    """The name of the member that a client's subscription makes, and the filter without `$share/{group}/`."""
    group, plain = split_share(topic_filter)
    return (client_id if group is None else f"$share/{group}\0{client_id}"), plain
