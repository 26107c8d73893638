"""A store that has lost everything is rebuilt as it was: by the rules of then, and without a second output."""

from __future__ import annotations

from millpond.schemas import keys
from millpond.schemas.events import RulesChanged
from tests.support import given
from tests.support.partition import World, run

KEEP, RETAIN = (given.store(),), (given.retain(),)
OWN_KEY = keys.agent_record_key("messages").encode()


def emptied(*tables: str) -> World:
    """A world whose messages were folded by these rules before these were in the log, and whose store is empty now."""
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
    return {name: held for name, held in world.server.dump().items() if name.startswith("mqtt:")}


def lose(world: World) -> dict[str, object]:
    """What there was."""
    before = public(world)
    world.server.values.clear()
    world.server.expires_at.clear()
    return before


def test_what_came_before_the_first_rules_is_folded_by_them_and_not_by_new_ones() -> None:
    world = emptied(*KEEP)
    before = lose(world)
    driver = world.started(given.rules(*RETAIN))
    assert public(world) == before
    world.feed(driver)  # its own rules are in the log now, and count from there
    world.append(given.published("new", "u", retain=True))
    world.feed(driver)
    assert keys.retained("u") in public(world)
    assert keys.message_index("u") not in public(world)


def test_what_nobody_can_read_is_not_taken_for_rules() -> None:
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


def test_a_log_that_has_lost_its_beginning_or_names_no_rules_is_folded_by_the_owners() -> None:
    world = emptied(*KEEP)
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
    """What a new owner with the same rules makes of what is left."""
    world.started()
    return public(world)


def test_an_owner_says_that_it_rebuilds_and_produces_nothing_again() -> None:
    world = emptied(*KEEP)
    produced = len(world.log.produced)
    lose(world)
    world.started()
    assert any(
        "the store holds no state of it: rebuilding it from the log" in each
        for each in world.notices
    )
    assert len(world.log.produced) == produced


def test_a_driver_that_is_not_started_folds_what_is_committed_and_announces_nothing() -> None:
    # As replays do.
    world = emptied(*KEEP)
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
