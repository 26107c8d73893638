"""The table of the queue machine: one row for each rule. Driver, store and log are real, in memory."""

from __future__ import annotations

from typing import Any

import pytest

from millpond.agents.delivery import leasing
from millpond.agents.queue.machine import QueueMachine
from millpond.agents.topics.due_times import MESSAGE
from millpond.pipeline.stores.memory.server import Zset
from millpond.schemas import keys
from millpond.schemas.events import OperatorRewind
from tests.support import given
from tests.support.delivery import AT, Delivering

ACK_TIMEOUT_MS = 30_000


def a_queue(**settings: Any) -> Delivering:
    """A world whose `queue/#` is a queue."""
    return Delivering("queue", given.queue(**settings))


# -- storing and handing out


def test_what_was_stored_is_handed_to_who_comes_in_the_order_it_was_published() -> None:
    world = a_queue()
    world.publish("m1", "m2", "m3")
    assert world.stored("queue/a") == ["m1", "m2", "m3"]
    assert world.take() == []
    world.join("c")
    assert world.taken() == [("c", "m1"), ("c", "m2"), ("c", "m3")]


def test_a_command_says_all_that_the_bridge_needs() -> None:
    world = a_queue(expired_time=60)
    world.publish("m1", payload="hello", qos=2)
    world.join("c", qos=1)
    (command,) = world.take()
    assert command.lease == "queue/0/1"
    assert (command.client_id, command.topic, command.message_id) == ("c", "queue/a", "m1")
    assert (command.qos, command.retain, command.attempt, command.valid_for_s) == (1, False, 1, 60)
    assert (command.payload, command.payload_encoding) == ("hello", "utf-8")
    assert command.expires_at == world.now_ms + 60_000


def test_a_live_publish_goes_to_one_member_at_once_and_members_take_turns() -> None:
    world = a_queue()
    world.join("a")
    world.join("b")
    world.publish("m1", "m2", "m3")
    assert world.taken() == [("a", "m1"), ("b", "m2"), ("a", "m3")]


def test_an_ack_deletes_and_makes_room() -> None:
    world = a_queue(max_inflight=2)
    world.publish("m1", "m2", "m3")
    world.join("c")
    assert world.hand_over() == [("c", "m1"), ("c", "m2")]
    world.ack("c", "m1")
    assert world.stored("queue/a") == ["m2", "m3"]
    assert world.hand_over() == [("c", "m3")]
    world.ack("c", "m2", "m3")
    assert world.stored("queue/a") == []
    assert world.table("windows") == {}


def test_only_who_has_had_a_message_may_acknowledge_it() -> None:
    world = a_queue()
    world.join("c")
    world.publish("m1")
    world.ack("other", "m1")
    assert world.stored("queue/a") == ["m1"]
    world.ack("c", "m1")
    assert world.stored("queue/a") == []


def test_an_overdue_lease_goes_to_another_member_and_is_handed_out_once_more() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")]
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert world.take() == []
    world.join("b")
    (again,) = world.take()
    assert (again.client_id, again.message_id, again.attempt) == ("b", "m1", 2)


def test_what_is_delivered_too_often_is_dead_and_comes_back_by_requeue() -> None:
    world = a_queue(max_deliveries=2)
    world.join("a")
    world.publish("m1")
    for session in (2, 3):
        assert world.hand_over() == [("a", "m1")]
        world.join("a", session=session)
    assert world.take() == []
    assert world.stored("queue/a") == []
    assert list(world.table("dead")) == ["m1"]
    (letter,) = world.dead_letters
    assert letter.value == b"hello"
    world.requeue("m1")
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m1")
    assert world.table("dead") == {}


def test_a_wildcard_member_gets_what_waits_in_every_matching_topic() -> None:
    world = a_queue()
    for name in ("b", "a", "c"):
        world.publish(f"m{name}", topic=f"queue/{name}/jobs")
    world.publish("other", topic="queue/x")
    world.join("w", "queue/+/jobs")
    assert sorted(world.hand_over()) == [("w", "ma"), ("w", "mb"), ("w", "mc")]
    world.publish("md", topic="queue/d/jobs")
    assert world.hand_over() == [("w", "md")]


def test_a_wildcard_member_with_little_room_goes_round_fairly() -> None:
    world = a_queue(max_inflight=1)
    for number in range(3):
        world.publish(*(f"{topic}{number}" for topic in "ab"), topic="queue/a")
        world.publish(f"c{number}", topic="queue/b")
    world.join("w", "queue/#")
    served = []
    while new := world.hand_over():
        ((_, name),) = new
        served.append(name)
        world.ack("w", name, topic="queue/b" if name.startswith("c") else "queue/a")
    assert sorted(served) == sorted(f"{x}{n}" for x in "abc" for n in range(3))
    assert served.index("c0") < 2


def test_a_session_that_ended_gives_back_at_once_to_the_head() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1", "m2")
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]
    world.leave("a")
    world.publish("m3")
    world.join("b")
    assert world.hand_over() == [("b", "m1"), ("b", "m2"), ("b", "m3")]


def test_a_failed_command_returns_and_the_member_rests() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    commands = world.take()
    world.fail(commands, "no_client")
    assert world.take() == []
    world.at(world.now_ms + leasing.REST_MS)
    (again,) = world.take()
    assert (again.message_id, again.attempt) == ("m1", 1)
    assert again.epoch != commands[0].epoch


def test_what_comes_back_is_handed_out_in_log_order() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1", "m2", "m3")
    commands = world.take()
    for each in reversed(commands):
        world.fail([each], "no_client")
    world.join("b")
    assert world.hand_over() == [("b", "m1"), ("b", "m2"), ("b", "m3")]


def test_nothing_falls_due_for_a_message_that_was_acknowledged_before_its_expiry() -> None:
    world = a_queue()
    world.join("a")
    for name in ("m1", "m2"):
        world.publish(name, expires_at=world.now_ms + 3_600_000)
    world.hand_over()
    world.ack("a", "m1", "m2")
    due = world.server.of(keys.due(world.partition), Zset)
    assert not [name for name in due if name.startswith(MESSAGE)]


def test_a_queue_cannot_be_rewound() -> None:
    world = a_queue()
    world.tell(OperatorRewind(**AT, topic="queue/a", subscriber="a", after=0))
    (letter,) = world.dead_letters
    assert b"only a subscriber of a pubsub topic" in dict(letter.headers)["reason"]


def test_a_queue_has_no_work_besides_rounds() -> None:
    machine = QueueMachine()
    with pytest.raises(AssertionError, match="no such work"):
        machine.page_besides("?")
    with pytest.raises(AssertionError, match="no such work"):
        machine.work_besides(0, "?", 0)
