"""The connections of one client, and the presence that follows from them.

A client has one connection at a time. But its events may arrive late, twice, from two nodes, or never. So events open
and end only the connection that they name by its id, and the newest connection decides about presence:

- The client is online while its newest connection is live.
- It is also online while that connection ended by `takenover` or `discarded`, and its successor has not appeared yet.

Methods are named for the events that they fold.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msgspec import Struct, field

# Connections remembered for a client. A disconnect is rarely so late that more of them came and went before it.
LIVE_MAX: Final = 4
ENDED_IDS_MAX: Final = 8
# Reasons of a disconnect that hand the client over to a newer connection.
HANDED_OVER: Final = frozenset({"takenover", "discarded"})


class Presence(NamedTuple):
    """The public state of a client. Times are in ms. `node` is None while the client is offline or being taken over."""

    online: bool
    online_at: int
    offline_at: int | None
    node: str | None


class LiveConnection(Struct, frozen=True, array_like=True):
    """A connection that is up. `connected_at` is in ms; `seen` is the offset of the last event that showed it."""

    node: str
    connected_at: int
    seen: int


class EndedConnection(Struct, frozen=True, array_like=True):
    """The newest connection that ended, at `at` in ms. `handed_over` is true if a newer connection must follow."""

    node: str
    connected_at: int
    at: int
    handed_over: bool
    seen: int


class Connections(Struct, array_like=True):
    """The connections of one client. Mutable; a step works on a copy.

    `live` and `ended_ids` are by connection id; `ended_ids` has the time of the end in ms, and `handed_over`.
    `last` is the newest connection that ended, `offline_at` when the client last went offline.
    """

    live: dict[str, LiveConnection] = field(default_factory=dict)
    ended_ids: dict[str, tuple[int, bool]] = field(default_factory=dict)
    last: EndedConnection | None = None
    offline_at: int | None = None

    def copy(self) -> Connections:
        """Return an independent copy."""
        return Connections(dict(self.live), dict(self.ended_ids), self.last, self.offline_at)

    def opened(self, connection_id: str, live: LiveConnection) -> bool:
        """Fold a connection that is up. True if it is new: neither known, nor ended already."""
        known = self.live.get(connection_id)
        end = self.ended_ids.get(connection_id)
        if end is not None and live.connected_at <= end[0]:
            # The end overtook the connect, or the connect is a repeat.
            self._note_end(live, *end, was_live=False)
            return False
        self.live[connection_id] = live
        if len(self.live) > LIVE_MAX:
            oldest = min(self.live, key=lambda each: self.live[each].seen)
            del self.live[oldest]
        return known is None or known.connected_at != live.connected_at

    def ended(self, connection_id: str, at: int, reason: str) -> bool:
        """Fold the end of a connection. True if it was live until now."""
        live = self.live.get(connection_id)
        if live is not None and live.connected_at > at:
            # The id is node and peer address: this is the late end of an earlier connection from the same address.
            return False
        self._end(connection_id, at, handed_over=reason in HANDED_OVER)
        return live is not None

    def _end(self, connection_id: str, at: int, *, handed_over: bool) -> None:
        live = self.live.pop(connection_id, None)
        # Removed first, so that the dict's order is the order of the ends.
        self.ended_ids.pop(connection_id, None)
        self.ended_ids[connection_id] = at, handed_over
        if len(self.ended_ids) > ENDED_IDS_MAX:
            del self.ended_ids[next(iter(self.ended_ids))]
        if live is not None:
            self._note_end(live, at, handed_over, was_live=True)

    def _note_end(
        self, live: LiveConnection, at: int, handed_over: bool, *, was_live: bool
    ) -> None:
        """Make a connection the last one that ended, unless a newer one ended before.

        A connection that was live until now is the successor of a handed-over one, even if its node's clock is behind.
        """
        last = self.last
        awaited = was_live and last is not None and last.handed_over
        if last is None or awaited or live.connected_at >= last.connected_at:
            self.last = EndedConnection(live.node, live.connected_at, at, handed_over, live.seen)
            if not handed_over:
                self.offline_at = at

    def close_unseen(self, node: str, before: int, at: int) -> bool:
        """End the connections last seen on a node before an offset. True if there were any."""
        unseen = [
            connection_id
            for connection_id, live in self.live.items()
            if live.node == node and live.seen < before
        ]
        for connection_id in unseen:
            # The offsets have decided: `at` and `connected_at` may come from two clocks.
            ended_at = max(at, self.live[connection_id].connected_at)
            self._end(connection_id, ended_at, handed_over=False)
        last = self.last
        if last is not None and last.handed_over and last.node == node and last.seen < before:
            # The handed-over connection still waits for its successor, which never came.
            self.last = EndedConnection(
                node, last.connected_at, at, handed_over=False, seen=last.seen
            )
            self.offline_at = at
            return True
        return bool(unseen)

    def presence(self) -> Presence | None:
        """Return the presence by the newest connection, or None if there never was one."""
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
        """Return node → the lowest offset at which one of its open connections was last seen.

        A handed-over connection counts as open: a snapshot must be able to end the wait for its successor.
        """
        open_connections: list[LiveConnection | EndedConnection] = list(self.live.values())
        if self.last is not None and self.last.handed_over:
            open_connections.append(self.last)
        seen: dict[str, int] = {}
        for each in open_connections:
            seen[each.node] = min(each.seen, seen.get(each.node, each.seen))
        return seen
