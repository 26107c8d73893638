"""The part of a topic's stored messages that is being handed out: who has what, what came back, what comes next.

A window never holds the backlog. Behind its `cursor` everything has been handed out before: it is leased, has come back,
or is done with. Ahead of it lies the topic's index in the store, of which a piece is in memory (`ahead`, up to `read_to`);
that piece is no state: it may be dropped and read again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import merge
from typing import Final

import msgspec
from msgspec import Struct

# Entries of the index in memory, for one topic: more are read when they are needed.
AHEAD_MAX: Final = 1_024

HOLDERS_MAX: Final = 16  # of one message, whose late acks are welcome; the latest ones

# Who had a copy of a message, and the id that the broker gave the copy.
Holder = tuple[str, str | None]


class Waiting(Struct, frozen=True, array_like=True, order=True):
    """A message that is to be handed out, after `deliveries` that nobody acknowledged."""

    score: int
    message_id: str
    deliveries: int = 0
    holders: tuple[Holder, ...] = ()


class Lease(Struct, array_like=True):
    """A message in a member's hands until `until` (ms); 0 is no deadline.

    `sent` once the bridge has handed it over. `stored` until it has expired or was superseded meanwhile: then it is the
    holder's alone. `silent` once its holder, which is connected, has acknowledged nothing for `ack_timeout_s`: another
    member may take it over.
    """

    number: int
    member: str
    leased_at: int
    until: int
    score: int
    deliveries: int
    holders: tuple[Holder, ...]
    sent: bool = False
    stored: bool = True
    silent: bool = False

    @property
    def alias(self) -> str | None:
        """The id that the broker gave the holder's copy."""
        return self.holders[-1][1]


class Window(Struct, array_like=True, dict=True):
    """See above. `turn` is the member that was served last; `due` (ms) is when the due set has the window."""

    cursor: int = 0
    returned: list[Waiting] = msgspec.field(default_factory=list)
    leases: dict[str, Lease] = msgspec.field(default_factory=dict)  # by message id
    turn: str = ""
    due: int | None = None
    waits: bool = False  # whether something is to be handed out that nobody took

    def __post_init__(self) -> None:
        """Nothing is read yet."""
        self.ahead: OrderedDict[str, int]
        self.read_to: int
        self.aliases: dict[str, str]
        self.stored_leases = sum(lease.stored for lease in self.leases.values())
        # The places of silent leases of stored messages, in log order.
        self.silent: list[tuple[int, str]] = sorted(
            (lease.score, message_id)
            for message_id, lease in self.leases.items()
            if lease.silent and lease.stored
        )
        self.forget_ahead()
        self.aliases = {
            alias: message_id
            for message_id, holders in self._holders()
            for _, alias in holders
            if alias is not None
        }

    def _holders(self) -> list[tuple[str, tuple[Holder, ...]]]:
        return [
            *((each.message_id, each.holders) for each in self.returned),
            *((message_id, lease.holders) for message_id, lease in self.leases.items()),
        ]

    # -- ahead

    def forget_ahead(self) -> None:
        """What is ahead is to be read again."""
        self.ahead = OrderedDict()  # message id → score
        self.read_to = self.cursor

    def supply(self, entries: list[tuple[str, int]], limit: int, last: int) -> None:
        """What the index holds behind `read_to`; less than was asked for is all there is. What is behind `last` is of a
        publish that has yet to be folded, or will be again: on a Redis Cluster it is stored before its fence.
        """
        self.ahead.update(entry for entry in entries if entry[1] <= last)
        self.read_to = min(entries[-1][1], last) if len(entries) >= limit else last

    def trim(self) -> None:
        """Of what is ahead, remember only what is handed out next."""
        if len(self.ahead) > AHEAD_MAX:
            kept = list(self.ahead.items())[:AHEAD_MAX]
            self.ahead, self.read_to = OrderedDict(kept), kept[-1][1]

    def append(self, message_id: str, score: int) -> None:
        """A new message, which is stored: all before it is known."""
        self.ahead[message_id] = score
        self.read_to = score

    # -- handing out

    def next(self) -> Waiting | None:
        """The first message that no member has, in log order, as far as is known."""
        if self.returned:
            return self.returned[0]
        for message_id, score in self.ahead.items():
            return Waiting(score, message_id)
        return None

    def candidates(self) -> Iterator[Waiting]:
        """The messages that some member may get next, in log order: silent leases, returned messages, and the first one
        ahead. Every member may get that one.
        """
        if self.silent or self.returned:
            silent = [self.leased_as(message_id) for _, message_id in self.silent]
            yield from merge(silent, list(self.returned))
        for message_id, score in self.ahead.items():
            yield Waiting(score, message_id)
            return

    def leased_as(self, message_id: str) -> Waiting:
        """A leased message, as it would wait."""
        lease = self.leases[message_id]
        return Waiting(lease.score, message_id, lease.deliveries, lease.holders)

    def take(self, waiting: Waiting) -> None:
        """A message that no member has is handed out, or done with."""
        at = bisect_left(self.returned, waiting)
        if at < len(self.returned) and self.returned[at] is waiting:
            del self.returned[at]
        else:
            self.ahead.popitem(last=False)
            self.cursor = waiting.score
            self.read_to = max(self.read_to, self.cursor)

    def lease(self, message_id: str, lease: Lease) -> None:
        """A stored message that was taken is in a member's hands."""
        self.leases[message_id] = lease
        self.stored_leases += 1

    def end(self, message_id: str) -> Lease | None:
        """A lease ends, if there is one; its message is nowhere in the window then."""
        lease = self.leases.pop(message_id, None)
        if lease is not None:
            self.stored_leases -= lease.stored
            self._offered_no_more(message_id, lease)
        return lease

    def fall_silent(self, message_id: str, until: int) -> None:
        """A lease is offered to other members; until this time, or (0) as long as its holder is connected."""
        lease = self.leases[message_id]
        self._offered_no_more(message_id, lease)
        lease.silent, lease.until = True, until
        if lease.stored:
            insort(self.silent, (lease.score, message_id))

    def set_deadline(self, message_id: str, until: int) -> None:
        """A lease has this deadline, and is its holder's until then."""
        lease = self.leases[message_id]
        self._offered_no_more(message_id, lease)
        lease.silent, lease.until = False, until

    def is_behind(self, message_id: str) -> bool:
        """True if the holder of a leased message has another stored one that is older."""
        lease = self.leases[message_id]
        return any(
            other.member == lease.member and other.score < lease.score and other.stored
            for other in self.leases.values()
        )

    def forget_holders(self, holders: Iterable[Holder]) -> None:
        """No copy of a message is known by the id that the broker gave it any more."""
        for _, alias in holders:
            self.aliases.pop(alias or "", None)

    def _offered_no_more(self, message_id: str, lease: Lease) -> None:
        at = bisect_left(self.silent, (lease.score, message_id))
        if self.silent[at : at + 1] == [(lease.score, message_id)]:
            del self.silent[at]

    def with_holder(
        self, holders: tuple[Holder, ...], client_id: str, alias: str | None
    ) -> tuple[Holder, ...]:
        """The holders of a message with one more, or with the id that the latest one's copy got."""
        others = [each for each in holders if each not in ((client_id, None), (client_id, alias))]
        after = (*others[1 - HOLDERS_MAX :], (client_id, alias))
        known = {name for _, name in after}
        for _, name in holders:
            if name is not None and name not in known:
                self.aliases.pop(name, None)
        return after

    def unstore(self, message_id: str) -> None:
        """A stored message goes; if it is leased, it is its holder's alone from now on."""
        lease = self.leases.get(message_id)
        if lease is not None:
            self._offered_no_more(message_id, lease)
            lease.stored = False
            self.stored_leases -= 1
        else:
            self.remove(message_id)

    def give_back(self, message_id: str) -> None:
        """A lease of a stored message ends, and the message waits again, where it was in the log."""
        waiting = self.leased_as(message_id)
        self.end(message_id)
        self.take_back(waiting)

    def take_back(self, waiting: Waiting) -> None:
        """A message waits again, where it was in the log."""
        insort(self.returned, waiting)

    # -- asking

    def known_as(self, message_id: str) -> str:
        """The message's own id, by any id that one of its copies has had."""
        return self.aliases.get(message_id, message_id)

    def returned_as(self, message_id: str) -> Waiting | None:
        """A message that has come back."""
        return next((each for each in self.returned if each.message_id == message_id), None)

    def oldest(self) -> Waiting | None:
        """The oldest stored message, as far as is known."""
        leased = [self.leased_as(each) for each, lease in self.leases.items() if lease.stored]
        waiting = self.next()
        return min(leased if waiting is None else [*leased, waiting], default=None)

    def remove(self, message_id: str) -> None:
        """A message is done with, wherever it is."""
        lease = self.end(message_id)
        waiting = None if lease is not None else self.returned_as(message_id)
        if waiting is not None:
            self.returned.remove(waiting)
        self.ahead.pop(message_id, None)
        self.forget_holders(
            lease.holders if lease is not None else waiting.holders if waiting else ()
        )

    def next_deadline(self) -> int | None:
        """When the first lease is to be looked at by a tick."""
        return min((lease.until for lease in self.leases.values() if lease.until), default=None)


def holds(holders: Iterable[Holder], client_id: str) -> bool:
    """Whether a client has had a copy."""
    return any(holder == client_id for holder, _ in holders)
