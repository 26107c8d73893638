"""The state of one client: its connections, its session, its subscriptions.

`seen` is the offset of the last event that showed a connection, session or subscription. A snapshot of a node ends what
was last seen before it started. Methods are named for the events that they fold.
"""

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
    """A topic filter that a session holds.

    `since` is the offset of the SUBSCRIBE, `at` the log's time there. `seen` is the offset of the last event that
    showed it, `seen_at` that event's own time. `proxied` is true if the bridge subscribed the client by a command.
    `SessionSubscribed` explains `broker_delivers` and `reachable`.
    """

    qos: int
    since: int
    seen: int
    proxied: bool
    broker_delivers: bool = False
    at: int = 0
    reachable: bool = True
    seen_at: int = 0


class Session(Struct, frozen=True, array_like=True):
    """An MQTT session.

    `id` is the offset of the event that created it. `node` and `seen` are node and offset of the last event that showed
    it. `resumed` is the offset of its last resumption, or 0. `began_at` is its start by the node's clock in ms, or 0
    where events arrive in order.
    """

    id: int
    node: str
    seen: int
    resumed: int = 0
    began_at: int = 0


class ServedSubscription(Struct, frozen=True, array_like=True):
    """A member, as it is announced: a subscription that a delivery agent must serve now."""

    session: int
    qos: int
    broker_delivers: bool = False
    subscribed_at: int = 0


class ClientState(Struct, array_like=True):
    """The state of one client. Mutable; a step works on a copy.

    `subscriptions` and `announced` are by topic filter. `announced` has the members that the delivery agents know.
    `announced_by` is the offset of the `rules.changed` that decided about them, or 0. `forget_at` is when the client is
    forgotten, in ms of the log's time, or None.
    """

    connections: Connections = field(default_factory=Connections)
    session: Session | None = None
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    announced: dict[str, ServedSubscription] = field(default_factory=dict)
    announced_by: int = 0
    forget_at: int | None = None

    def copy(self) -> ClientState:
        """Return an independent copy. `announced` is shared: it is replaced, never changed."""
        return ClientState(
            self.connections.copy(),
            self.session,
            dict(self.subscriptions),
            self.announced,
            self.announced_by,
            self.forget_at,
        )

    # -- connections

    def connected(self, connection_id: str, live: LiveConnection, *, told_again: bool) -> bool:
        """Fold a connection that is up, which shows the session, too. True if the connection is new.

        `told_again` is true for a snapshot's event. Its `connected_at` may come from another clock: a known connection
        keeps its own.
        """
        known = self.connections.live.get(connection_id)
        if told_again and known is not None:
            live = structs.replace(live, connected_at=known.connected_at)
        is_new = self.connections.opened(connection_id, live)
        if connection_id in self.connections.live:
            self._show_session(live.seen, live.node, moves=not told_again)
        return is_new

    def disconnected(self, connection_id: str, node: str, seen: int, at: int, reason: str) -> bool:
        """Fold the end of a connection. True if it was live. The session stays until its own end arrives."""
        if self.session is not None and self.session.node == node:
            self._show_session(seen, node)
        return self.connections.ended(connection_id, at, reason)

    # -- the end

    @property
    def is_blank(self) -> bool:
        """True if no connection and no session is known."""
        return self.session is None and self.connections == Connections()

    @property
    def has_gone(self) -> bool:
        """True if the client was here, and has no connection and no session any more."""
        presence = self.connections.presence()
        online = presence is not None and presence.online
        no_more = self.session is None and not self.connections.live and not online
        return no_more and not self.is_blank

    # -- the session

    def _show_session(self, seen: int, node: str, *, moves: bool = True) -> None:
        """Note that the event at offset `seen` showed the session on this node. Create a session if none is known.

        A session that moves here takes its subscriptions along, so they count as seen. A snapshot of this node that
        started before does not list them. `moves` is false for a snapshot's own events: it lists subscriptions itself.
        """
        known = self.session
        if known is None:
            self.session = Session(seen, node, seen)
        else:
            self.session = structs.replace(known, node=node, seen=max(known.seen, seen))
            if known.node != node and moves:
                self._subscriptions_seen(seen)

    def created(self, node: str, seen: int, began_at: int | None = None) -> bool:
        """Fold the start of a session. True if it is new: then its predecessor ends, with its subscriptions.

        Bridges give `began_at` where events can arrive late or twice. If the session known on this node began later or
        at the same time, the event is late or a repeat, and only shows the session. If it began earlier, the
        subscriptions made since `began_at` belong to the new session, and stay.
        """
        known = self.session
        if began_at is None or known is None or known.node != node:
            self.session, self.subscriptions = Session(seen, node, seen, 0, began_at or 0), {}
            return True
        if known.began_at >= began_at:
            self._show_session(seen, node)
            return False
        self.session = Session(seen, node, seen, 0, began_at)
        self.subscriptions = {
            topic_filter: subscription
            for topic_filter, subscription in self.subscriptions.items()
            if subscription.seen_at >= began_at
        }
        return True

    def is_before_session(self, node: str, at: int) -> bool:
        """True if an event of this node at time `at` belongs to an earlier session than the known one."""
        return self.session is not None and self.session.node == node and at < self.session.began_at

    def resumed(self, node: str, seen: int) -> None:
        """Fold a client's return to its session."""
        self._show_session(seen, node)
        assert self.session is not None, "_show_session creates one"
        self.session = structs.replace(self.session, resumed=seen)

    def session_ended(self, node: str) -> None:
        """Fold the end of the session on this node. A session that has moved to another node continues."""
        if self.session is not None and self.session.node == node:
            self.session, self.subscriptions = None, {}

    def is_full_for(self, topic_filter: str) -> bool:
        """True if one more filter would exceed the limit."""
        return topic_filter not in self.subscriptions and (
            len(self.subscriptions) >= SUBSCRIPTIONS_MAX
        )

    def subscribed(self, event: SessionSubscribed, seen: int, now_ms: int) -> bool:
        """Store a subscription, or update it. True if it is new, or has another QoS.

        Raises:
            DecodeError: the session holds the maximum of subscriptions.
        """
        topic_filter = event.topic_filter
        known = self.subscriptions.get(topic_filter)
        if self.is_full_for(topic_filter):
            raise DecodeError(f"the session holds {SUBSCRIPTIONS_MAX} subscriptions already")
        self._show_session(seen, event.node, moves=not event.told_again)
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
        """Remove a subscription. True if the session held it."""
        return self.subscriptions.pop(topic_filter, None) is not None

    # -- snapshots

    def node_restarted(self, node: str, seen: int, at: int) -> None:
        """End the connections of a node that restarted. The session counts as seen: the next snapshot decides."""
        self.connections.close_unseen(node, seen, at)
        if self.session is not None and self.session.node == node:
            self._show_session(seen, node)
            self._subscriptions_seen(seen)

    def _subscriptions_seen(self, seen: int) -> None:
        for topic_filter, subscription in self.subscriptions.items():
            self.subscriptions[topic_filter] = structs.replace(
                subscription, seen=max(subscription.seen, seen)
            )

    def close_unseen(self, node: str, before: int, at: int) -> None:
        """End connections, session and subscriptions that a snapshot of a node, begun at `before`, did not show."""
        self.connections.close_unseen(node, before, at)
        session = self.session
        if session is None or session.node != node:
            return
        if session.seen < before:
            self.session, self.subscriptions = None, {}
            return
        self.subscriptions = {
            topic_filter: subscription
            for topic_filter, subscription in self.subscriptions.items()
            if subscription.seen >= before
        }

    def seen_on(self) -> dict[str, int]:
        """Return node → the lowest offset at which anything of this client on it was last seen."""
        seen = self.connections.seen_on()
        if self.session is not None:
            offsets = [subscription.seen for subscription in self.subscriptions.values()]
            node = self.session.node
            seen[node] = min(*offsets, self.session.seen, seen.get(node, self.session.seen))
        return seen

    # -- members

    def members(self, can_be_delivered: Callable[[str], bool]) -> dict[str, ServedSubscription]:
        """Return the members of a client: `session_members` while it is online, else none."""
        presence = self.connections.presence() if self.subscriptions else None
        if presence is None or not presence.online:
            return {}
        return self.session_members(can_be_delivered)

    def session_members(
        self, can_be_delivered: Callable[[str], bool]
    ) -> dict[str, ServedSubscription]:
        """Return the subscriptions that a delivery rule can match, and whose client the bridge can reach."""
        session = self.session
        if session is None:
            return {}
        return {
            topic_filter: ServedSubscription(
                session.id, subscription.qos, subscription.broker_delivers, subscription.at
            )
            for topic_filter, subscription in self.subscriptions.items()
            if subscription.reachable and can_be_delivered(topic_filter)
        }

    def same_session(self, other: ClientState) -> bool:
        """True if both states have a session, and it is the same."""
        return (
            self.session is not None
            and other.session is not None
            and (self.session.id == other.session.id)
        )


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(ClientState).decode


def pack(state: ClientState) -> bytes | None:
    """Encode a client's state for the store. None: nothing is known of the client."""
    return None if state == ClientState() else _encode(state)


def unpack(packed: bytes | None) -> ClientState:
    """Decode a client's stored state; None gives an empty one."""
    return ClientState() if packed is None else _decode(packed)
