"""Members that have gone: in the store alone, until there is word of them."""

from __future__ import annotations

from millpond.agents.delivery.members import HeldFilter, Member, Members
from millpond.agents.delivery.membership import FORGET_MS
from millpond.agents.reads import ReadStates
from tests.support.delivery import Delivering
from tests.unit.agents.queue.test_machine import a_queue
from tests.unit.agents.queue.test_members import VALID_MS

HELD = HeldFilter(1, 5, broker_delivers=False)
AWAY = b'["a",1,1]'


def in_memory(world: Delivering) -> list[str]:
    return list(world.driver.machine._members.awake())  # type: ignore[attr-defined]


def finish(members: Members) -> dict[str, bytes | None]:
    """The end of a batch: what it writes."""
    return {effect.key: effect.state for effect in members.finish()}


def came(*names: str) -> Members:
    """Members that hold a filter; all is in the store."""
    members = Members()
    for name in names:
        members.add(name, Member(name.rpartition("\0")[2], 1, 1))
        members.hold(name, "t", HELD)
    finish(members)
    members.settled()
    return members


def asked(members: Members, *names: str) -> tuple[str, ...]:
    return tuple(name for read in members.unknown(names) for name in read.names)


def test_who_has_gone_is_remembered_but_not_in_memory() -> None:
    world = a_queue()
    world.join("a", session=7, source_offset=20)
    world.leave("a", session=7, source_offset=21, reason="disconnected")
    assert in_memory(world) == []
    # Old news is told from new all the same, and then not kept in memory either.
    world.join("a", session=7, source_offset=19)
    world.leave("a", session=6, source_offset=22)
    assert in_memory(world) == []
    world.publish("m1")
    assert world.take() == []
    world.join("a", session=7, source_offset=23)
    assert world.hand_over() == [("a", "m1")]


def test_who_has_gone_with_something_in_hand_stays_until_that_is_back() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.leave("a", reason="disconnected")
    world.restart()
    assert in_memory(world) == ["a"]
    world.at(world.now_ms + VALID_MS)
    assert in_memory(world) == []
    world.restart()
    assert in_memory(world) == []
    assert list(world.table("members")) == ["a"]
    world.at(world.now_ms + FORGET_MS)
    assert world.table("members") == {}


def test_who_goes_is_in_memory_until_the_store_knows() -> None:
    members = came("a")
    members.let_go("a", "t")
    assert list(finish(members)) == ["a"]
    assert asked(members, "a") == ()
    # The next batch has word of it, before that one is in the store.
    members.touch("a")
    members.settled()
    assert list(members.awake()) == ["a"]
    finish(members)
    members.settled()
    assert list(members.awake()) == []
    assert members.unknown(["a", "a"]) == [ReadStates(("a",), "members")]


def test_who_is_forgotten_is_not_asked_for_until_the_store_has_forgotten_it() -> None:
    members = Members()
    members.supply({"a": AWAY})
    members.remove("a")
    assert finish(members) == {"a": None}
    assert asked(members, "a") == ()
    members.settled()
    assert asked(members, "a") == ("a",)


def test_that_there_is_no_such_member_is_known_for_one_batch() -> None:
    members = Members()
    members.supply({"a": None, "b": AWAY})
    assert asked(members, "a", "b", "c") == ("c",)
    assert finish(members) == {}
    members.settled()
    assert asked(members, "a", "b") == ("a", "b")


def test_the_memberships_of_a_client_are_in_their_order_whoever_was_away() -> None:
    names = ["a", "$share/g\0a", "$share/h\0a"]
    members = came(*names)
    for name in names[:2]:
        members.let_go(name, "t")
        finish(members)
        members.settled()
    assert [name for name, _ in members.of_client("a")] == names[2:]
    for name in names[:2]:
        members.supply({name: AWAY})
    assert [name for name, _ in members.of_client("a")] == names
    finish(members)
    members.settled()
    members.let_go(names[2], "t")
    finish(members)
    members.settled()
    assert members.of_client("a") == []
