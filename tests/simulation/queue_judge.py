"""Invariants of a queue partition's content that hold after every fault."""

from __future__ import annotations

from collections import Counter

import msgspec

from millpond.agents.delivery import leasing
from millpond.agents.delivery.dead_messages import unpack as unpack_dead
from millpond.agents.delivery.leasing import WAITING, WORK, Counters
from millpond.agents.delivery.members import Members
from millpond.agents.delivery.window import Waiting
from millpond.agents.queue.state import QueueWindow, unpack
from millpond.agents.topics.plans import TopicPlans
from millpond.agents.topics.storage import unpack as unpack_retained
from millpond.pipeline.stores.memory.server import Hash, MemoryServer, Zset
from millpond.schemas import keys
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from tests.support.delivery import Delivering

QUEUE = Partition("millpond", "queue", 0)
INDEX, RETAINED = keys.message_index(""), keys.retained("")


class State:
    """The content of a store, unpacked."""

    def __init__(self, server: MemoryServer, machine_state: dict[str, object]) -> None:
        self.server = server
        self.windows: dict[str, QueueWindow] = {
            key: unpack(packed) for key, packed in self.table("windows").items()
        }
        self.members = Members()
        self.members.supply(self.table("members"))
        self.dead = {name: unpack_dead(packed) for name, packed in self.table("dead").items()}
        self.retained = {
            topic: unpack_retained(packed) for topic, packed in self.table("states").items()
        }
        self.counters = msgspec.convert(machine_state.get("delivery", {}), Counters)
        self.waiting = self.zset(keys.index(QUEUE, WAITING))
        self.work = self.zset(keys.index(QUEUE, WORK))
        self.due = self.zset(keys.due(QUEUE))

    def table(self, name: str) -> Hash:
        return self.server.of(keys.table(QUEUE, name), Hash)

    def zset(self, name: str) -> Zset:
        return self.server.of(name, Zset)

    def index(self, topic: str) -> list[str]:
        return [name for name, _ in self.zset(keys.message_index(topic)).ordered()]


def check(world: Delivering) -> State:
    """Check all invariants that hold after every batch, and return the state."""
    applied = world.applied
    assert applied is not None
    state = State(world.server, applied.machine)
    check_windows(state)
    check_leases(state)
    check_counters(state)
    check_bodies(state)
    return state


def check_windows(state: State) -> None:
    """Check each window against its index: every stored message is leased, returned or above the cursor, and only one."""
    topics = {
        name.removeprefix(INDEX)
        for name, value in state.server.values.items()
        if name.startswith(INDEX) and isinstance(value, Zset)
    }
    for topic in sorted(topics | state.windows.keys()):
        window, stored = state.windows.get(topic, QueueWindow()), state.index(topic)
        assert window.length == len(stored), f"{topic} counts {window.length} of {stored}"
        leased = [name for name, lease in window.leases.items() if lease.stored]
        returned = [each.message_id for each in window.returned]
        assert window.returned == sorted(window.returned)
        assert window.stored_leases == len(leased)
        assert not set(leased) & set(returned) and len(returned) == len(set(returned))
        assert {*leased, *returned} <= set(stored), f"{topic}: {leased}, {returned} not in {stored}"
        scores = state.zset(keys.message_index(topic))
        ahead = [name for name in stored if scores[name] > window.cursor]
        assert {*leased, *returned, *ahead} == set(stored), f"{topic} lost of {stored}: {window}"
        assert len(leased) + len(returned) + len(ahead) == len(stored), f"{topic}: twice {window}"
        assert window.waits == (window.ready > 0)


def check_leases(state: State) -> None:
    """Check that each lease of a window is also in its member, and no other."""
    in_windows = {
        (lease.member, lease.number): topic
        for topic, window in state.windows.items()
        for lease in window.leases.values()
    }
    in_members = {
        (name, number): topic
        for name, member in state.members.awake().items()
        for number, topic in member.leases.items()
    }
    assert in_windows == in_members


def check_counters(state: State) -> None:
    """Check the counters of the partition against its content."""
    leases = [lease for window in state.windows.values() for lease in window.leases.values()]
    counters = state.counters
    assert counters.unconfirmed == sum(not lease.sent for lease in leases)
    assert state.waiting.keys() == {topic for topic, each in state.windows.items() if each.waits}
    assert counters.waiting == len(state.waiting)
    assert counters.work == len(state.work)
    assert counters.lease >= max((lease.number for lease in leases), default=0)
    active = {name for name, member in state.members.awake().items() if member.round.active}
    assert state.work.keys() - {leasing.RESUME} == active


def check_bodies(state: State) -> None:
    """Check that every id has its body, and every body a reference."""
    referenced = {*state.dead}
    for name, value in state.server.values.items():
        if name.startswith((INDEX, RETAINED)) and isinstance(value, Zset):
            referenced |= value.keys()
    bodies = {
        name.removeprefix(INDEX)
        for name, value in state.server.values.items()
        if name.startswith(INDEX) and isinstance(value, Hash)
    }
    assert bodies == referenced, f"{bodies} are stored, {referenced} have references"
    for topic, retained in state.retained.items():
        assert retained is not None
        assert list(state.zset(keys.retained(topic))) == [retained.message_id]
        # `indexed`: the queue or a dead letter needs the body, too.
        shared = retained.message_id in state.index(topic) or retained.message_id in state.dead
        assert retained.indexed == shared, f"{topic}: {retained}"


def check_bounds(state: State, rules: Rules) -> None:
    """Check that no member has more leases than `max_inflight`."""
    largest = max((rule.max_inflight for rule in rules.run_by_delivery("queue")), default=0)
    for name, member in state.members.awake().items():
        assert len(member.leases) <= largest, f"{name}: {member.leases}"
        plans = TopicPlans(rules)
        deliveries = {topic: plans.of(topic).delivery for topic in member.leases.values()}
        counted = Counter(member.leases.values())
        for topic, delivery in deliveries.items():
            assert delivery is None or counted[topic] <= delivery.max_inflight


def check_nothing_idle(state: State, rules: Rules, now_ms: int) -> None:
    """Check, with no tick due, that nothing is overdue, and that no available member has room for a waiting message."""
    assert all(at > now_ms for at in state.due.values()), f"overdue at {now_ms}: {state.due}"
    assert not state.work
    if state.counters.paused:
        return
    plans = TopicPlans(rules)
    for topic in state.waiting:
        delivery, window = plans.of(topic).delivery, state.windows[topic]
        if delivery is None:
            continue
        reaches = state.members.reaching(topic)
        scores = state.zset(keys.message_index(topic))
        ready = [entry for entry in scores.ordered() if entry[0] not in window.leases]
        name, score = ready[0]
        waiting = window.returned_as(name) or Waiting(score, name)
        idle = state.members.in_turn(reaches, window.turn, waiting, delivery.max_inflight)
        assert idle is None, f"{waiting.message_id} of {topic} waits for {idle}"
