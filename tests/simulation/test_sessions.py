"""The sessions agent under lost, repeated and late events, against a model of two broker nodes.

After one snapshot of each node, presence and subscriptions must equal the model. The announced members must be those that
are entitled: online clients with a filter that a delivery rule matches. Clients that have gone are forgotten after a while,
also while their events are still late, and in the end nothing is left of them.
"""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import pytest

from millpond.agents.sessions import machine as sessions
from millpond.agents.sessions.state import unpack
from millpond.agents.topics.due_times import CLIENT, due_member
from millpond.pipeline.stores.memory.server import Hash, Zset
from millpond.schemas import events, keys
from millpond.schemas.events import Event, SubscriberJoined
from millpond.schemas.topics import intersects, split_share
from tests.support import given
from tests.support.partition import run
from tests.unit.agents.sessions.test_machine import QUEUE, SESSIONS, Sessions, gone_after

NODES = ("n@1", "n@2")
CLIENTS = ("a", "b", "c", "d")
FILTERS = ("queue/1", "queue/+", "$share/g/queue/1", "other/#", "#")
STEPS = 60
LIFETIME_S = 20
PRESENCE = gone_after(LIFETIME_S)
PAUSES_MS = (1_000, LIFETIME_S * 1000 - 1, LIFETIME_S * 1000, 2 * LIFETIME_S * 1000)
SEEDS = 400


class Connected(NamedTuple):
    node: str
    connection_id: str
    connected_at: int


class Brokers:
    """The model: two nodes of one cluster. Each change returns the events of its bridge, in order for each connection.

    `clocks`: node → how far its clock is ahead, in ms.
    """

    def __init__(self, random: Random, world: Sessions) -> None:
        self.random, self.world = random, world
        self.connected: dict[str, Connected] = {}
        self.sessions: dict[str, tuple[str, dict[str, int]]] = {}  # node, filter → QoS
        self.clean: dict[str, bool] = {}
        self.peers = 0
        self.clocks = {node: random.randrange(0, 2_000, 500) for node in NODES}

    def step(self) -> list[list[Event]]:
        """Make a random change, and return its events: one list for each connection."""
        client_id = self.random.choice(CLIENTS)
        choices = [self.connect, self.connect, self.disconnect, self.subscribe, self.unsubscribe]
        return self.random.choice(choices)(client_id)

    def event(self, kind: Any, client_id: str, node: str, **fields: Any) -> Event:
        at = next(self.world.at) + self.clocks[node]
        event: Event = kind(at=at, node=node, client_id=client_id, **fields)
        return event

    def ended(self, client_id: str, reason: str) -> list[Event]:
        node, connection_id, _ = self.connected.pop(client_id)
        return [
            self.event(
                events.ClientDisconnected, client_id, node, connection_id=connection_id,
                reason=reason,
            )
        ]  # fmt: skip

    def connect(self, client_id: str) -> list[list[Event]]:
        clean, node = self.random.random() < 0.4, self.random.choice(NODES)
        before: list[Event] = []
        if client_id in self.connected:
            before += self.ended(client_id, "discarded" if clean else "takenover")
        session = self.sessions.get(client_id)
        resumes = session is not None and not clean and not self.clean[client_id]
        if session is not None and not resumes:
            before.append(self.event(events.SessionDiscarded, client_id, session[0]))
        self.sessions[client_id] = node, session[1] if session is not None and resumes else {}
        self.clean[client_id] = clean
        self.peers += 1
        kind = events.SessionResumed if resumes else events.SessionCreated
        after = [self.event(kind, client_id, node)]
        connected = self.connection(client_id, node)
        return [before, [*after, connected]] if before else [[*after, connected]]

    def connection(self, client_id: str, node: str) -> Event:
        at = next(self.world.at) + self.clocks[node]
        self.connected[client_id] = Connected(node, f"{node}/{self.peers}", at)
        return self.connected_event(client_id)

    def connected_event(self, client_id: str, **marks: bool) -> Event:
        node, connection_id, connected_at = self.connected[client_id]
        return self.event(
            events.ClientConnected, client_id, node, connection_id=connection_id,
            connected_at=connected_at, **marks,
        )  # fmt: skip

    def disconnect(self, client_id: str) -> list[list[Event]]:
        if client_id not in self.connected:
            return []
        ended = self.ended(client_id, "normal")
        if self.clean[client_id]:
            node, _ = self.sessions.pop(client_id)
            ended.append(self.event(events.SessionTerminated, client_id, node, reason="normal"))
        return [ended]

    def subscribe(self, client_id: str) -> list[list[Event]]:
        if client_id not in self.connected:
            return []
        topic_filter, qos = self.random.choice(FILTERS), self.random.randrange(3)
        node, filters = self.sessions[client_id]
        filters[topic_filter] = qos
        return [[self.subscribed_event(client_id, node, topic_filter, qos)]]

    def subscribed_event(
        self, client_id: str, node: str, topic_filter: str, qos: int, **marks: bool
    ) -> Event:
        return self.event(
            events.SessionSubscribed, client_id, node, topic_filter=topic_filter, qos=qos, **marks
        )

    def unsubscribe(self, client_id: str) -> list[list[Event]]:
        node, filters = self.sessions.get(client_id, ("", {}))
        if client_id not in self.connected or not filters:
            return []
        topic_filter = self.random.choice(sorted(filters))
        del filters[topic_filter]
        return [
            [self.event(events.SessionUnsubscribed, client_id, node, topic_filter=topic_filter)]
        ]

    def snapshot(self, node: str) -> list[Event]:
        found: list[Event] = []
        for client_id, connected in self.connected.items():
            if connected.node == node:
                found.append(self.connected_event(client_id, told_again=True))
        for client_id, (at, filters) in self.sessions.items():
            if at == node:
                for topic_filter, qos in filters.items():
                    subscribed = self.subscribed_event(
                        client_id, node, topic_filter, qos, told_again=True
                    )
                    found.append(subscribed)
        return found


def scrambled(random: Random, brokers: Brokers, world: Sessions) -> None:
    """Play a history. Some events are lost, repeated or late, and sometimes a new owner starts."""
    late: list[list[Event]] = []
    losing, doubling, delaying = (random.choice([0, 0.05, 0.3]) for _ in range(3))
    for _ in range(STEPS):
        for change in brokers.step():
            if random.random() < delaying:
                late.append(change)
                continue
            for event in change:
                if random.random() >= losing:
                    world.append(event, *([event] if random.random() < doubling else []))
        if late and random.random() < 0.5:
            world.append(*late.pop(random.randrange(len(late))))
        if random.random() < 0.1:
            world.settle()
        if random.random() < 0.1:
            world.now_ms += random.choice(PAUSES_MS)
        if random.random() < 0.05:
            run(world.driver.close())
            world.driver = world.started()
    for change in late:
        world.append(*change)
    world.settle()


def entitled(brokers: Brokers) -> dict[tuple[str, str], int]:
    return {
        (client_id, topic_filter): qos
        for client_id, (_, filters) in brokers.sessions.items()
        if client_id in brokers.connected
        for topic_filter, qos in filters.items()
        if intersects("queue/#", split_share(topic_filter)[1])
    }


def announced(world: Sessions) -> dict[tuple[str, str], int]:
    members: dict[tuple[str, str], int] = {}
    for partition, event in world.announced:
        if partition in (None, 0):
            name = event.client_id, event.topic_filter
            if isinstance(event, SubscriberJoined):
                members[name] = event.qos
            else:
                members.pop(name, None)
    return members


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_after_a_snapshot_of_each_node_the_state_equals_the_brokers(
    monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(sessions, "SWEEP_CLIENTS_MAX", 2)
    for seed in range(first, first + 50):
        judge(seed)


def judge(seed: int) -> None:
    random = Random(seed)
    world = Sessions(*PRESENCE, QUEUE)
    brokers = Brokers(random, world)
    scrambled(random, brokers, world)
    nodes = list(NODES)
    random.shuffle(nodes)
    for node in nodes:
        world.snapshot(*brokers.snapshot(node), node=node)
    where = f"seed {seed}"
    for client_id in CLIENTS:
        expected = "1" if client_id in brokers.connected else "0"
        assert world.state(client_id) in (expected, None if expected == "0" else "1"), where
    for node in NODES:
        there = {name for name, connected in brokers.connected.items() if connected.node == node}
        assert set(world.at_node(node)) == there, where
    check_registry(world, brokers, where)
    assert announced(world) == entitled(brokers), where
    check_indexes(world, where)
    world.pass_time(LIFETIME_S * 1000)
    for client_id in CLIENTS:
        if client_id not in brokers.sessions:
            assert world.remembered(client_id) == [], where


def check_registry(world: Sessions, brokers: Brokers, where: str) -> None:
    states = world.server.of(keys.table(SESSIONS, "states"), Hash)
    for client_id in CLIENTS:
        subscriptions = unpack(states.get(client_id)).subscriptions
        _, truth = brokers.sessions.get(client_id, ("", {}))
        assert {name: each.qos for name, each in subscriptions.items()} == truth, where


def check_indexes(world: Sessions, where: str) -> None:
    """Check the private indexes against the states."""
    states = world.server.of(keys.table(SESSIONS, "states"), Hash)
    for node in NODES:
        index = world.server.of(keys.index(SESSIONS, sessions.seen_index(node)), Zset)
        seen_at = {name: unpack(state).seen_on().get(node) for name, state in states.items()}
        assert dict(index) == {name: seen for name, seen in seen_at.items() if seen is not None}, (
            where
        )
    announced_by = world.server.of(keys.index(SESSIONS, sessions.ANNOUNCED), Zset)
    subscribed = {name for name, state in states.items() if unpack(state).subscriptions}
    assert set(announced_by) == subscribed, where
    due = world.server.of(keys.due(SESSIONS), Zset)
    forget_at = {due_member(CLIENT, name): unpack(each).forget_at for name, each in states.items()}
    assert dict(due) == {name: at for name, at in forget_at.items() if at is not None}, where
    known = {name: unpack(state) for name, state in states.items()}
    assert all(state.has_gone == (state.forget_at is not None) for state in known.values()), where


def test_a_replay_of_the_log_gives_the_same_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SWEEP_CLIENTS_MAX", 2)
    for seed in range(40):
        random = Random(seed)
        world = Sessions(
            *PRESENCE,
            QUEUE,
            given.a_rule(hook="client.connected", commands=["INCR seen:${clientid}"]),
        )
        brokers = Brokers(random, world)
        scrambled(random, brokers, world)
        live = {name: value for name, value in world.server.dump().items() if compared(name)}
        world.commit(world.driver)
        world.server.values.clear()
        run(world.driver.close())
        world.driver = world.started()
        world.settle()
        again = {name: value for name, value in world.server.dump().items() if compared(name)}
        assert again == live, seed


def compared(name: str) -> bool:
    """True for keys that are a function of the log. The fence and the journal depend on where batches end."""
    return not name.endswith((":applied", ":journal"))
