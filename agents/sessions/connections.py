"""The connections of one client, each told from every other by its identity, and what they say of its presence.

A client has one connection at a time, but its events may come late, twice, from two nodes or not at all. So each
connection is opened and ended by its own id, and the newest one decides: the client is online while that is live,
or while it ended by `takenover` or `discarded` and its successor has not been heard of yet.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msgspec import Struct, field

# A client reconnects often, but rarely more often than this between two events of an earlier connection.
LIVE_MAX: Final = 4
ENDED_IDS_MAX: Final = 8
# The reasons of a disconnect that hands the client over to a newer connection.
HANDED_OVER: Final = frozenset({"takenover", "discarded"})


class Presence(NamedTuple):
    """What others see of a client. Times are ms; `node` is where it is connected, if that is known."""

    online: bool
    online_at: int
    offline_at: int | None
    node: str | None


class LiveConnection(Struct, frozen=True, array_like=True):
    """A connection that is up. `seen` is the offset of the last event that showed it."""

    node: str
    connected_at: int
    seen: int


class EndedConnection(Struct, frozen=True, array_like=True):
    """The newest connection that ended, and when (ms), and whether a newer one was to follow it."""

    node: str
    connected_at: int
    at: int
    handed_over: bool
    seen: int


class Connections(Struct, array_like=True):
    """One client's. Mutable; a step works on a copy."""

    live: dict[str, LiveConnection] = field(default_factory=dict)
    ended_ids: dict[str, tuple[int, bool]] = field(default_factory=dict)  # when, handed over
    last: EndedConnection | None = None
    offline_at: int | None = None

    def copy(self) -> Connections:
        """One that may be changed without changing this one."""
        return Connections(dict(self.live), dict(self.ended_ids), self.last, self.offline_at)

    def opened(self, connection_id: str, live: LiveConnection) -> bool:
        """A connection is up, or told of again; whether this is news, and it has not ended since."""
        known = self.live.get(connection_id)
        end = self.ended_ids.get(connection_id)
        if end is not None and live.connected_at <= end[0]:
            self._end(live, *end, sure=False)  # its end overtook it, or it is told of once more
            return False
        self.live[connection_id] = live
        if len(self.live) > LIVE_MAX:
            oldest = min(self.live, key=lambda each: self.live[each].seen)
            del self.live[oldest]
        return known is None or known.connected_at != live.connected_at

    def ended(self, connection_id: str, at: int, reason: str) -> bool:
        """A connection ended; whether it was up until now."""
        live, handed_over = self.live.get(connection_id), reason in HANDED_OVER
        if live is not None and live.connected_at > at:
            return False  # an earlier one from the same address
        self.live.pop(connection_id, None)
        self.ended_ids.pop(connection_id, None)
        self.ended_ids[connection_id] = at, handed_over
        if len(self.ended_ids) > ENDED_IDS_MAX:
            del self.ended_ids[next(iter(self.ended_ids))]
        if live is not None:
            self._end(live, at, handed_over, sure=True)
        return live is not None

    def _end(self, live: LiveConnection, at: int, handed_over: bool, *, sure: bool) -> None:
        """`sure`: it was up until now, so that what was handed over before was handed over to it."""
        last = self.last
        awaited = sure and last is not None and last.handed_over
        if last is None or awaited or live.connected_at >= last.connected_at:
            self.last = EndedConnection(live.node, live.connected_at, at, handed_over, live.seen)
            if not handed_over:
                self.offline_at = at

    def close_unseen(self, node: str, before: int, at: int) -> bool:
        """End what was last seen on a node before an offset; whether anything was."""
        unseen = [
            connection_id
            for connection_id, live in self.live.items()
            if live.node == node and live.seen < before
        ]
        for connection_id in unseen:
            self.ended(connection_id, at, "unseen")
        last = self.last
        if last is not None and last.handed_over and last.node == node and last.seen < before:
            # The successor that was to follow never came.
            self.last = EndedConnection(
                node, last.connected_at, at, handed_over=False, seen=last.seen
            )
            self.offline_at = at
            return True
        return bool(unseen)

    def presence(self) -> Presence | None:
        """What the newest connection says; None if there never was one."""
        live = max(
            self.live.values(), key=lambda each: (each.connected_at, each.seen), default=None
        )
        last = self.last
        if live is not None and (
            last is None or last.handed_over or live.connected_at >= last.connected_at
        ):
            return Presence(True, live.connected_at, self.offline_at, live.node)
        if last is None:
            return None
        return Presence(last.handed_over, last.connected_at, self.offline_at, None)

    def seen_on(self) -> dict[str, int]:
        """Per node, the lowest offset at which something that is held open was last seen there."""
        held: list[LiveConnection | EndedConnection] = list(self.live.values())
        if self.last is not None and self.last.handed_over:
            held.append(self.last)
        seen: dict[str, int] = {}
        for each in held:
            seen[each.node] = min(each.seen, seen.get(each.node, each.seen))
        return seen
