"""What the driver produces to Kafka: dead letters, refusals, rules and ticks."""

from __future__ import annotations

import pytest

from millpond.agents.driver.ticks import TICK_INTERVAL_MS
from millpond.schemas import codec, keys
from millpond.schemas.events import NodeStarted, RulesChanged, Tick
from tests.support import given
from tests.support.partition import PARTITION, World, run, waits

INCR = given.command("INCR seen:${msgid}")


# -- outputs --------------------------------------------------------------------------------------------


def test_outputs_are_in_the_journal_until_kafka_has_them() -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    world.append_raw(b"t", b"poison")
    world.log.acknowledges = False
    run(driver.process(world.unread(driver)))
    settling = driver.settle()
    assert waits(settling)
    assert world.journal == [2]
    world.log.acknowledges = True
    assert not waits(settling)
    run(driver.maintain())
    assert world.journal == []


def test_nothing_is_committed_before_its_outputs_are_in_kafka() -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    poison = world.append_raw(b"t", b"poison")
    world.log.acknowledges = False
    run(driver.process(world.unread(driver)))
    assert driver.committable == poison.offset
    settling = driver.settle()
    assert waits(settling)
    assert driver.committable == poison.offset
    world.log.acknowledges = True
    assert not waits(settling)
    assert driver.committable == poison.offset + 1


def test_nothing_is_committable_before_anything_is_folded() -> None:
    driver = World(given.store()).started()
    assert driver.committable is None


def test_four_batches_of_outputs_can_be_pending_and_the_next_one_waits() -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    world.log.acknowledges = False
    for _ in range(5):
        run(driver.process([world.append_raw(b"t", b"poison")]))
    sixth = driver.process([world.append_raw(b"t", b"poison")])
    assert waits(sixth)
    world.log.acknowledges = True
    assert not waits(sixth)
    run(driver.settle())
    assert set(world.dead_letter_counts.values()) == {1}
    assert len(world.dead_letter_counts) == 6


def test_outputs_below_the_committed_offset_are_not_produced_again() -> None:
    world = World(given.store(), given.command("SET ${payload} x"))
    driver = world.started()
    world.append_raw(b"t", b"poison")
    world.append(given.published(payload="millpond:mine"))
    world.feed(driver)
    world.commit(driver)
    world.server.values.clear()
    later = world.append_raw(b"t", b"poison")
    rebuilt = world.started()
    world.feed(rebuilt)
    assert world.dead_letter_counts == {1: 1, 2: 1, later.offset: 1}
    assert world.stored() == ["m1"]


# -- refusals -------------------------------------------------------------------------------------------


def test_a_refused_record_becomes_a_dead_letter_and_the_next_transaction_removes_its_other_parts() -> (
    None
):
    world = World(given.store())
    driver = world.started()
    world.server.keep(keys.message_body("m1"), b"foreign")
    (record,) = world.append(given.published())
    world.feed(driver)
    assert world.dead_letter_counts == {record.offset: 1}
    assert b"WRONGTYPE" in dict(world.dead_letters[0].headers)["reason"]
    assert world.server.values[keys.message_index("t")]
    run(driver.maintain())
    assert keys.message_index("t") not in world.server.values
    assert world.server.values[keys.message_body("m1")] == b"foreign"


def test_a_record_with_several_refused_parts_becomes_one_dead_letter() -> None:
    world = World(given.store())
    driver = world.started()
    world.server.keep(keys.message_body("m1"), b"foreign")
    world.server.keep(keys.message_index("t"), b"foreign")
    (record,) = world.append(given.published())
    world.feed(driver)
    assert world.dead_letter_counts == {record.offset: 1}
    reason = dict(world.dead_letters[0].headers)["reason"]
    assert b"body" in reason and b"index" in reason


def test_the_dead_letter_of_a_refused_record_is_not_produced_again_after_a_loss() -> None:
    world = World(given.store())
    driver = world.started()
    foreign = keys.message_body("m1")
    world.server.keep(foreign, b"foreign")
    (record,) = world.append(given.published())
    world.feed(driver)
    run(driver.maintain())
    world.server.values = {foreign: b"foreign"}
    run(driver.maintain())
    run(driver.maintain())
    assert world.dead_letter_counts == {record.offset: 1}
    assert set(world.server.values) & {keys.message_index("t"), foreign} == {foreign}


def test_a_refused_cleaning_up_is_only_logged() -> None:
    world = World(given.retain())
    driver = world.started()
    world.server.keep(keys.retained("t"), b"foreign")
    (record,) = world.append(given.published(retain=True))
    world.feed(driver)
    run(driver.maintain())
    run(driver.maintain())
    assert world.dead_letter_counts == {record.offset: 1}
    assert any("refused its removal" in notice for notice in world.notices)
    assert keys.message_body("m1") not in world.server.values


def test_a_refused_user_command_becomes_a_dead_letter_and_is_not_retried() -> None:
    world = World(given.store(), given.command("INCR counter"))
    world.server.keep("counter", b"not a number")
    driver = world.started()
    (record,) = world.append(given.published())
    world.feed(driver)
    run(driver.maintain())
    assert world.dead_letter_counts == {record.offset: 1}
    assert world.stored() == ["m1"]


# -- rules ----------------------------------------------------------------------------------------------


def test_a_worker_announces_its_rules_in_a_partition_that_has_none() -> None:
    world = World(given.store())
    driver = world.started()
    assert world.written == [
        RulesChanged(at=0, node="millpond", agent="messages", rules=world.rules.canonical())
    ]
    assert world.log.produced[0].partition == 0
    world.feed(driver)
    assert world.text(keys.rules(PARTITION)) == world.rules.canonical()


def test_rules_in_force_are_not_announced_again() -> None:
    world = World(given.store())
    world.feed(world.started())
    driver = world.started()
    run(driver.maintain())
    assert len(world.written) == 1


def test_announced_rules_are_not_announced_again() -> None:
    world = World(given.store())
    driver = world.started()
    run(driver.maintain())
    assert len(world.written) == 1


def test_other_rules_are_announced_and_in_force_from_their_record_on() -> None:
    world = World(given.store())
    world.feed(world.started())
    silent = given.rules(given.store("other/#"))
    driver = world.owner(silent)
    world.append(given.published("before"))
    run(driver.start())
    world.append(given.published("after"))
    world.feed(driver)
    assert world.stored() == ["before"]
    assert len(world.written) == 2


def test_new_rules_decide_the_owner_of_later_records() -> None:
    world = World(given.store())
    driver = world.started()
    world.append(given.published("a"))
    queue = given.rules(
        given.a_rule(hook="session.subscribed", topic="#", action="on_message_fetch_for_queue")
    )
    world.append(RulesChanged(at=0, node="n", agent="messages", rules=queue.canonical()))
    world.append(given.published("b"))
    world.feed(driver)
    assert world.stored() == ["a"]
    assert driver.records_skipped == 1


def test_other_rules_at_the_end_of_the_log_make_the_worker_announce_its_own() -> None:
    world = World(given.store())
    world.feed(world.started())
    other = given.rules()
    world.append(RulesChanged(at=0, node="n", agent="messages", rules=other.canonical()))
    driver = world.started()
    world.feed(driver)
    run(driver.maintain())
    world.feed(driver)
    assert world.text(keys.rules(PARTITION)) == world.rules.canonical()
    run(driver.maintain())
    assert len(world.written) == 2


def test_rules_that_do_not_decode_become_a_dead_letter_and_change_nothing() -> None:
    world = World(given.store())
    driver = world.started()
    (bad,) = world.append(RulesChanged(at=0, node="n", agent="messages", rules="{"))
    world.append(given.published())
    world.feed(driver)
    assert world.dead_letter_counts == {bad.offset: 1}
    assert world.stored() == ["m1"]


# -- ticks ----------------------------------------------------------------------------------------------


def test_no_tick_is_sent_while_nothing_is_due() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    assert driver.tick(10_000_000) is None
    world.append(given.published())
    world.feed(driver)
    assert driver.tick(69_999) is None


def test_a_tick_that_is_due_names_its_partition() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    world.append(given.published())
    world.feed(driver)
    tick = driver.tick(70_000)
    assert tick is not None
    assert (tick.topic, tick.key, tick.partition) == ("mqtt.messages", b"$millpond/messages", 0)
    assert codec.decode(tick.value) == Tick(at=70_000, node="millpond", agent="messages")


def test_one_tick_is_in_flight_at_a_time() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    world.append(given.published())
    world.feed(driver)
    assert driver.tick(70_000) is not None
    assert driver.tick(200_000) is None


def test_the_next_tick_waits_an_interval() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    world.append(given.published("a"))
    world.now_ms = 10_500
    world.append(given.published("b"))
    world.feed(driver)
    world.now_ms = 70_000
    world.append_tick(driver, 70_000)
    world.feed(driver)
    assert world.stored() == ["b"]
    assert driver.tick(70_000 + TICK_INTERVAL_MS - 1) is None
    assert driver.tick(70_000 + TICK_INTERVAL_MS) is not None


def test_a_tick_follows_at_once_while_work_is_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.agents.topics.storage.SWEEP_ENTRIES_MAX", 1)
    world = World(given.store(expired_time=60))
    driver = world.started()
    world.append(*(given.published(name) for name in "abc"))
    world.feed(driver)
    world.now_ms = 70_000
    for remaining in (["b", "c"], ["c"], []):
        world.append_tick(driver, 70_000)
        world.feed(driver)
        assert world.stored() == remaining
    assert driver.tick(10_000_000) is None


def test_a_reload_forgets_the_tick_in_flight() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    world.append(given.published())
    world.feed(driver)
    assert driver.tick(70_000) is not None
    world.server.values.clear()
    run(driver.maintain())
    assert driver.tick(70_000 + TICK_INTERVAL_MS) is not None


def test_another_agents_event_changes_nothing() -> None:
    world = World(given.store())
    driver = world.started()
    world.append_raw(b"$millpond/sessions", codec.encode(NodeStarted(at=0, node="n")))
    world.feed(driver)
    assert driver.records_skipped == 1
