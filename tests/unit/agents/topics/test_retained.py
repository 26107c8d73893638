"""`message.retained`: the retained entry follows what the broker retains, and nothing else changes."""

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
def test_a_publish_that_is_retained_afterwards_has_one_body_for_index_and_retained_entry(
    agent: AgentName,
) -> None:
    world, topic = a_world(agent)
    # When both events are in one batch
    world.tell(given.published("m1", topic), given.retained("m1", topic))
    assert retained(world, topic) == ["m1"]
    assert world.stored(topic) == ["m1"]
    assert (body(world, "m1") or {})["retain"] == "true"
    # When the retained entry expires, Then the message is still stored
    world.at(world.now_ms + 60_000)
    assert retained(world, topic) == []
    assert world.stored(topic) == ["m1"]
    assert body(world, "m1") is not None


@agents
def test_an_earlier_publish_neither_replaces_nor_clears_what_is_retained(agent: AgentName) -> None:
    world, topic = a_world(agent)
    world.tell(given.retained("new", topic, published_at=2_000))
    world.tell(given.retained("old", topic, published_at=1_999))
    world.tell(given.retained("older", topic, published_at=1_998, payload=""))
    assert retained(world, topic) == ["new"]
    world.tell(given.published("own", topic, retain=True, published_at=2_001))
    world.tell(given.retained("new", topic, published_at=2_000))
    assert retained(world, topic) == ["own"]
    world.tell(given.retained("last", topic, published_at=2_001, payload=""))
    assert retained(world, topic) == []


@agents
def test_a_message_without_an_index_entry_lives_as_long_as_it_is_retained(agent: AgentName) -> None:
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
def test_a_repeated_message_retained_changes_nothing(agent: AgentName) -> None:
    world, topic = a_world(agent)
    world.tell(given.published("m1", topic, retain=True))
    score = world.server.of(keys.retained(topic), Zset)["m1"]
    world.tell(given.retained("m1", topic))
    assert world.server.of(keys.retained(topic), Zset) == {"m1": score}


@agents
def test_the_rules_decide_whether_a_message_is_retained_and_whether_it_is_cleared(
    agent: AgentName,
) -> None:
    world, topic = a_world(agent, given.clear_retained())
    world.tell(given.retained("m1", topic))
    assert retained(world, topic) == []
    world, topic = a_world(agent, given.retain())
    world.tell(given.retained("m1", topic), given.retained("m2", topic, payload=""))
    assert retained(world, topic) == ["m1"]


@agents
def test_a_retained_message_with_its_own_expiry_expires(agent: AgentName) -> None:
    world, topic = a_world(agent)
    end = world.now_ms + 5_000
    world.tell(given.published("m1", topic, expires_at=end))
    world.tell(given.retained("m1", topic, expires_at=end))
    world.at(end)
    assert retained(world, topic) == []
    assert body(world, "m1") is None


@agents
def test_an_invalid_topic_is_not_retained(agent: AgentName) -> None:
    world, topic = a_world(agent)
    world.tell(given.retained("m1", f"{topic}/+"))
    world.tell(given.retained("m2", topic))
    assert retained(world, topic) == ["m2"]


def test_the_body_of_a_retained_dead_letter_lives_until_both_references_are_gone() -> None:
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
def test_a_body_that_a_refusal_released_stays_if_it_is_retained_in_the_next_batch(
    agent: AgentName,
) -> None:
    world, topic = a_world(agent)
    # Given a foreign key in the place of the index: the entry is refused, and its body waits for its removal
    world.server.keep(keys.message_index(topic), b"foreign")
    world.tell_unticked(given.published("m1", topic))
    # When the next batch retains the message
    world.tell(given.retained("m1", topic))
    assert retained(world, topic) == ["m1"]
    assert (body(world, "m1") or {})["retain"] == "true"
