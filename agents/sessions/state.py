"""What the sessions agent knows of one client: its connections, its session, its subscriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct, field, structs

from millpond.agents.sessions.connections import Connections, LiveConnection
from millpond.schemas.commands import SUBSCRIPTIONS_MAX
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import SessionSubscribed


class Subscription(Struct, frozen=True, array_like=True):
    """A filter that a session holds: since which offset, and at which one it was last shown; `at` is the log's time of
    the former. `told_at` is the time of the event that told it last.
    """

    qos: int
    since: int
    seen: int
    proxied: bool
    broker_delivers: bool = False
    at: int = 0
    reachable: bool = True
    told_at: int = 0


class Session(Struct, frozen=True, array_like=True):
    """A session, named by the offset of what created it, on the node that it was last seen on.

    `resumed` is the offset of its last resumption, or 0; `began_at` is in the node's time, or 0 where events are told
    in order.
    """

    id: int
    node: str
    seen: int
    resumed: int = 0
    began_at: int = 0


class ServedSubscription(Struct, frozen=True, array_like=True):
    """A subscription that a delivery agent is to serve."""

    session: int
    qos: int
    broker_delivers: bool = False
    subscribed_at: int = 0


class ClientState(Struct, array_like=True):
    """One client's. Mutable; a step works on a copy.

    `announced` are the members that the delivery agents were told of, `announced_by` the offset of the `rules.changed`
    by which that was decided.
    """

    connections: Connections = field(default_factory=Connections)
    session: Session | None = None
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    announced: dict[str, ServedSubscription] = field(default_factory=dict)
    announced_by: int = 0

    def copy(self) -> ClientState:
        """One that may be changed without changing this one."""
        return ClientState(
            self.connections.copy(),
            self.session,
            dict(self.subscriptions),
            self.announced,
            self.announced_by,
        )

    # -- connections

    def connected(self, connection_id: str, live: LiveConnection, *, told_again: bool) -> bool:
        """A connection is up; whether that is news. It shows that there is a session.

        What tells of it again may have another clock: of a connection that is known its time is, too.
        """
        known = self.connections.live.get(connection_id)
        if told_again and known is not None:
            live = structs.replace(live, connected_at=known.connected_at)
        news = self.connections.opened(connection_id, live)
        if connection_id in self.connections.live:
            self._show(live.seen, live.node, moves=not told_again)
        return news

    def disconnected(self, connection_id: str, node: str, seen: int, at: int, reason: str) -> bool:
        """A connection ended; whether it was up. The session stays until its own end is told."""
        if self.session is not None and self.session.node == node:
            self._show(seen, node)
        return self.connections.ended(connection_id, at, reason)

    # -- the session

    def _show(self, seen: int, node: str, *, moves: bool = True) -> None:
        """The session is on this node now. One that `moves` there brings its subscriptions along: a snapshot of the
        node that began before does not know them. What is told in a snapshot is told whole.
        """
        known = self.session
        if known is None:
            self.session = Session(seen, node, seen)
        else:
            self.session = structs.replace(known, node=node, seen=max(known.seen, seen))
            if known.node != node and moves:
                self._subscriptions_seen(seen)

    def created(self, node: str, seen: int, began_at: int | None = None) -> bool:
        """A session began, and whatever went before it is over; whether that is news.

        With `began_at` it may be told late: after what was subscribed in it, after a newer one, or once more.
        """
        known = self.session
        if began_at is None or known is None or known.node != node:
            self.session, self.subscriptions = Session(seen, node, seen, 0, began_at or 0), {}
            return True
        if known.began_at >= began_at:
            self._show(seen, node)
            return False
        self.session = Session(seen, node, seen, 0, began_at)
        self.subscriptions = {
            topic_filter: held
            for topic_filter, held in self.subscriptions.items()
            if held.told_at >= began_at
        }
        return True

    def precedes(self, node: str, at: int) -> bool:
        """Whether what happened then on this node belongs to a session before this one."""
        return self.session is not None and self.session.node == node and at < self.session.began_at

    def resumed(self, node: str, seen: int) -> None:
        """The client came back to its session."""
        self._show(seen, node)
        assert self.session is not None, "it has just been shown"
        self.session = structs.replace(self.session, resumed=seen)

    def session_ended(self, node: str) -> None:
        """The session on this node is over; one that has moved on to another node is not."""
        if self.session is not None and self.session.node == node:
            self.session, self.subscriptions = None, {}

    def full(self, topic_filter: str) -> bool:
        """Whether there is no room for this filter."""
        return topic_filter not in self.subscriptions and (
            len(self.subscriptions) >= SUBSCRIPTIONS_MAX
        )

    def subscribed(self, event: SessionSubscribed, seen: int, now_ms: int) -> bool:
        """A filter is held, or told of again; whether that is news.

        Raises:
            DecodeError: the session holds too many.
        """
        topic_filter = event.topic_filter
        known = self.subscriptions.get(topic_filter)
        if self.full(topic_filter):
            raise DecodeError(f"the session holds {SUBSCRIPTIONS_MAX} subscriptions already")
        self._show(seen, event.node, moves=not event.told_again)
        self.subscriptions[topic_filter] = Subscription(
            event.qos,
            seen if known is None else known.since,
            seen,
            event.proxied or (known is not None and known.proxied),
            event.broker_delivers,
            now_ms if known is None else known.at,
            event.reachable,
            event.at,
        )
        return known is None or known.qos != event.qos

    def unsubscribed(self, topic_filter: str) -> bool:
        """A filter was given up; whether it was held."""
        return self.subscriptions.pop(topic_filter, None) is not None

    # -- snapshots

    def node_restarted(self, node: str, seen: int, at: int) -> None:
        """All connections of a node are gone. Its sessions may live: the snapshot that follows tells."""
        self.connections.close_unseen(node, seen, at)
        if self.session is not None and self.session.node == node:
            self._show(seen, node)
            self._subscriptions_seen(seen)

    def _subscriptions_seen(self, seen: int) -> None:
        for topic_filter, held in self.subscriptions.items():
            self.subscriptions[topic_filter] = structs.replace(held, seen=max(held.seen, seen))

    def close_unseen(self, node: str, before: int, at: int) -> None:
        """A snapshot of a node that began at offset `before` did not show it: it is no more."""
        self.connections.close_unseen(node, before, at)
        session = self.session
        if session is None or session.node != node:
            return
        if session.seen < before:
            self.session, self.subscriptions = None, {}
            return
        self.subscriptions = {
            topic_filter: held
            for topic_filter, held in self.subscriptions.items()
            if held.seen >= before
        }

    def seen_on(self) -> dict[str, int]:
        """Per node, the lowest offset at which anything that is held there was last seen."""
        seen = self.connections.seen_on()
        if self.session is not None:
            offsets = [held.seen for held in self.subscriptions.values()]
            node = self.session.node
            seen[node] = min(*offsets, self.session.seen, seen.get(node, self.session.seen))
        return seen

    # -- what follows from it

    def members(self, delivered: Callable[[str], bool]) -> dict[str, ServedSubscription]:
        """The subscriptions to be served now: of a client that is online, where a delivery rule can match."""
        presence = self.connections.presence() if self.subscriptions else None
        if presence is None or not presence.online:
            return {}
        return self.session_members(delivered)

    def session_members(self, delivered: Callable[[str], bool]) -> dict[str, ServedSubscription]:
        """The subscriptions of the session that a delivery rule can match, and the bridge can serve."""
        session = self.session
        if session is None:
            return {}
        return {
            topic_filter: ServedSubscription(session.id, held.qos, held.broker_delivers, held.at)
            for topic_filter, held in self.subscriptions.items()
            if held.reachable and delivered(topic_filter)
        }

    def same_session(self, other: ClientState) -> bool:
        """Whether the session is the one that the other state has."""
        return (
            self.session is not None
            and other.session is not None
            and (self.session.id == other.session.id)
        )


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(ClientState).decode


def pack(state: ClientState) -> bytes:
    """The state as it is stored."""
    return _encode(state)


def unpack(packed: bytes | None) -> ClientState:
    """The state as it was stored; of a client never heard of, an empty one."""
    return ClientState() if packed is None else _decode(packed)
