"""The time for an acknowledgement starts when it is the subscriber's turn: slow, frozen and late subscribers of pubsub."""

from __future__ import annotations

from collections import Counter

import pytest

from millpond.schemas import keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S
from tests.simulation import pubsub_judge as judge
from tests.unit.agents.pubsub.test_machine import ACK_TIMEOUT_MS, TOPIC, Pubsub
from tests.unit.agents.pubsub.test_readers import SHARED
from tests.unit.agents.queue.test_turns import Consumer, consume, names

VALID_MS = COMMAND_VALID_FOR_S * 1000


@pytest.mark.parametrize("topic_filter", [TOPIC, SHARED])
def test_a_slow_subscriber_that_acknowledges_each_message_gets_each_once(topic_filter: str) -> None:
    world = Pubsub(ack_timeout_s=3)
    world.join("a", topic_filter)
    world.publish(*names(200))
    slow = Consumer(world, "a", 200)
    consume(world, 42_000, slow)
    assert slow.got == Counter(names(200))
    assert not judge.dead(world.server)


@pytest.mark.parametrize("topic_filter", [TOPIC, SHARED])
def test_a_subscriber_that_is_frozen_gets_each_message_once_and_makes_no_dead_letters(
    topic_filter: str,
) -> None:
    world = Pubsub(max_deliveries=2, max_inflight=5)
    world.join("a", topic_filter)
    world.join("other")
    world.publish(*names(10))
    frozen, other = Consumer(world, "a", 0), Consumer(world, "other", 10)
    consume(world, 10 * ACK_TIMEOUT_MS, frozen, other, step_ms=10_000)
    assert frozen.got == Counter(names(5))
    assert other.got == Counter(names(10))
    frozen.work_ms = 10
    consume(world, 5_000, frozen, other)
    assert frozen.got == Counter(names(10))
    assert not judge.dead(world.server)


def test_what_a_frozen_client_of_a_group_has_goes_to_another_of_it_once() -> None:
    world = Pubsub(max_inflight=3)
    world.join("a", SHARED)
    world.publish(*names(8))
    frozen, other = Consumer(world, "a", 0), Consumer(world, "b", 10)
    consume(world, 1_000, frozen)
    world.join("b", SHARED)
    consume(world, 3 * ACK_TIMEOUT_MS, frozen, other, step_ms=1_000)
    assert frozen.got == Counter(names(3))
    assert other.got == Counter(names(8))
    # Its late acknowledgements make room, and count once
    world.ack("a", "m000", "m001")
    world.leave("b", SHARED)
    world.publish("n1", "n2", "n3")
    assert world.hand_over() == [("a", "n1"), ("a", "n2")]
    judge.check(world.server, world.driver)


def test_one_acknowledgement_is_for_one_copy_where_a_client_has_several() -> None:
    world = Pubsub(max_inflight=3)
    world.join("a")
    world.join("a", SHARED)
    world.publish("m1")
    assert world.hand_over() == [("a", "m1"), ("a", "m1")]
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b", SHARED)
    assert world.hand_over() == [("b", "m1")]
    world.ack("b", "m1")
    world.ack("a", "m1")
    assert world.shown("a") == "m1"
    members = judge.members(world.server)
    assert [len(each.left) for each in members.values()] == [0, 1, 0]
    world.ack("a", "m1")
    assert not any(each.in_hand for each in judge.members(world.server).values())


def died(world: Pubsub, *clients: str, alias: str | None = None) -> None:
    """The message is dead for these, with `max_deliveries` = 1."""
    for client in clients:
        world.join(client)
    world.publish("m1")
    world.sent(world.take(), alias)
    for client in clients:
        world.leave(client, TOPIC, "disconnected")
    world.at(world.now_ms + VALID_MS)


@pytest.mark.parametrize("alias", [None, "copy of "])
def test_a_late_acknowledgement_takes_the_dead_letter_back_with_the_last_subscriber(
    alias: str | None,
) -> None:
    """Seen: the dead letter stayed, and `requeue` did the job twice."""
    world = Pubsub(max_deliveries=1, max_length=1)
    died(world, "a", "b", alias=alias)
    world.publish("m2")
    world.restart()
    world.ack("c", f"{alias or ''}m1")
    world.ack("a", f"{alias or ''}m1", topic="pubsub/other")
    world.ack("a", f"{alias or ''}m1")
    assert judge.dead(world.server)["m1"].subscribers == ("b",)
    judge.check(world.server, world.driver)
    world.ack("b", f"{alias or ''}m1")
    assert not judge.dead(world.server)
    assert keys.message_body("m1") not in world.server.values
    world.requeue("m1", topic=TOPIC)
    for client in "ab":
        world.join(client)
    assert world.hand_over() == [("a", "m2"), ("b", "m2")]
    judge.check(world.server, world.driver)


def test_a_late_acknowledgement_does_not_take_the_body_from_who_gets_it_once_more() -> None:
    world = Pubsub(max_deliveries=1, max_length=1)
    died(world, "a", "b")
    world.requeue("m1", topic=TOPIC)
    world.publish("m2")
    world.join("a")
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]
    world.ack("a", "m2")
    world.leave("a", TOPIC)
    assert judge.dead(world.server)["m1"].subscribers == ("a",)
    world.ack("a", "m1")
    assert judge.dead(world.server)["m1"].requeued
    world.join("b")
    assert world.hand_over() == [("b", "m1"), ("b", "m2")]
    world.ack("b", "m1", "m2")
    judge.check(world.server, world.driver)


def test_a_client_of_a_group_takes_back_what_is_dead_for_the_group() -> None:
    world = Pubsub(max_deliveries=1, max_inflight=1)
    world.join("a", SHARED)
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert not judge.dead(world.server)
    world.join("b", SHARED)
    assert list(judge.dead(world.server)) == ["m1"]
    world.ack("a", "m1")
    assert not judge.dead(world.server)
    world.publish("m2", "m3")
    assert len(world.hand_over()) == 2
    judge.check(world.server, world.driver)
