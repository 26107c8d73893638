"""Faults: a store that is down, and a partition that another owner has written."""

from __future__ import annotations

import asyncio
import copy

import pytest

from millpond.agents.messages.machine import MessagesMachine
from millpond.pipeline.stores.memory.server import Moment
from millpond.schemas import keys
from millpond.schemas.errors import StoreDown, StoreRefused
from millpond.schemas.keys import Partition
from tests.support import given
from tests.support.partition import PARTITION, World, once, run, waits

RULES = (given.store(), given.retain(), given.command("INCR seen:${msgid}"))


# -- the store is down ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["read", "before", "after"])
@pytest.mark.parametrize("skipped", [0, 1, 2, 3, 4])
def test_everything_is_applied_once_although_the_store_was_down_for_a_moment(
    moment: Moment, skipped: int
) -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    fault = once(moment)
    calls = iter(range(100))

    def later(at: Moment, partition: Partition) -> None:
        if at != moment or next(calls) >= skipped:
            fault(at, partition)

    world.server.fault = later
    for name in "abc":
        world.append(given.published(name, retain=True, topic=f"t/{name}"))
        world.append_raw(b"t", b"poison")
        run(driver.process(world.unread(driver)))
        run(driver.maintain())
    assert world.counted_once("a", "b", "c")
    assert set(world.dead_letter_counts.values()) == {1}
    assert len(world.dead_letter_counts) == 3
    assert world.journal == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_two_batches_are_applied_once_when_the_store_fails_under_the_first(moment: Moment) -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    world.server.fault = once(moment)
    run(driver.process(world.append(given.published("a"))))
    run(driver.process(world.append(given.published("b"))))
    run(driver.settle())
    assert world.counted_once("a", "b")
    assert any("down" in notice for notice in world.notices)


def test_a_store_that_refuses_again_and_again_is_logged_once_for_each_reason_and_outage() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    reasons = iter(["full", "full", "lost", "full", "lost", "full"])

    def refuse(at: Moment, partition: Partition) -> None:
        reason = next(reasons, None) if at == "before" else None
        if reason is not None:
            raise StoreDown(reason)

    for name in "ab":
        before = len(world.notices)
        world.server.fault = refuse
        run(driver.process(world.append(given.published(name))))
        run(driver.settle())
        told = [each for each in world.notices[before:] if "loading the state" in each]
        assert [each.split(": ")[1].split(";")[0] for each in told] == ["full", "lost"]
        reasons = iter(["full", "lost", "lost"])
    assert world.counted_once("a", "b")


def test_skipped_records_between_a_lost_batch_and_the_next_still_move_the_clock() -> None:
    world = World(
        *RULES,
        given.a_rule(hook="session.subscribed", topic="q", action="on_message_fetch_for_queue"),
    )
    driver = world.started()
    world.feed(driver)
    world.server.fault = once("before")
    run(driver.process(world.append(given.published("a"))))
    world.now_ms = 99_000
    run(driver.process([world.append_raw(b"q", b"another agent's")]))
    world.now_ms = 10_000
    run(driver.process(world.append(given.published("b"))))
    run(driver.settle())
    assert world.applied is not None
    assert world.applied.now_ms == 99_000
    assert world.counted_once("a", "b")


def test_a_store_that_refuses_commands_stops_the_worker() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)

    def refuse(at: Moment, partition: Partition) -> None:
        raise StoreRefused("NOPERM")

    world.server.fault = refuse
    world.append(given.published())
    with pytest.raises(StoreRefused):
        world.feed(driver)
    run(driver.close())
    assert driver.committable == 1


def test_the_next_owner_continues_after_a_close_while_the_store_is_down() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    world.server.fault = once("after")
    run(driver.process(world.append(given.published("a"))))
    run(driver.close())
    assert "the next owner" in world.notices[-1]
    world.feed(world.started())
    assert world.counted_once("a")


def test_close_finishes_the_transaction_in_flight_and_removes_its_journal_entry() -> None:
    world = World(*RULES)
    driver = world.started()
    world.append_raw(b"t", b"poison")
    run(driver.process(world.unread(driver)))
    run(driver.close())
    assert world.journal == []
    assert driver.committable == 2


def test_an_owner_that_is_cancelled_within_a_batch_writes_nothing_of_it() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    world.log.acknowledges = False
    for _ in range(5):
        run(driver.process([world.append_raw(b"t", b"poison")]))
    world.append_raw(b"t", b"poison")
    world.append(given.published("a"))
    processing = driver.process(world.unread(driver))
    assert waits(processing)
    with pytest.raises(asyncio.CancelledError):
        processing.throw(asyncio.CancelledError())
    run(driver.close())
    world.log.acknowledges = True
    world.feed(world.started())
    assert world.counted_once("a")


# -- cleaning up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "after"])
def test_half_written_parts_are_removed_even_if_the_first_attempt_fails(
    moment: Moment,
) -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    foreign = keys.message_body("m1")
    world.server.keep(foreign, b"foreign")
    (record,) = world.append(given.published())
    world.feed(driver)
    world.server.fault = once(moment)
    run(driver.maintain())
    assert world.dead_letter_counts == {record.offset: 1}
    assert keys.message_index("t") not in world.server.values


def test_nothing_is_cleaned_up_after_a_record_that_the_store_has_lost() -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    before = copy.deepcopy(world.server.values)
    world.server.keep(keys.message_body("m1"), b"foreign")
    world.append(given.published())
    world.feed(driver)
    world.server.values = before
    run(driver.maintain())
    assert world.stored() == ["m1"]


# -- another owner --------------------------------------------------------------------------------------


def test_a_paused_owner_that_continues_after_its_successor_wrote_changes_nothing() -> None:
    world = World(*RULES)
    paused = world.started()
    world.feed(paused)
    first = world.append(given.published("a"))
    successor = world.started()
    world.feed(successor)
    run(paused.process(first))
    run(paused.settle())
    assert world.counted_once("a")
    assert any("another writer" in notice for notice in world.notices)


def test_maintain_finds_out_that_another_owner_has_written() -> None:
    world = World(*RULES)
    paused = world.started()
    world.feed(paused)
    successor = world.started()
    world.append(given.published("a"))
    world.feed(successor)
    run(paused.maintain())
    assert paused.next_offset == successor.next_offset


def test_a_bug_that_shows_after_another_owner_wrote_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(*RULES)
    paused = world.started()
    world.feed(paused)
    first = world.append(given.published("a"))
    world.feed(world.started())

    def step(*_: object) -> object:
        monkeypatch.undo()
        raise KeyError("a bug of ours")

    monkeypatch.setattr(MessagesMachine, "step", step)
    run(paused.process(first))
    run(paused.settle())
    (notice,) = [each for each in world.notices if "another owner has written" in each]
    assert "Traceback" in notice
    assert "in step" in notice
    assert "KeyError: 'a bug of ours'" in notice
    assert world.counted_once("a")


def test_the_journal_of_an_owner_that_crashed_before_producing_is_finished() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    poison = world.append_raw(b"t", b"\xff")
    # Applied, and then the owner crashes.
    run(driver.process([poison]))
    assert world.dead_letters == []
    successor = world.started()
    assert world.dead_letter_counts == {poison.offset: 1}
    assert world.dead_letters[0].value == b"\xff"
    run(successor.maintain())
    assert world.journal == []
    run(successor.maintain())
    assert world.dead_letter_counts == {poison.offset: 1}


def test_an_unfinished_journal_is_finished_even_below_the_committed_offset() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    poison = world.append_raw(b"t", b"\xff")
    run(driver.process([poison]))
    world.log.committed[PARTITION] = poison.offset + 1
    world.started()
    assert world.dead_letter_counts == {poison.offset: 1}


def test_a_journal_finished_once_is_not_finished_again_because_the_store_was_down() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    poison = world.append_raw(b"t", b"\xff")
    run(driver.process([poison]))
    successor = world.started()
    world.server.fault = once("before")
    run(successor.maintain())
    assert world.dead_letter_counts == {poison.offset: 1}
    assert world.journal == []


def test_outputs_that_a_crashed_owner_produced_and_left_in_the_journal_are_produced_again() -> None:
    world = World(*RULES)
    driver = world.started()
    poison = world.append_raw(b"t", b"\xff")
    world.feed(driver)
    assert world.dead_letter_counts == {poison.offset: 1}
    world.started()
    assert world.dead_letter_counts == {poison.offset: 2}


def test_a_dead_letter_of_the_journal_whose_record_is_gone_has_that_in_its_reason() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    run(driver.process([world.append_raw(b"t", b"\xff")]))
    world.append(given.published("a"))
    world.log.forget(PARTITION.topic, 0, 2)
    world.started()
    (dead_letter,) = world.dead_letters
    assert (dead_letter.key, dead_letter.value) == (None, None)
    assert b"no longer in the log" in dict(dead_letter.headers)["reason"]


def test_a_successor_does_not_repeat_the_outputs_of_the_journal_that_it_finished() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    run(driver.process([world.append_raw(b"t", b"\xff")]))
    successor = world.started()
    assert successor.committable == 2
    world.server.values.clear()
    run(successor.maintain())
    assert set(world.dead_letter_counts.values()) == {1}
