"""A store that lost everything is rebuilt as it was: by the rules of that time, and without repeated outputs."""

from __future__ import annotations

from millpond.schemas import keys
from millpond.schemas.events import RulesChanged
from tests.support import given
from tests.support.partition import World, run

KEEP, RETAIN = (given.store(),), (given.retain(),)
OWN_KEY = keys.agent_record_key("messages").encode()


def folded_world(*tables: str) -> World:
    """Return a world that has folded one message in front of its first `rules.changed`, and one behind it."""
    world = World(*tables)
    world.append(given.published("early", retain=True))
    driver = world.started()
    world.feed(driver)
    world.append(given.published("late", retain=True))
    world.feed(driver)
    run(driver.maintain())
    world.commit(driver)
    return world


def public(world: World) -> dict[str, object]:
    return {name: value for name, value in world.server.dump().items() if name.startswith("mqtt:")}


def lose(world: World) -> dict[str, object]:
    """Empty the store; return what it had."""
    before = public(world)
    world.server.values.clear()
    world.server.expires_at.clear()
    return before


def test_records_in_front_of_the_first_rules_are_folded_by_these_and_not_by_new_ones() -> None:
    world = folded_world(*KEEP)
    before = lose(world)
    driver = world.started(given.rules(*RETAIN))
    assert public(world) == before
    # Its own rules are in the log now, and in force from there on.
    world.feed(driver)
    world.append(given.published("new", "u", retain=True))
    world.feed(driver)
    assert keys.retained("u") in public(world)
    assert keys.message_index("u") not in public(world)


def test_records_that_do_not_decode_are_not_taken_for_the_first_rules() -> None:
    world = World(*KEEP)
    world.append(given.published("early", retain=True))
    world.append_raw(OWN_KEY, b"poison")
    event = RulesChanged(at=0, node="n", agent="messages", rules="[]?")
    world.append_raw(*given.key_and_value(event))
    world.append(given.tick("messages"))
    driver = world.started()
    world.feed(driver)
    run(driver.maintain())
    world.commit(driver)
    before = lose(world)
    world.started(given.rules(*RETAIN))
    assert public(world) == before


def test_a_log_without_its_beginning_or_without_rules_is_folded_by_the_owners_rules() -> None:
    world = folded_world(*KEEP)
    lose(world)
    world.log.forget(world.partition.topic, 0, 1)
    names = public_after(world)
    assert keys.message_index("t") in names
    unnamed = World(*KEEP)
    unnamed.append(given.published("early", retain=True))
    unnamed.log.committed[unnamed.partition] = 1
    driver = unnamed.owner()
    run(driver.process(()))
    run(driver.finish())
    assert keys.message_index("t") in public(unnamed)


def public_after(world: World) -> dict[str, object]:
    """Return what a new owner with the same rules makes of the rest of the log."""
    world.started()
    return public(world)


def test_an_owner_logs_that_it_rebuilds_and_produces_nothing_again() -> None:
    world = folded_world(*KEEP)
    produced = len(world.log.produced)
    lose(world)
    world.started()
    assert any(
        "the store holds no state of it: rebuilding it from the log" in each
        for each in world.notices
    )
    assert len(world.log.produced) == produced


def test_a_driver_that_is_not_started_folds_what_is_committed_and_announces_nothing() -> None:
    # A replay does so.
    world = folded_world(*KEEP)
    before = lose(world)
    end = len(world.log.records[world.partition.topic, 0])
    world.log.committed[world.partition] = end
    produced = len(world.log.produced)
    driver = world.owner(given.rules(*RETAIN))
    run(driver.process(()))
    run(driver.finish())
    run(driver.close())
    assert public(world) == before
    assert len(world.log.produced) == produced
    assert world.applied is not None
    assert world.applied.offset == end - 1
