"""Invariants of a queue partition's content that hold after every fault."""

from __future__ import annotations

from collections import Counter

import msgspec

from millpond.agents.delivery import leasing
from millpond.agents.delivery.dead_messages import unpack as unpack_dead
from millpond.agents.delivery.leasing import WAITING, WORK, Counters
from millpond.agents.delivery.members import Members, Reach, client_of
from millpond.agents.delivery.window import Waiting
from millpond.agents.queue.state import QueueWindow, unpack
from millpond.agents.topics.plans import DeliveryPlan, TopicPlans
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
        silent = [x for x, lease in window.leases.items() if lease.silent and lease.stored]
        assert [name for _, name in window.silent] == sorted(silent, key=lambda x: scores[x])
        assert window.waits == (window.ready > 0 or bool(silent))


def check_leases(state: State) -> None:
    """Check that each lease of a window is also in its member, and no other. Only connected members are silent."""
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
    for topic, window in state.windows.items():
        for lease in window.leases.values():
            assert lease.until or lease.silent
            member = state.members[lease.member]
            assert not lease.silent or (lease.sent and member.filters), f"{topic}: {lease}"
    for name, member in state.members.awake().items():
        numbers = [*member.leases, *(copy.number for copy in member.left.values())]
        assert len(numbers) == len(set(numbers))
        assert not member.left or member.filters, f"{name} is gone, and has {member.left}"
        assert list(member.left) == [copy.name for copy in member.left.values()]


def check_counters(state: State) -> None:
    """Check the counters of the partition against its content."""
    leases = [lease for window in state.windows.values() for lease in window.leases.values()]
    counters = state.counters
    assert counters.unconfirmed == sum(not lease.sent for lease in leases)
    assert state.waiting.keys() == {topic for topic, each in state.windows.items() if each.waits}
    assert counters.waiting == len(state.waiting)
    assert counters.work == len(state.work)
    held = [dead for dead in state.dead.values() if dead is not None and dead.holders]
    assert counters.retractable == len(held)
    aliases = {x: dead.message_id for dead in held for _, x, _ in dead.holders if x is not None}
    assert {x: name.decode() for x, name in state.table("aliases").items()} == aliases
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
    largest = max((rule.max_inflight for rule in rules.delivery_rules_of("queue")), default=0)
    for name, member in state.members.awake().items():
        assert member.in_hand <= largest, f"{name}: {member.leases} {member.left}"
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
        delivery = plans.of(topic).delivery
        if delivery is None:
            continue
        reaches = state.members.reaching(topic)
        for reach in state.members.turns(reaches, "", delivery.max_inflight):
            idle = takeable(state, topic, reach, delivery, now_ms)
            assert idle is None, f"{idle} of {topic} waits for {reach}"


def takeable(
    state: State, topic: str, reach: Reach, delivery: DeliveryPlan, now_ms: int
) -> str | None:
    """The first message that a member with room could get: none that its client has over its connection, and of another's
    only silent ones.
    """
    window, client_id = state.windows[topic], client_of(reach.name)
    for name, score in state.zset(keys.message_index(topic)).ordered():
        if not reach.wants(Waiting(score, name)):
            return None
        if state.members.has_copy(client_id, topic, name):
            continue
        lease = window.leases.get(name)
        if lease is None:
            return name
        alive = state.members[lease.member].alive_until(delivery.ack_timeout_ms) > now_ms
        mine, spent = (
            client_of(lease.member) == client_id,
            lease.deliveries >= delivery.max_deliveries,
        )
        if lease.silent and not (alive or mine or spent):
            return name
    return None
