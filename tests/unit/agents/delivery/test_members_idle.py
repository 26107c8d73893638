"""Members that are there and idle: packed, until somebody looks at them."""

from __future__ import annotations

import pytest

from millpond.agents.delivery.members import Members
from millpond.agents.delivery.names import Names
from tests.support.delivery import Delivering
from tests.unit.agents.delivery.test_members_away import finish, in_memory
from tests.unit.agents.queue.test_machine import a_queue

IDLE = b'["a",1,1,{"t":[1,5,false]}]'
AT_WORK = b'["b",1,1,{"t":[1,5,false]},{"7":"t"}]'
RESTING = b'["c",1,1,{"t":[1,5,false]},{},0,9]'
INTERRUPTED = b'["d",1,1,{"t":[1,5,false]},{},0,0,0,["t","",false,false,false,true]]'
AWAY = b'["e",1,1]'


@pytest.fixture(autouse=True)
def _all_that_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.agents.delivery.members.AWAKE_MAX", 0)


def of_the_store(**packed: bytes) -> Members:
    members = Members()
    members.supply_all(packed)
    return members


def test_only_who_is_idle_is_packed() -> None:
    members = of_the_store(a=IDLE, b=AT_WORK, c=RESTING, d=INTERRUPTED, e=AWAY)
    assert list(members.awake()) == ["b", "c", "d"]
    assert [name for name in "abcde" if name in members] == ["a", "b", "c", "d"]
    assert [reach.name for reach in members.reaching("t")] == ["a", "b", "c", "d"]


def test_so_many_stay_in_use_though_they_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.agents.delivery.members.AWAKE_MAX", 1)
    members = of_the_store(a=IDLE, b=IDLE)
    assert list(members.awake()) == ["a"]


def test_who_is_only_looked_at_is_in_use_until_the_end_of_the_batch() -> None:
    members = of_the_store(a=IDLE)
    member = members["a"]
    assert members["a"] is member
    assert members.get("a") is member
    assert finish(members) == {}
    assert list(members.awake()) == []
    assert members["a"] == member


def test_who_changes_and_is_idle_again_is_packed_as_it_is_written() -> None:
    members = of_the_store(a=IDLE)
    members["a"].leases[7] = "t"
    members.touch("a")
    finish(members)
    assert list(members.awake()) == ["a"]
    del members["a"].leases[7]
    members["a"].epoch = 7
    members.touch("a")
    written = finish(members)
    assert list(members.awake()) == []
    assert members["a"].epoch == 7
    members.touch("a")
    assert finish(members) == written


def test_a_change_of_a_member_that_is_not_in_use_is_a_bug() -> None:
    members = of_the_store(a=IDLE)
    members.touch("a")
    with pytest.raises(AssertionError, match="in use"):
        finish(members)


def test_who_is_idle_has_room_for_all_it_may_have() -> None:
    members = of_the_store(a=IDLE, b=AT_WORK, c=RESTING)
    reaches = members.reaching("t")
    finish(members)
    assert [members.room(name, 3) for name in "abc"] == [3, 2, 0]
    assert [members.room(name, 1) for name in "abc"] == [1, 0, 0]
    reach = next(iter(members.turns(reaches, "a", 1)), None)
    assert reach is not None
    assert reach.name == "a"
    assert list(members.awake()) == ["b", "c"]


def served(world: Delivering) -> list[tuple[str, str]]:
    """Everybody takes what is there, and acknowledges it."""
    copies = world.hand_over()
    for client_id, message_id in copies:
        world.ack(client_id, message_id)
    return copies


def test_who_is_idle_is_served_in_turn() -> None:
    world = a_queue(max_inflight=1)
    for name in "abc":
        world.join(name)
    assert in_memory(world) == []
    world.publish("m1", "m2")
    assert in_memory(world) == ["a", "b"]
    assert served(world) == [("a", "m1"), ("b", "m2")]
    assert in_memory(world) == []
    world.restart()
    world.publish("m3", "m4")
    assert served(world) == [("c", "m3"), ("a", "m4")]
    world.leave("c", reason="unsubscribed")
    world.publish("m5", "m6")
    assert sorted(served(world)) == [("a", "m6"), ("b", "m5")]


def test_a_name_that_is_alone_and_names_that_are_not() -> None:
    names = Names()
    assert list(names.of("k")) == []
    for name in ("b", "b", "c", "a", "c"):
        names.add("k", name)
    names.add("l", "b")
    assert list(names.of("k")) == ["b", "c", "a"]
    assert list(names.of("l")) == ["b"]
    assert not names.remove("k", "b")
    assert not names.remove("k", "c")
    assert list(names.of("k")) == ["a"]
    assert names.remove("k", "a")
    assert list(names.of("k")) == []
    assert list(names.of("l")) == ["b"]
