"""What an event costs: it depends on the event, and not on how much lies ahead, is remembered, or was read before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from millpond.agents.delivery import machine
from millpond.agents.topics import state_cache
from millpond.schemas.events import AgentName
from tests.support.costs import Costs

AGENTS: Sequence[AgentName] = ("queue", "pubsub")
TOPIC = "t/a"


def read_and_acknowledge(world: Costs, first: int, count: int) -> Counter[str]:
    """Publish messages, one batch each, and acknowledge each at once. Return what all of that has cost."""
    world.take_costs()
    for number in range(first, first + count):
        world.publish(f"m{number:06d}", topic=TOPIC)
        ((client, name),) = world.hand_over()
        world.ack(client, name, topic=TOPIC)
    return world.take_costs()


@pytest.mark.parametrize("agent", AGENTS)
def test_an_event_costs_the_same_however_much_is_done_ahead_of_a_held_message(
    agent: AgentName,
) -> None:
    world = Costs(agent, max_inflight=4)
    world.join("a", TOPIC)
    world.publish("held", topic=TOPIC)
    assert world.hand_over() == [("a", "held")]
    near = read_and_acknowledge(world, 0, 20)
    read_and_acknowledge(world, 20, 600)
    far = read_and_acknowledge(world, 620, 20)
    assert far["bytes of states"] <= near["bytes of states"] * 1.1
    assert far["states read"] == near["states read"] == 0
    world.ack("a", "held", topic=TOPIC)
    read_offset = world.text(f"mqtt:acked:a:{TOPIC}")
    assert read_offset == (None if agent == "queue" else "m000639")


@pytest.mark.parametrize("agent", AGENTS)
def test_what_is_ahead_is_read_once_while_all_of_it_fits_into_memory(
    agent: AgentName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "READ_MIN", 8)
    monkeypatch.setattr(machine, "AHEAD_TOTAL_MAX", 40)
    world = Costs(agent, max_inflight=1)
    topics = ("t/0", "t/1", "t/2")
    messages = 40
    for topic in topics:
        world.publish(*(f"{topic} {number}" for number in range(messages)), topic=topic)
        world.join(topic, topic)
    world.restart()
    world.take_costs()
    world.take()
    for topic in topics:
        world.ack(topic, f"{topic} 0", topic=topic)
    for _ in range(messages - 1):
        for topic, name in world.hand_over():
            world.ack(topic, name, topic=topic)
    assert world.take_costs()["index entries read"] <= len(topics) * messages


@pytest.mark.parametrize("agent", AGENTS)
def test_beyond_the_limit_the_windows_used_the_longest_ago_are_read_again(
    agent: AgentName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "READ_MIN", 8)
    monkeypatch.setattr(machine, "AHEAD_TOTAL_MAX", 40)
    world = Costs(agent, max_inflight=1)
    topics = [f"t/{number}" for number in range(10)]
    for topic in topics:
        world.publish(*(f"{topic} {number}" for number in range(9)), topic=topic)
        world.join(topic, topic)
    found = world.driver.machine
    assert isinstance(found, machine.DeliveryMachine)
    ahead = [len(window.ahead) for group in found.reading_ahead() for window in group]
    assert 0 < sum(ahead) <= 40
    for topic, name in world.hand_over():
        world.ack(topic, name, topic=topic)
    assert len(world.hand_over()) == len(topics)


@pytest.mark.parametrize("agent", AGENTS)
def test_states_in_use_are_not_read_again_though_many_others_pass(
    agent: AgentName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_cache, "STATES_HELD_MAX", 10)
    world = Costs(agent)
    busy = [f"t/busy/{number}" for number in range(4)]
    for topic in busy:
        world.join("a", topic)
    for number in range(20):
        if number == 3:
            world.take_costs()
        for topic in busy:
            world.publish(f"{topic} {number}", topic=topic)
        world.publish(f"other {number}", topic=f"t/other/{number}")
    costs = world.take_costs()
    table = "windows" if agent == "queue" else "logs"
    assert costs[f"{table} {busy[0]}"] == 0
    assert costs["states read"] > 0
