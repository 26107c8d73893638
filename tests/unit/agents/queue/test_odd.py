"""What seldom meets: one tick, one batch or one name in which two things happen to a message of a queue."""

from __future__ import annotations

import pytest

from millpond.agents.delivery.members import Members
from millpond.agents.driver.deliveries import DeliverableMessage, published, stored_message
from millpond.agents.effects import DeliverMessage
from millpond.agents.ports import Record
from millpond.agents.topics import state_cache
from millpond.pipeline.stores.memory.server import Hash, Zset
from millpond.schemas import keys
from tests.support import given
from tests.support.delivery import Delivering
from tests.support.partition import run
from tests.unit.agents.queue.test_machine import a_queue
from tests.unit.agents.queue.test_members import VALID_MS


def test_a_message_that_dies_and_expires_in_one_tick_is_a_dead_letter_with_its_body() -> None:
    """Found by reading: its own expiry dropped the body."""
    world = a_queue(max_deliveries=1)
    world.join("a")
    world.publish("m1", expires_at=world.now_ms + VALID_MS + 1)
    world.hand_over()
    world.leave("a", reason="disconnected")
    world.at(world.now_ms + VALID_MS + 2)
    assert list(world.table("dead")) == ["m1"]
    assert keys.message_body("m1") in world.server.values


def test_a_message_that_dies_once_more_after_a_late_repeat_is_one_dead_letter() -> None:
    world = a_queue(max_length=1, overflow="dead_letter")
    world.publish("m1", "m2")
    for name in ("m3", "m4"):
        world.now_ms += 130_000
        world.publish(name)
    world.publish("m1", "m5")
    assert sorted(world.table("dead")) == ["m1", "m2", "m3", "m4"]
    assert world.stored("queue/a") == ["m5"]


def test_a_rest_that_began_anew_is_not_ended_by_the_time_of_the_old_one() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.fail(world.take(), "no_client")
    world.now_ms += 500
    world.join("a")
    world.fail(world.take(), "no_client")
    world.at(world.now_ms + 500)
    assert world.take() == []
    world.at(world.now_ms + 500)
    assert world.taken() == [("a", "m1")]


def test_a_refused_message_that_was_acknowledged_meanwhile_is_not_counted_off_twice() -> None:
    world = a_queue()
    world.join("a")
    world.server.values[keys.message_body("m1")] = b"somebody else's"
    for event in (given.published("m1", "queue/a"), given.acked("m1", "queue/a", client_id="a")):
        run(world.driver.process(world.append(event)))
    world.tick(world.now_ms + 1)
    world.tick(world.now_ms + 1)
    assert world.table("windows") == {}


def test_a_refused_receipt_leaves_the_queue_as_it_is() -> None:
    world = Delivering("queue", given.queue(), given.receipt(topic="queue/#"))
    world.publish("m1")
    world.server.values[keys.receipt("m1")] = b"somebody else's"
    world.ack("stranger", "m1")
    world.tick(world.now_ms + 1)
    assert world.stored("queue/a") == ["m1"]
    assert len(world.dead_letters) == 1


def test_dead_letters_and_messages_of_one_batch_come_out_in_order() -> None:
    world = a_queue()
    world.join("a")
    world.append(given.published("m1", "queue/a"))
    world.append_raw(b"queue/+", b"{}")
    world.append(given.joined("b", "queue/#/x"))
    world.tell(given.published("m2", "queue/a"))
    assert [name for _, name in world.taken()] == ["m1", "m2"]
    assert len(world.dead_letters) == 2


# -- where a message on its way comes from

OUTPUT = DeliverMessage(0, 1, "c", 0, "m1", "t", 1, 1, None)


def test_a_message_is_in_the_record_that_published_it_and_in_no_other() -> None:
    publish = given.record(given.published(), 0, 0)
    assert published(OUTPUT, publish) == DeliverableMessage(1, "hello", "utf-8", None)
    assert published(OUTPUT, None) is None
    assert published(OUTPUT, Record(0, 0, b"t", b"not an event")) is None
    assert published(OUTPUT, given.record(given.published("m2"), 0, 0)) is None
    assert published(OUTPUT, given.record(given.acked(), 0, 0)) is None


def test_a_body_that_makes_no_sense_is_no_message() -> None:
    assert stored_message({"qos": b"1", "payload": b"x", "expires_at": b"7"}) == DeliverableMessage(
        1, "x", "utf-8", 7
    )
    for body in ({}, {"qos": b"3"}, {"qos": b"x"}, {"qos": b"1", "expires_at": b"x"}):
        assert stored_message(body) is None


def test_a_message_of_qos_0_whose_record_is_gone_is_not_handed_out() -> None:
    """The owner was killed before it had produced the command; its successor finds the record gone."""
    world = a_queue()
    world.join("a")
    world.take()
    world.log.acknowledges = True
    (record,) = world.append(given.published("m1", "queue/a", qos=0))
    run(world.driver.process([record]))
    world.append(given.published("m2", "queue/a"))
    world.log.forget(world.partition.topic, 0, record.offset + 1)
    world.restart()
    assert [each.message_id for each in world.take()] == ["m2"]


def test_an_owner_that_trips_over_what_its_successor_wrote_loads_instead_of_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by the simulation: members held in memory and windows just read were of different times."""
    monkeypatch.setattr(state_cache, "STATES_HELD_MAX", 0)
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.publish("x", topic="queue/x")  # by now the window of the other topic is not in memory
    old = world.driver
    world.restart()
    world.fail(world.take()[:1], "no_client")
    world.join("b")
    world.ack("stranger", "m1")
    assert ("b", "m1") in world.taken()
    world.notices.clear()
    (record,) = world.append(given.acked("m1", "queue/a", client_id="b"))
    world.log.forget(world.partition.topic, 0, record.offset)  # with them how the other one came
    run(old.process([record]))
    assert any("another owner" in notice for notice in world.notices)
    world.driver = old
    world.settle()
    assert world.stored("queue/a") == []
    assert world.driver.machine.partition_state()["delivery"]["unconfirmed"] == 0


def test_a_topic_that_becomes_a_queue_leaves_alone_what_lay_there_before() -> None:
    world = a_queue()
    world.server.values[keys.message_index("queue/a")] = Zset({"old": 1})
    world.server.values[keys.message_body("old")] = Hash({"qos": b"1", "payload": b"old"})
    world.publish("m1")
    world.restart()
    world.join("a")
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m1")
    assert world.stored("queue/a") == ["old"]
    assert world.table("windows") == {}


def test_members_that_a_scan_finds_twice_are_there_once() -> None:
    members, packed = Members(), b'["c",1,1,{"queue/a":[1,5,false]}]'
    for _ in range(2):
        members.supply_all({"c": packed})
    assert [name for name, _ in members.of_client("c")] == ["c"]
    assert [reach.name for reach in members.reaching("queue/a")] == ["c"]
