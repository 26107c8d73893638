"""The sessions agent's machine.

Rule 1: every transition of a client is in this file, in `state.py` (its session) or `connections.py` (its presence).
Rule 2: no IO, no clock, no chance.

ON a client's event: change its state; write its presence if that changed; announce the subscriptions that are to be
served from now on, or no longer, to the owners of delivery rules; look up what the database subscribes it to; run the
user's commands. ON node.started, .stopped: its connections are gone. ON node.sync.completed: what was last seen
before its `started` is gone. ON rules.changed: announce everything once more. Each of these three is a sweep over
many clients: it waits in a queue, and every tick does a bounded piece of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from millpond.agents.effects import (
    Effect,
    Output,
    Refusal,
    SendCommand,
    SetIndex,
    SetPresence,
    SetRules,
    SetState,
)
from millpond.agents.ports import LoadedState
from millpond.agents.reads import Read, ReadBelow, ReadStates
from millpond.agents.sessions.announcements import ClientChange, LeftReason, announcements
from millpond.agents.sessions.connections import LiveConnection
from millpond.agents.sessions.session_rules import SessionRules
from millpond.agents.sessions.state import ClientState, pack, unpack
from millpond.agents.topics.state_cache import StateCache
from millpond.schemas import events
from millpond.schemas.commands import Subscribe, Unsubscribe
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import AgentName, Event
from millpond.schemas.rules import Rules
from millpond.schemas.topics import filter_error

# One tick does no more of a sweep than this many clients: some ms of Redis. It begins with none once so many members
# were announced: one with a wildcard is a record in each partition.
SWEEP_CLIENTS_MAX: Final = 256
SWEEP_OUTPUTS_MAX: Final = 256
ANNOUNCED: Final = "announced"  # the index of clients with subscriptions, by `announced_by`


class Sweep(Struct, frozen=True, array_like=True):
    """Something to be done to all clients that an index has below an offset."""

    kind: Literal["restarted", "unseen", "announce"]
    node: str
    before: int
    at: int

    @property
    def index(self) -> str:
        """The index that has them."""
        return ANNOUNCED if self.kind == "announce" else seen_index(self.node)


class Sync(Struct, frozen=True, array_like=True):
    """A snapshot that has started and not completed."""

    sync_id: str
    offset: int


class PartitionState(Struct):
    """What travels in the fence: by node the snapshot under way; the sweeps in order; the offset of the rules."""

    syncs: dict[str, Sync]
    sweeps: list[Sweep]
    rules_offset: int


def seen_index(node: str) -> str:
    """The index of clients of a node, by the lowest offset at which something of theirs was last seen."""
    return f"node:{node}"


class SessionsMachine:
    """State and transitions of one partition."""

    agent: AgentName = "sessions"

    def __init__(self) -> None:
        """An empty partition without rules; `restore` follows."""
        self._clear(PartitionState({}, [], 0), Rules())

    def _clear(self, partition: PartitionState, rules: Rules) -> None:
        self._partition = partition
        self._clients: StateCache[ClientState] = StateCache(unpack)
        self._page: list[tuple[str, int]] | None = None  # supplied for a tick: clients to be swept
        self._rules = SessionRules(rules)

    # -- what the driver asks ---------------------------------------------------------------------------

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        blank = {"syncs": {}, "sweeps": [], "rules_offset": 0}
        self._clear(msgspec.convert({**blank, **partition_state}, PartitionState), rules)

    def partition_state(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.to_builtins(self._partition)
        return state

    @property
    def next_due_ms(self) -> int | None:
        """A sweep that waits is due at once."""
        return 0 if self._partition.sweeps else None

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        return self._rules.rules

    def owns(self, key: str) -> bool:
        """Every client."""
        return True

    def alone(self, event: Event) -> bool:
        """A tick reads an index, so everything before must be in it; new rules decide what is announced."""
        return isinstance(event, events.Tick | events.RulesChanged)

    def wanted(self, events_: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """The states of the clients; for a tick, those of the next sweep."""
        if len(events_) == 1 and isinstance(events_[0], events.Tick):
            names = self._wanted_by_sweep()
            if isinstance(names, ReadBelow):
                return [names]
        else:
            names = [name for name in map(client_of, events_) if name is not None]
        unknown = self._clients.unknown(names)
        return [ReadStates(unknown)] if unknown else []

    def _wanted_by_sweep(self) -> list[str] | ReadBelow:
        sweeps = self._partition.sweeps
        if not sweeps:
            return []
        if self._page is None:
            return ReadBelow(sweeps[0].index, sweeps[0].before, SWEEP_CLIENTS_MAX)
        return [client_id for client_id, _ in self._page]

    def supply(self, read: Read, answer: Any) -> None:
        if isinstance(read, ReadStates):
            self._clients.supply(answer)
        else:
            self._page = answer

    def step(self, offset: int, event: Event, now_ms: int, score: int) -> Sequence[Effect | Output]:
        """One event."""
        match event:
            case events.RulesChanged():
                return self._rules_changed(offset, event)
            case events.Tick():
                return self._tick(offset)
            case events.NodeStarted() | events.NodeStopped():
                self._sweep("restarted", event.node, offset, event.at)
            case events.NodeSyncStarted():
                self._partition.syncs[event.node] = Sync(event.sync_id, offset)
            case events.NodeSyncCompleted():
                sync = self._partition.syncs.get(event.node)
                if sync is not None and sync.sync_id == event.sync_id:
                    del self._partition.syncs[event.node]
                    self._sweep("unseen", event.node, sync.offset, event.at)
            case events.ControlSubscribe() | events.ControlUnsubscribe():
                return [controlled(offset, event)]
            case _:
                return self._client_event(offset, event, now_ms)
        return ()

    def finish(self) -> Sequence[Effect]:
        """One write for each client that the batch changed, however often."""
        effects: list[Effect] = []
        for offset, client_id, before, after in self._clients.finish():
            effects.append(SetState(client_id, pack(after)))
            effects += _index_changes(client_id, before, after)
            if self._rules.keeps_presence:
                effects += _presence_change(offset, client_id, before, after)
        return effects

    def settled(self) -> None:
        self._clients.settled()

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """A foreign key in the place of a presence: nothing was half written."""
        return ()

    # -- a client's events ------------------------------------------------------------------------------

    def _client_event(self, offset: int, event: Event, now_ms: int) -> Sequence[Effect | Output]:
        client_id = client_of(event)
        if client_id is None:
            return ()  # another agent's concern
        before = self._clients[client_id]
        after = before.copy()
        done: list[Effect | Output] = []
        reason: LeftReason = "disconnected"
        anew = False  # over a new connection: what failed over the old one may be tried again
        match event:
            case events.ClientConnected(node=node):
                live = LiveConnection(node, event.connected_at, offset)
                anew = after.connected(event.connection_id, live, told_again=event.told_again)
                if anew:
                    done += self._rules.hooked("client.connected", offset, event)
            case events.ClientDisconnected(node=node):
                if after.disconnected(event.connection_id, node, offset, event.at, event.reason):
                    done += self._rules.hooked("client.disconnected", offset, event)
            case events.SessionCreated(node=node):
                if after.created(node, offset, event.began_at):
                    done += self._rules.hooked("session.created", offset, event)
                reason = "session_ended"
            case events.SessionResumed(node=node):
                after.resumed(node, offset)
            case events.SessionSubscribed():
                done += self._subscribed(after, offset, event, now_ms)
            case events.SessionUnsubscribed():
                if after.unsubscribed(event.topic_filter):
                    done += self._rules.hooked("session.unsubscribed", offset, event)
                reason = "unsubscribed"
            case _:
                after.session_ended(event.node)
                reason = "session_ended"
        change = ClientChange(offset, event.at, client_id, reason)
        return [*self._change(change, after, again=anew), *done]

    def _subscribed(
        self, state: ClientState, offset: int, event: events.SessionSubscribed, now_ms: int
    ) -> Sequence[Effect | Output]:
        """A filter is held. What a snapshot tells once more is not the client's own SUBSCRIBE."""
        error = filter_error(event.topic_filter)
        if error is not None:
            raise DecodeError(error)
        if event.told_again and state.full(event.topic_filter):
            return ()
        if state.precedes(event.node, event.at):
            return ()  # it is told late: its session is over
        news = state.subscribed(event, offset, now_ms)
        if news or not event.told_again:
            return self._rules.hooked("session.subscribed", offset, event, news=news)
        return ()

    # -- announcing -------------------------------------------------------------------------------------

    def _change(self, change: ClientChange, after: ClientState, *, again: bool) -> Sequence[Output]:
        """Keep a new state, and tell the delivery agents of the members that came and went; `again` of all.

        Of a session that ends while its client is away they know that it is away: they hear that it has ended, too.
        """
        before, delivered = self._clients[change.client_id], self._rules.delivered
        was, now = after.announced, after.members(delivered)
        if not before.same_session(after):
            was = {**before.session_members(delivered), **was}
        again |= after.announced_by < self._partition.rules_offset
        after.announced, after.announced_by = now, self._partition.rules_offset
        self._clients.change(change.offset, change.client_id, after)
        if was == now and not again:
            return ()
        return announcements(change, was, now, again=again)

    def _rules_changed(self, offset: int, event: events.RulesChanged) -> Sequence[Effect]:
        self._rules = SessionRules(Rules.from_canonical(event.rules))
        self._partition.rules_offset = offset
        self._partition.sweeps.append(Sweep("announce", "", offset, event.at))
        return (SetRules(event.rules),)

    # -- sweeps -----------------------------------------------------------------------------------------

    def _sweep(self, kind: Literal["restarted", "unseen"], node: str, before: int, at: int) -> None:
        new = Sweep(kind, node, before, at)
        # A later snapshot tells all that an earlier one does.
        waiting = [
            each for each in self._partition.sweeps if (each.kind, each.node) != (kind, node)
        ]
        self._partition.sweeps = [*waiting, new]

    def _tick(self, offset: int) -> Sequence[Effect | Output]:
        """A piece of the first sweep. What it has done is no longer below its offset."""
        page, self._page = self._page, None
        if page is None:
            return ()
        sweep = self._partition.sweeps[0]
        done: list[Effect | Output] = []
        for client_id, _ in page:
            if len(done) >= SWEEP_OUTPUTS_MAX:
                return done  # the next tick goes on: what is done is no longer below the sweep's offset
            after = self._clients[client_id].copy()
            reason: LeftReason = "disconnected"
            if sweep.kind == "restarted":
                after.node_restarted(sweep.node, sweep.before, sweep.at)
            elif sweep.kind == "unseen":
                after.close_unseen(sweep.node, sweep.before, sweep.at)
                reason = _why(after)
            done += self._change(
                ClientChange(offset, sweep.at, client_id, reason), after, again=False
            )
        if len(page) < SWEEP_CLIENTS_MAX:
            del self._partition.sweeps[0]
        return done


def client_of(event: Event) -> str | None:
    """Whose state an event changes."""
    match event:
        case (
            events.ClientConnected()
            | events.ClientDisconnected()
            | events.SessionCreated()
            | events.SessionResumed()
            | events.SessionSubscribed()
            | events.SessionUnsubscribed()
            | events.SessionTerminated()
        ):
            return event.client_id
        case _:
            return None


def controlled(offset: int, event: events.ControlSubscribe | events.ControlUnsubscribe) -> Output:
    """An application's order, as a command to the broker."""
    error = filter_error(event.topic_filter)
    if error is not None:
        raise DecodeError(error)
    if isinstance(event, events.ControlSubscribe):
        filters = ((event.topic_filter, event.qos),)
        return SendCommand(offset, Subscribe(client_id=event.client_id, topic_filters=filters))
    names = (event.topic_filter,)
    return SendCommand(offset, Unsubscribe(client_id=event.client_id, topic_filters=names))


def _why(after: ClientState) -> LeftReason:
    """Why a snapshot ended a membership."""
    if after.session is None:
        return "session_ended"
    presence = after.connections.presence()
    return "unsubscribed" if presence is not None and presence.online else "disconnected"


def _index_changes(client_id: str, before: ClientState, after: ClientState) -> list[Effect]:
    """Where the client stands in the indexes that sweeps read."""
    effects: list[Effect] = []
    was, now = before.seen_on(), after.seen_on()
    effects += [
        SetIndex(seen_index(node), client_id, now.get(node))
        for node in {**was, **now}
        if was.get(node) != now.get(node)
    ]
    announced_before = before.announced_by if before.subscriptions else None
    announced = after.announced_by if after.subscriptions else None
    if announced != announced_before:
        effects.append(SetIndex(ANNOUNCED, client_id, announced))
    return effects


def _presence_change(
    offset: int, client_id: str, before: ClientState, after: ClientState
) -> list[Effect]:
    """What is to be shown: what changed, and what was told once more, so that a snapshot mends it."""
    was, now = before.connections.presence(), after.connections.presence()
    if now is None or (now == was and before.connections.live == after.connections.live):
        return []
    left = None if was is None or was.node == now.node else was.node
    shown = SetPresence(
        offset, client_id, now.online, now.online_at, now.offline_at, left, now.node
    )
    return [shown]
