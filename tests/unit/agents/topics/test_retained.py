"""What a broker retains, told by a bridge that had to ask: the retained entry follows, and nothing else changes."""

from __future__ import annotations

import pytest

from millpond.agents.delivery.dead_messages import DEAD_LETTER_RETENTION_MS
from millpond.pipeline.stores.memory.server import Hash, Zset
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from tests.support import given
from tests.support.delivery import Delivering

TOPICS: dict[AgentName, str] = {"messages": "t/a", "queue": "queue/a", "pubsub": "pubsub/a"}
agents = pytest.mark.parametrize("agent", TOPICS)


def a_world(agent: AgentName, *tables: str) -> tuple[Delivering, str]:
    rules = tables or (given.retain(expired_time=60), given.clear_retained())
    world = Delivering(agent, given.store(), given.queue(), given.pubsub(), *rules)
    return world, TOPICS[agent]


def retained(world: Delivering, topic: str) -> list[str]:
    return list(world.server.of(keys.retained(topic), Zset))


def body(world: Delivering, message_id: str) -> dict[str, str] | None:
    shown = world.server.values.get(keys.message_body(message_id))
    if not isinstance(shown, Hash):
        return None
    return {name: value.decode() for name, value in shown.items()}


@agents
def test_a_publish_that_turns_out_to_be_retained_has_one_body_for_both(agent: AgentName) -> None:
    world, topic = a_world(agent)
    # Also when both are in one batch
    world.tell(given.published("m1", topic), given.retained("m1", topic))
    assert retained(world, topic) == ["m1"]
    assert world.stored(topic) == ["m1"]
    assert (body(world, "m1") or {})["retain"] == "true"
    # When the retained entry has gone, Then the message is stored still
    world.at(world.now_ms + 60_000)
    assert retained(world, topic) == []
    assert world.stored(topic) == ["m1"]
    assert body(world, "m1") is not None


@agents
def test_what_is_not_stored_lives_as_long_as_it_is_retained(agent: AgentName) -> None:
    world, topic = a_world(agent)
    world.tell(given.retained("m1", topic, qos=0))
    assert world.stored(topic) == []
    assert (body(world, "m1") or {})["retain"] == "true"
    world.tell(given.retained("m2", topic))
    assert retained(world, topic) == ["m2"]
    assert body(world, "m1") is None
    world.tell(given.retained("m3", topic, payload=""))
    assert retained(world, topic) == []
    assert body(world, "m2") is None


@agents
def test_what_is_told_again_changes_nothing(agent: AgentName) -> None:
    world, topic = a_world(agent)
    world.tell(given.published("m1", topic, retain=True))
    score = world.server.of(keys.retained(topic), Zset)["m1"]
    world.tell(given.retained("m1", topic))
    assert world.server.of(keys.retained(topic), Zset) == {"m1": score}


@agents
def test_rules_say_what_is_kept_and_what_is_cleared(agent: AgentName) -> None:
    world, topic = a_world(agent, given.clear_retained())
    world.tell(given.retained("m1", topic))
    assert retained(world, topic) == []
    world, topic = a_world(agent, given.retain())
    world.tell(given.retained("m1", topic), given.retained("m2", topic, payload=""))
    assert retained(world, topic) == ["m1"]


@agents
def test_a_retained_message_goes_with_an_expiry_of_its_own(agent: AgentName) -> None:
    world, topic = a_world(agent)
    end = world.now_ms + 5_000
    world.tell(given.published("m1", topic, expires_at=end))
    world.tell(given.retained("m1", topic, expires_at=end))
    world.at(end)
    assert retained(world, topic) == []
    assert body(world, "m1") is None


@agents
def test_a_topic_that_nobody_can_publish_to_is_refused(agent: AgentName) -> None:
    world, topic = a_world(agent)
    world.tell(given.retained("m1", f"{topic}/+"))
    world.tell(given.retained("m2", topic))
    assert retained(world, topic) == ["m2"]


def test_a_dead_letter_that_is_retained_keeps_its_body_until_both_have_gone() -> None:
    world = Delivering(
        "queue", given.queue(max_length=1, overflow="dead_letter"), given.retain("queue/#", expired_time=60)
    )  # fmt: skip
    world.publish("m1", "m2")
    world.tell(given.retained("m1", "queue/a"))
    world.tell(given.retained("m2", "queue/a"))
    assert retained(world, "queue/a") == ["m2"]
    assert body(world, "m1") is not None
    world.at(world.now_ms + DEAD_LETTER_RETENTION_MS)
    assert body(world, "m1") is None


@agents
def test_a_body_that_a_refusal_let_go_of_is_kept_by_what_is_retained_at_once(
    agent: AgentName,
) -> None:
    world, topic = a_world(agent)
    # Given a foreign key in the place of the index: the entry is refused, and the body to be cleaned up
    world.server.keep(keys.message_index(topic), b"somebody else's")
    world.tell_unticked(given.published("m1", topic))
    # When the next batch is what the broker retains
    world.tell(given.retained("m1", topic))
    assert retained(world, topic) == ["m1"]
    assert (body(world, "m1") or {})["retain"] == "true"
