"""Members that more than one topic may wait for: rounds, in ticks, fair and complete; pauses and what goes on after them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from millpond.agents.delivery import leasing, rounds
from millpond.agents.delivery import machine as delivery
from millpond.agents.delivery.members import Member
from millpond.agents.queue import machine as queue
from millpond.schemas.events import RulesChanged
from tests.support import given
from tests.support.delivery import AT, Delivering
from tests.unit.agents.queue.test_machine import a_queue


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PAGE_MAX", 1)
    monkeypatch.setattr(queue, "PAGE_MAX", 1)
    monkeypatch.setattr(rounds, "FILTERS_MAX", 1)
    monkeypatch.setattr(rounds, "ROUNDS_MAX", 1)
    monkeypatch.setattr(delivery, "READ_MIN", 1)


def member(world: Delivering, name: str) -> Any:
    return world.driver.machine._members[name]  # type: ignore[attr-defined]


def test_plain_filters_of_one_client_take_turns() -> None:
    """Found by reading: a round that had stopped at a plain filter began with it again, for ever."""
    world = a_queue(max_inflight=1)
    world.join("c", "queue/a")
    world.join("c", "queue/b")
    for topic in ("queue/a", "queue/b"):
        world.publish(*(f"{topic[-1]}{number}" for number in range(3)), topic=topic)
    served = []
    while new := world.hand_over():
        ((_, name),) = new
        served.append(name)
        world.ack("c", name, topic=f"queue/{name[0]}")
    assert sorted(served) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert served.index("b0") < 3


@pytest.mark.usefixtures("small_pages")
def test_a_round_goes_through_all_pages_and_filters() -> None:
    world = a_queue(max_inflight=9)
    names = [f"{topic}{number}" for topic in "abc" for number in range(2)]
    for name in names:
        world.publish(name, topic=f"queue/{name[0]}/jobs")
    world.publish("x", topic="queue/x")
    world.join("w", "queue/+/jobs")
    world.join("w", "queue/x")
    assert sorted(name for _, name in world.hand_over()) == [*names, "x"]


def test_a_filter_that_was_given_up_in_the_middle_of_a_round_does_not_end_it(
    small_pages: None,
) -> None:
    world = a_queue(max_inflight=1)
    world.publish("a0", topic="queue/a")
    world.publish("b0", topic="queue/b")
    world.join("w", "queue/a")
    world.join("w", "queue/b")
    world.join("w", "queue/z/#")
    assert world.hand_over() == [("w", "a0")]
    world.leave("w", "queue/z/#", "unsubscribed")
    world.ack("w", "a0", topic="queue/a")
    assert world.hand_over() == [("w", "b0")]


def test_a_member_that_left_while_on_its_round_is_handed_nothing() -> None:
    world = a_queue(max_inflight=1)
    world.publish("a0", topic="queue/a")
    joined = given.joined("w", "queue/#", source_offset=1)
    left = given.left("w", "queue/#", source_offset=2)
    world.tell(joined, left)
    assert world.take() == []
    assert not msgspec.json.decode(world.table("members")["w"], type=Member).round.active


def test_a_new_filter_for_what_waits_already_is_served_when_there_is_room() -> None:
    """Found by reading: it had gone through all that waited, and did not know that more was its own by now."""
    world = a_queue(max_inflight=1)
    world.publish("b0", topic="queue/b")
    world.publish("a0", topic="queue/a/jobs")
    world.join("w", "queue/a/#")
    assert world.hand_over() == [("w", "a0")]
    world.ack("w", "a0", topic="queue/a/jobs")
    world.publish("a1", topic="queue/a/jobs")
    assert world.hand_over() == [("w", "a1")]
    world.join("w", "queue/b")
    world.ack("w", "a1", topic="queue/a/jobs")
    assert world.hand_over() == [("w", "b0")]


def test_what_is_left_in_hand_of_a_filter_given_up_makes_room_for_the_other() -> None:
    """Found by reading: a member of one plain filter was thought to have nothing to look for elsewhere."""
    world = a_queue(max_inflight=1)
    world.publish("b0", topic="queue/b")
    world.join("w", "queue/b")
    world.join("w", "queue/a")
    world.publish("a0", topic="queue/a")
    world.leave("w", "queue/b", "unsubscribed")
    assert world.hand_over() == [("w", "b0")]
    world.ack("w", "b0", topic="queue/b")
    assert world.hand_over() == [("w", "a0")]


def test_what_begins_to_wait_during_a_round_is_not_forgotten_by_a_restart(
    small_pages: None,
) -> None:
    """Found by reading: the mark that the round is to be gone once more was not kept."""
    world = a_queue(max_inflight=9)
    world.publish("b0", topic="queue/b")
    world.publish("c0", topic="queue/c")
    world.tell_unticked(given.joined("w", "queue/#", source_offset=1))
    for _ in range(2):
        world.tick()
    world.tell_unticked(given.published("a0", "queue/a"))
    world.driver = world.started()
    world.settle()
    assert sorted(name for _, name in world.hand_over()) == ["a0", "b0", "c0"]


def test_room_that_comes_during_a_round_that_left_something_starts_it_once_more() -> None:
    tables = [
        given.queue("queue/a", max_inflight=1),
        given.queue("queue/b", max_inflight=2),
        given.queue("queue/c", max_inflight=2),
    ]
    world = Delivering("queue", *tables)
    world.publish("a0", "a1", topic="queue/a")
    world.join("w", "queue/#")
    assert world.hand_over() == [("w", "a0")]
    world.publish("b0", topic="queue/b")
    assert world.hand_over() == [("w", "b0")]
    world.ack("w", "a0", topic="queue/a")
    assert world.hand_over() == []  # one message in hand is the rule's limit for a
    world.ack("w", "b0", topic="queue/b")
    assert world.hand_over() == [("w", "a1")]


# -- pauses


def test_too_much_that_is_unconfirmed_pauses_leasing_until_half_of_it_is(
    monkeypatch: pytest.MonkeyPatch, small_pages: None
) -> None:
    monkeypatch.setattr(leasing, "UNCONFIRMED_MAX", 2)
    world = a_queue()
    world.join("a", "queue/a")
    world.join("b", "queue/b")
    for number in range(2):
        world.publish(f"a{number}", topic="queue/a")
        world.publish(f"b{number}", topic="queue/b")
    commands = world.take()
    assert [command.message_id for command in commands] == ["a0", "b0"]
    world.publish("q", topic="queue/a", qos=0)
    assert world.take() == []
    world.restart()
    world.sent(commands[:1])
    assert [command.message_id for command in world.take()] == ["a1"]
    world.sent(commands[1:])
    assert world.hand_over() == [("a", "q")]
    assert world.hand_over() == [("b", "b1")]


def test_a_resumption_goes_on_page_by_page_and_begins_anew_when_told_so(
    monkeypatch: pytest.MonkeyPatch, small_pages: None
) -> None:
    """Found by reading: told so within a tick, it looked for a page that nobody had read."""
    monkeypatch.setattr(leasing, "UNCONFIRMED_MAX", 2)
    monkeypatch.setattr(leasing, "SEND_TIMEOUT_MS", 5_000)
    world = a_queue()
    for topic in "abcd":
        world.publish(f"{topic}0", topic=f"queue/{topic}")
    world.join("w", "queue/#")
    commands = world.take()
    assert len(commands) == 2
    world.tell_unticked(*world.reports(commands[:1]))
    world.tick()
    world.tick()
    assert len(world.take()) == 1
    world.at(world.now_ms + 5_000)
    world.ack("w", "a0", topic="queue/a")
    while new := world.hand_over():
        for client, name in new:
            world.ack(client, name, topic=f"queue/{name[0]}")
    assert [world.stored(f"queue/{topic}") for topic in "abcd"] == [[], [], [], []]


def test_a_resumption_told_to_begin_anew_in_its_own_tick_does_so(
    monkeypatch: pytest.MonkeyPatch, small_pages: None
) -> None:
    """Found by reading: it looked for a page that nobody had read, and the worker stopped."""
    monkeypatch.setattr(leasing, "UNCONFIRMED_MAX", 2)
    monkeypatch.setattr(leasing, "SEND_TIMEOUT_MS", 5_000)
    world = a_queue()
    world.join("a", "queue/a")
    world.join("b", "queue/b")
    world.publish("a0", topic="queue/a")
    for topic in "xy":
        world.publish(f"{topic}0", topic=f"queue/{topic}")
    rules = given.rules(given.queue()).canonical()
    world.tell_unticked(RulesChanged(**AT, agent="queue", rules=rules))
    world.tick()
    world.tell_unticked(given.published("b0", "queue/b"), given.published("b1", "queue/b"))
    counters = world.driver.machine.partition_state()["delivery"]
    assert counters["paused"] and counters["resuming"] and counters["resume_after"]
    world.at(world.now_ms + 5_000)
    assert world.driver.machine.partition_state()["delivery"]["resuming"] is False
    world.hand_over()
    assert {name for _, name in world.hand_over()} <= {"a0", "b0", "b1"}


def test_a_join_during_a_round_makes_it_go_once_more() -> None:
    world = a_queue()
    world.publish("a0", topic="queue/a")
    world.publish("b0", topic="queue/b")
    joins = [given.joined("w", each, source_offset=1) for each in ("queue/a/#", "queue/b")]
    world.tell(*joins)
    assert sorted(name for _, name in world.hand_over()) == ["a0", "b0"]


def test_who_reaches_a_topic_is_remembered_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.agents.delivery.members.TOPICS_REMEMBERED_MAX", 1)
    world = a_queue()
    world.join("w", "queue/#")
    for topic in "abab":
        world.publish(f"{topic}{world.now_ms}", topic=f"queue/{topic}")
        world.now_ms += 1
    assert len(world.take()) == 4
