"""Losses: a store that lost data, a log that lost records, and a log that is not the state's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from millpond.pipeline.stores.memory.server import Hash
from millpond.schemas import keys
from millpond.schemas.errors import LogMismatch
from tests.support import given
from tests.support.partition import PARTITION, World, once, run

RULES = (given.store(), given.retain(), given.command("INCR seen:${msgid}"))


# -- the store lost data --------------------------------------------------------------------------------


def test_an_emptied_store_is_rebuilt_from_the_logs_start() -> None:
    world = World(*RULES)
    driver = world.started()
    world.append(given.published("a"))
    world.append_raw(b"t", b"poison")
    world.feed(driver)
    run(driver.maintain())
    before = world.server.dump()
    world.server.values.clear()
    world.server.expires_at.clear()
    run(driver.maintain())
    assert {name for name in before if name.startswith("mqtt:")} <= world.server.dump().keys()
    assert world.counted_once("a")
    assert set(world.dead_letter_counts.values()) == {1}


def test_records_whose_writes_a_failover_lost_are_folded_again() -> None:
    world = World(*RULES)
    driver = world.started()
    world.append(given.published("a"))
    world.feed(driver)
    before = copy.deepcopy(world.server.values)
    world.append(given.published("b"))
    world.feed(driver)
    world.server.values = before
    world.append(given.published("c"))
    world.feed(driver)
    assert world.counted_once("a", "b", "c")


def test_a_sequence_is_never_used_twice_even_if_the_store_goes_back() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    before = copy.deepcopy(world.server.values)
    world.append(given.published("a"))
    world.feed(driver)
    assert world.applied is not None
    used = world.applied.sequence
    world.server.values = before
    run(driver.maintain())
    run(driver.settle())
    assert world.applied.sequence > used


def test_a_new_owner_catches_up_to_the_committed_offset_by_itself() -> None:
    world = World(*RULES)
    driver = world.started()
    world.append(given.published("a"), given.published("b"))
    world.feed(driver)
    world.commit(driver)
    world.server.values.clear()
    rebuilt = world.started()
    assert rebuilt.next_offset == 3
    run(rebuilt.settle())
    assert world.counted_once("a", "b")


# -- the log --------------------------------------------------------------------------------------------


def test_records_removed_before_they_were_read_are_counted_and_skipped() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    run(driver.close())
    world.append(*(given.published(name) for name in "abc"))
    world.log.forget(PARTITION.topic, 0, 3)
    successor = world.started()
    world.feed(successor)
    assert successor.records_lost == 2
    assert any("2 records are no longer in the log" in notice for notice in world.notices)
    assert world.counted_once("c")
    assert world.text("seen:a") is None


def test_records_removed_in_front_of_a_run_are_counted_as_well() -> None:
    world = World(*RULES)
    driver = world.started()
    world.feed(driver)
    *_, last = world.append(*(given.published(name) for name in "abc"))
    world.log.forget(PARTITION.topic, 0, 4)
    run(driver.process([last]))
    run(driver.settle())
    assert driver.records_lost == 2
    assert world.counted_once("c")


def test_an_empty_store_counts_no_lost_records_when_the_log_begins_later() -> None:
    world = World(*RULES)
    world.append(*(given.published(name) for name in "abc"))
    world.log.forget(PARTITION.topic, 0, 2)
    driver = world.started()
    world.feed(driver)
    assert driver.records_lost == 0
    assert world.counted_once("c")


def another_cluster(world: World) -> None:
    world.log.cluster_id = "another"


def more_partitions(world: World) -> None:
    world.log.partition_count = 2


def a_shorter_log(world: World) -> None:
    world.log.records[PARTITION.topic, 0].clear()


def another_record(world: World) -> None:
    log = world.log.records[PARTITION.topic, 0]
    log[-1] = log[-1]._replace(timestamp=log[-1].timestamp + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_cluster, "of Kafka cluster memory, but this is cluster another"),
        (more_partitions, "with 1 partitions, but it has 2"),
        (a_shorter_log, "up to offset 1, but the log ends before 0"),
        (another_record, "of 10000 ms, but the log's record there is of 10001 ms"),
    ],
)
def test_a_store_of_another_log_is_refused_and_both_sides_are_named(
    change: Callable[[World], None], reason: str
) -> None:
    world = World(*RULES)
    driver = world.started()
    world.append(given.published())
    world.feed(driver)
    change(world)
    with pytest.raises(LogMismatch, match=reason):
        world.started()


def test_a_log_without_the_applied_record_still_continues_the_state() -> None:
    world = World(*RULES)
    driver = world.started()
    world.append(given.published("a"), given.published("b"))
    run(driver.process(world.unread(driver)[:2]))
    run(driver.close())
    world.log.forget(PARTITION.topic, 0, 2)
    world.feed(world.started())
    assert world.counted_once("a", "b")


def test_the_store_is_closed_even_if_nothing_was_loaded() -> None:
    world = World(*RULES)
    driver = world.owner()
    run(driver.close())


def test_a_journal_entry_of_another_owner_under_a_sequence_of_this_one_is_finished() -> None:
    world = World(*RULES)
    driver = world.started()
    world.append_raw(b"t", b"\xff")
    world.feed(driver)
    assert world.applied is not None
    journal = world.server.values[keys.journal(PARTITION)]
    assert isinstance(journal, Hash)
    journal[str(world.applied.sequence)] = b'[{"type":"dead_letter","offset":0,"reason":"another"}]'
    world.server.fault = once("before")
    run(driver.maintain())
    assert world.dead_letter_counts == {1: 1, 0: 1}
