"""The sessions agent's machine: connections, sessions and subscriptions of every client, and who is a member.

Rule 1: every transition of a client is in this file, in `state.py` (its session) or `connections.py` (its presence).
Rule 2: no IO, no clock, no chance. docs/explanation/machines/sessions.md is the specification.

CONCEPTS

- Connection: named by node and peer address. Session: named by the offset of the event that created it.
- Member: a subscription that a delivery agent must serve now. Its client is online, the bridge can reach the client,
  and a delivery rule can match the filter.
- Snapshot: everything connected and subscribed at a node, between `node.sync.started` and `node.sync.completed`.
- Seen: the offset of the last event that showed a connection, session or subscription.
- Sweep: a change to all clients of a node, or to all clients with subscriptions. Ticks do it in pieces.
- Gone: a client that was here, and has no connection and no session any more. It is forgotten after a while.

INVARIANTS

1. A disconnect ends only the connection that it names, whenever it arrives.
2. A client is online while its newest connection is live, or while that is handed over and its successor is missing.
3. A session is on one node at a time: the node of the last event that showed it.
4. The announcements of an event are the difference between the members before and after it. `announced` is the former.
5. A client stands in the index of a node at the lowest `seen` of anything it has there. So a sweep that reads the index
   below an offset finds every client with something older. What it has done stands at or above the offset.
6. The due set has the clients that have gone, with their `forget_at`, if the rules gave them one. An event that shows the
   client again removes both. So a tick that finds a client due forgets it without a further look.

They couple in `_apply`: each change of a client ends there, it is the only place that announces, and `finish` derives
presence and indexes from the states before and after the batch. 5 is why a sweep needs no cursor: a new owner continues
it from the fence.

STATE

- In the fence (`PartitionState`): snapshots on their way, sweeps that wait, the offset of the last `rules.changed`.
- For each client, in the table `states`: a `ClientState`.
- Indexes: `node:{node}` as in invariant 5; `announced`, client with subscriptions → `announced_by`.
- The due set: clients to forget.
- In memory only, during a tick: the clients of the first sweep (`_page`), or the due things (`DueTimes.supplied`).

TRANSITIONS

ON client.connected:
1. Open the connection, and show the session.
2. If the connection is new: run the hook (user commands, look-ups), and announce all members once more. Why? A command
   that failed over the old connection may succeed over the new one.

ON client.disconnected: end the connection. If it was live, run the hook. The session stays until its own end arrives.

ON session.created: begin a session and end its predecessor, unless the event is late or a repeat.

ON session.resumed: show the session on this node.

ON session.terminated: end the session and its subscriptions, unless the session has moved to another node.

ON session.discarded, session.takenover: nothing. The session that follows has the same news, in its own order.

ON session.subscribed: store the subscription. Run the hook if it is new, or a SUBSCRIBE (not `told_again`).

ON session.unsubscribed: end the subscription. If the session held it, run the hook.

ON control.subscribe, control.unsubscribe: send the bridge a command.

ON node.started, node.stopped: queue a sweep `restarted`. It ends the node's connections. Sessions count as seen.

ON node.sync.started: note the snapshot.

ON node.sync.completed: if it is the noted snapshot, queue a sweep `unseen`, for everything last seen before its start.

ON rules.changed: use and store the rules, and queue a sweep `announce`.

ON tick: do a piece of the first sweep. A sweep does not run the hook of `client.disconnected`. Without a sweep, forget
the clients that are due: remove state and presence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from millpond.agents.effects import (
    Effect,
    ForgetPresence,
    Output,
    Refusal,
    SendCommand,
    SetDue,
    SetIndex,
    SetPresence,
    SetRules,
    SetState,
)
from millpond.agents.ports import LoadedState
from millpond.agents.reads import Read, ReadBelow, ReadDue, ReadStates
from millpond.agents.sessions.announcements import ClientChange, LeftReason, announcements
from millpond.agents.sessions.connections import LiveConnection
from millpond.agents.sessions.session_rules import SessionRules
from millpond.agents.sessions.state import ClientState, pack, unpack
from millpond.agents.topics.due_times import CLIENT, DueTimes, due_member, split_due
from millpond.agents.topics.state_cache import StateCache
from millpond.schemas import events
from millpond.schemas.commands import Subscribe, Unsubscribe
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import AgentName, Event
from millpond.schemas.rules import Rules
from millpond.schemas.topics import filter_error, standard_filter

# A tick sweeps at most this many clients: some ms of Redis. It stops before a client once so many outputs are decided:
# an announcement with a wildcard is a record in each partition.
SWEEP_CLIENTS_MAX: Final = 256
SWEEP_OUTPUTS_MAX: Final = 256
# Snapshots on their way at once. A node that ends within its snapshot leaves one behind, and a new container may be a new
# node. They are in the fence, which every transaction writes: 15 KiB.
SYNCS_MAX: Final = 256
ANNOUNCED: Final = "announced"  # the index of clients with subscriptions, by `announced_by`


class Sweep(Struct, frozen=True, array_like=True):
    """A change to all clients that `index` has below the offset `before`. `at` is the time of its event."""

    kind: Literal["restarted", "unseen", "announce"]
    node: str
    before: int
    at: int

    @property
    def index(self) -> str:
        """The index to read."""
        return ANNOUNCED if self.kind == "announce" else seen_index(self.node)


class Sync(Struct, frozen=True, array_like=True):
    """A snapshot on its way; `offset` is that of its `node.sync.started`."""

    sync_id: str
    offset: int


class PartitionState(Struct):
    """The machine's part of the fence: node → its snapshot on the way, sweeps in order, the offset of the rules."""

    syncs: dict[str, Sync]
    sweeps: list[Sweep]
    rules_offset: int


def seen_index(node: str) -> str:
    """Return the name of a node's index of clients (invariant 5)."""
    return f"node:{node}"


class SessionsMachine:
    """State and transitions of one partition."""

    agent: AgentName = "sessions"

    def __init__(self) -> None:
        """Call `restore` before anything else."""
        self._reset(PartitionState({}, [], 0), Rules())

    def _reset(self, partition: PartitionState, rules: Rules) -> None:
        self._partition = partition
        self._clients: StateCache[ClientState] = StateCache(unpack)
        self._page: list[tuple[str, int]] | None = None  # supplied for a tick
        self._due = DueTimes()
        self._rules = SessionRules(rules)

    # -- interface of the driver ------------------------------------------------------------------------

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        blank = {"syncs": {}, "sweeps": [], "rules_offset": 0}
        self._reset(msgspec.convert({**blank, **partition_state}, PartitionState), rules)
        self._due.restore(partition_state)

    def partition_state(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.to_builtins(self._partition)
        return {**state, **self._due.partition_state()}

    @property
    def next_due_ms(self) -> int | None:
        """0 while a sweep waits, so a tick follows at once. Else when a client is to be forgotten, or None."""
        return 0 if self._partition.sweeps else self._due.next_ms

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        return self._rules.rules

    def owns(self, key: str) -> bool:
        """True for every client: no other agent folds `mqtt.clients`."""
        return True

    def alone(self, event: Event) -> bool:
        """True for a tick, which reads an index that must have everything before, and for new rules."""
        return isinstance(event, events.Tick | events.RulesChanged)

    def wanted(self, events_: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """Return the reads for the events' clients; for a tick, for its page and the clients in that."""
        if len(events_) == 1 and isinstance(events_[0], events.Tick):
            names = self._wanted_by_tick(now_ms)
            if isinstance(names, ReadBelow | ReadDue):
                return [names]
        else:
            names = [name for name in map(client_of, events_) if name is not None]
        unknown = self._clients.unknown(names)
        return [ReadStates(unknown)] if unknown else []

    def _wanted_by_tick(self, now_ms: int) -> list[str] | ReadBelow | ReadDue:
        sweeps = self._partition.sweeps
        if sweeps and self._page is None:
            return ReadBelow(sweeps[0].index, sweeps[0].before, SWEEP_CLIENTS_MAX)
        if self._page is not None:
            return [client_id for client_id, _ in self._page]
        if self._due.supplied is None:
            return self._due.wanted() if self._is_due(now_ms) else []
        return [client_id for _, client_id, _ in self._due.overdue(now_ms)]

    def _is_due(self, now_ms: int) -> bool:
        return self._due.next_ms is not None and self._due.next_ms <= now_ms

    def supply(self, read: Read, answer: Any) -> None:
        match read:
            case ReadStates():
                self._clients.supply(answer)
            case ReadDue():
                self._due.supplied = answer
            case _:
                self._page = answer

    def step(self, offset: int, event: Event, now_ms: int, score: int) -> Sequence[Effect | Output]:
        """Fold one event.

        Raises:
            DecodeError: a filter is invalid or one too many, or new rules cannot be read.
        """
        match event:
            case events.RulesChanged():
                return self._rules_changed(offset, event)
            case events.Tick():
                return self._tick(offset, now_ms)
            case events.NodeStarted() | events.NodeStopped():
                self._queue_sweep("restarted", event.node, offset, event.at)
            case events.NodeSyncStarted():
                self._sync_started(event, offset)
            case events.NodeSyncCompleted():
                sync = self._partition.syncs.get(event.node)
                if sync is not None and sync.sync_id == event.sync_id:
                    del self._partition.syncs[event.node]
                    self._queue_sweep("unseen", event.node, sync.offset, event.at)
            case events.ControlSubscribe() | events.ControlUnsubscribe():
                return [control_command(offset, event)]
            case _:
                return self._client_event(offset, event, now_ms)
        return ()

    def finish(self) -> Sequence[Effect]:
        """End a batch: write state, indexes and presence of each client that it changed, once."""
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
        """Return nothing: this agent's effects are independent, so none is half written without another."""
        return ()

    # -- events of a client -----------------------------------------------------------------------------

    def _client_event(self, offset: int, event: Event, now_ms: int) -> Sequence[Effect | Output]:
        client_id = client_of(event)
        if client_id is None:
            return ()
        before = self._clients[client_id]
        after = before.copy()
        done: list[Effect | Output] = []
        reason: LeftReason = "disconnected"
        reconnected = False
        match event:
            case events.ClientConnected(node=node):
                live = LiveConnection(node, event.connected_at, offset)
                reconnected = after.connected(
                    event.connection_id, live, told_again=event.told_again
                )
                if reconnected:
                    done += self._rules.run_hook("client.connected", offset, event)
            case events.ClientDisconnected(node=node):
                if after.disconnected(event.connection_id, node, offset, event.at, event.reason):
                    done += self._rules.run_hook("client.disconnected", offset, event)
            case events.SessionCreated(node=node):
                if after.created(node, offset, event.began_at):
                    done += self._rules.run_hook("session.created", offset, event)
                reason = "session_ended"
            case events.SessionResumed(node=node):
                after.resumed(node, offset)
            case events.SessionSubscribed():
                done += self._subscribed(after, offset, event, now_ms)
            case events.SessionUnsubscribed():
                if after.unsubscribed(event.topic_filter):
                    done += self._rules.run_hook("session.unsubscribed", offset, event)
                reason = "unsubscribed"
            case _:
                after.session_ended(event.node)
                reason = "session_ended"
        change = ClientChange(offset, event.at, client_id, reason)
        return [*self._apply(change, after, now_ms, announce_all=reconnected), *done]

    def _subscribed(
        self, state: ClientState, offset: int, event: events.SessionSubscribed, now_ms: int
    ) -> Sequence[Effect | Output]:
        """Store a subscription, and run the hook. An event of a snapshot is not the client's own SUBSCRIBE."""
        error = filter_error(event.topic_filter)
        if error is not None:
            raise DecodeError(error)
        if event.told_again and state.is_full_for(event.topic_filter):
            # The client's own SUBSCRIBE has become a dead letter. A snapshot must not make one each time.
            return ()
        if state.is_before_session(event.node, event.at):
            # The event is late: its session has ended.
            return ()
        is_new = state.subscribed(event, offset, now_ms)
        if is_new or not event.told_again:
            return self._rules.run_hook("session.subscribed", offset, event, is_new=is_new)
        return ()

    # -- announce ---------------------------------------------------------------------------------------

    def _apply(
        self, change: ClientChange, after: ClientState, now_ms: int, *, announce_all: bool
    ) -> Sequence[Effect | Output]:
        """Replace a client's state, and announce its members. `announce_all` announces unchanged ones, too."""
        before, can_be_delivered = self._clients[change.client_id], self._rules.can_be_delivered
        members_before, members = after.announced, after.members(can_be_delivered)
        if not before.same_session(after):
            # The delivery agents know that an offline client's members left, but not that its session has ended.
            members_before = {**before.session_members(can_be_delivered), **members_before}
        # The first change after new rules announces all, whether or not the sweep has reached the client.
        announce_all |= after.announced_by < self._partition.rules_offset
        after.announced, after.announced_by = members, self._partition.rules_offset
        if after.is_blank:
            after = ClientState()
        due = self._set_lifetime(change.client_id, before, after, now_ms)
        self._clients.change(change.offset, change.client_id, after)
        if members_before == members and not announce_all:
            return due
        return [*due, *announcements(change, members_before, members, announce_all=announce_all)]

    def _set_lifetime(
        self, client_id: str, before: ClientState, after: ClientState, now_ms: int
    ) -> Sequence[Effect]:
        """Decide when a client is forgotten that has gone with this event, or that it is not, if it is here again."""
        lifetime = self._rules.client_lifetime_ms
        if not after.has_gone:
            after.forget_at = None
        elif before.forget_at is None and lifetime is not None:
            after.forget_at = now_ms + lifetime
        if after.forget_at == before.forget_at:
            return ()
        member = due_member(CLIENT, client_id)
        if after.forget_at is None:
            return [SetDue(member, None)]
        return [self._due.falls_due(member, after.forget_at)]

    def _rules_changed(self, offset: int, event: events.RulesChanged) -> Sequence[Effect]:
        self._rules = SessionRules(Rules.from_canonical(event.rules))
        self._partition.rules_offset = offset
        self._queue_sweep("announce", "", offset, event.at)
        return (SetRules(event.rules),)

    # -- sweeps -----------------------------------------------------------------------------------------

    def _queue_sweep(
        self, kind: Literal["restarted", "unseen", "announce"], node: str, before: int, at: int
    ) -> None:
        new = Sweep(kind, node, before, at)
        # A later sweep of the same kind covers everything that an earlier one would have changed.
        waiting = [
            each for each in self._partition.sweeps if (each.kind, each.node) != (kind, node)
        ]
        self._partition.sweeps = [*waiting, new]

    def _sync_started(self, event: events.NodeSyncStarted, offset: int) -> None:
        """Note a snapshot. Those of nodes that never completed theirs go first."""
        syncs = self._partition.syncs
        syncs.pop(event.node, None)  # it is the newest now
        syncs[event.node] = Sync(event.sync_id, offset)
        if len(syncs) > SYNCS_MAX:
            del syncs[next(iter(syncs))]

    def _tick(self, offset: int, now_ms: int) -> Sequence[Effect | Output]:
        """Do a piece of the first sweep. Without a sweep, forget clients."""
        page, self._page = self._page, None
        if page is None:
            return self._forget(offset, now_ms)
        sweep = self._partition.sweeps[0]
        done: list[Effect | Output] = []
        for client_id, _ in page:
            if len(done) >= SWEEP_OUTPUTS_MAX:
                # The next tick continues: swept clients are no longer below the sweep's offset.
                return done
            after = self._clients[client_id].copy()
            reason: LeftReason = "disconnected"
            if sweep.kind == "restarted":
                after.node_restarted(sweep.node, sweep.before, sweep.at)
            elif sweep.kind == "unseen":
                after.close_unseen(sweep.node, sweep.before, sweep.at)
                reason = _left_reason(after)
            change = ClientChange(offset, sweep.at, client_id, reason)
            done += self._apply(change, after, now_ms, announce_all=False)
        # A page that was not full was the last one.
        if len(page) < SWEEP_CLIENTS_MAX:
            del self._partition.sweeps[0]
        return done

    def _forget(self, offset: int, now_ms: int) -> Sequence[Effect]:
        """Forget the clients whose time is over, at most `due_times.SWEEP_DUE_MAX`."""
        if self._due.supplied is None:
            return ()  # nothing is due yet
        effects = []
        for member in self._due.take(now_ms):
            effects.append(SetDue(member, None))
            client_id = split_due(member)[1]
            assert self._clients[client_id].has_gone, "a client that is here again is not due"
            self._clients.change(offset, client_id, ClientState())
        return effects


def client_of(event: Event) -> str | None:
    """Return the client whose state an event changes, or None."""
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


def control_command(
    offset: int, event: events.ControlSubscribe | events.ControlUnsubscribe
) -> Output:
    """Return the command to the bridge for an application's request on the control channel.

    Raises:
        DecodeError: the filter is invalid.
    """
    error = filter_error(event.topic_filter)
    if error is not None:
        raise DecodeError(error)
    topic_filter = standard_filter(event.topic_filter)
    if isinstance(event, events.ControlSubscribe):
        filters = ((topic_filter, event.qos),)
        return SendCommand(offset, Subscribe(client_id=event.client_id, topic_filters=filters))
    names = (topic_filter,)
    return SendCommand(offset, Unsubscribe(client_id=event.client_id, topic_filters=names))


def _left_reason(after: ClientState) -> LeftReason:
    """Return why members left by a snapshot, from the state after it."""
    if after.session is None:
        return "session_ended"
    presence = after.connections.presence()
    return "unsubscribed" if presence is not None and presence.online else "disconnected"


def _index_changes(client_id: str, before: ClientState, after: ClientState) -> list[Effect]:
    """Return the changes of the client's scores in the indexes that sweeps read."""
    effects: list[Effect] = []
    seen_before, seen_after = before.seen_on(), after.seen_on()
    effects += [
        SetIndex(seen_index(node), client_id, seen_after.get(node))
        for node in {**seen_before, **seen_after}
        if seen_before.get(node) != seen_after.get(node)
    ]
    announced_before = before.announced_by if before.subscriptions else None
    announced = after.announced_by if after.subscriptions else None
    if announced != announced_before:
        effects.append(SetIndex(ANNOUNCED, client_id, announced))
    return effects


def _presence_change(
    offset: int, client_id: str, before: ClientState, after: ClientState
) -> list[Effect]:
    """Return the presence to write: if it changed, or if an event showed a live connection again.

    The second is why a snapshot repairs a presence that Redis has wrong.
    """
    was, now = before.connections.presence(), after.connections.presence()
    if now is None:
        return [] if was is None else [ForgetPresence(offset, client_id)]
    if now == was and before.connections.live == after.connections.live:
        return []
    left_node = None if was is None or was.node == now.node else was.node
    return [
        SetPresence(
            offset, client_id, now.online, now.online_at, now.offline_at, left_node, now.node
        )
    ]
