"""The fence of every store: only one owner of a partition can write."""

from __future__ import annotations

import pytest

from millpond.agents.effects import RunCommand, SetDue, SetState
from millpond.agents.reads import ReadDue, ReadStates
from millpond.schemas.errors import Fenced
from tests.contracts.store_worlds import PARTITION, World, applied, commit, kept, transaction


async def test_the_slower_of_two_owners_is_fenced_and_nothing_of_its_batch_is_applied(
    world: World,
) -> None:
    slower, faster = world.store(), world.store()
    await slower.load()
    await faster.load()
    await commit(faster, transaction(1, kept(1, "m1", "t")))
    before = world.dump()
    late = transaction(1, SetState("t", b"late"), RunCommand(1, (b"INCR", b"seen:m1")))
    with pytest.raises(Fenced):
        await commit(slower, late)
    assert world.dump() == before
    assert (await slower.load()).applied == applied(1)
    assert await commit(slower, transaction(2, kept(2, "m2", "t"))) == []
    with pytest.raises(Fenced):
        await commit(faster, transaction(2, SetState("t", b"late")))
    await slower.close()
    await faster.close()


async def test_a_transaction_that_expects_another_fence_is_fenced(world: World) -> None:
    store = world.store()
    await store.load()
    with pytest.raises(Fenced):
        await commit(store, transaction(5, kept(1, "m1", "t")))
    assert world.dump() == {}
    await store.close()


async def test_an_emptied_store_fences_its_owner_and_has_no_state(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", "t")))
    world.clear()
    with pytest.raises(Fenced):
        await commit(store, transaction(2, SetState("t", b"s")))
    assert (await store.load()).applied is None
    assert await commit(store, transaction(1, kept(1, "m1", "t"))) == []
    await store.close()


async def test_a_check_notices_that_the_fence_has_changed(world: World) -> None:
    store, other = world.store(), world.store()
    await store.load()
    await store.check()
    await commit(store, transaction(1, SetState("t", b"1")))
    await store.check()
    await other.load()
    await commit(other, transaction(2))
    with pytest.raises(Fenced):
        await store.check()
    assert (await store.load()).applied == applied(2)
    world.clear()
    with pytest.raises(Fenced):
        await store.check()
    await store.close()
    await other.close()


async def test_after_a_failure_a_commit_requires_a_load(world: World) -> None:
    store = world.store()
    with pytest.raises(AssertionError):
        store.commit(store.pack(transaction(1)))
    await store.load()
    with pytest.raises(Fenced):
        await commit(store, transaction(5))
    with pytest.raises(AssertionError):
        store.commit(store.pack(transaction(1)))
    await store.close()


async def test_partitions_do_not_share_state(world: World) -> None:
    one, other = world.store(), world.store(PARTITION._replace(number=8))
    await one.load()
    await other.load()
    await commit(one, transaction(1, SetState("t", b"1"), SetDue("d", 1)))
    await commit(other, transaction(1, SetState("t", b"2")))
    assert await one.read([ReadStates(("t",)), ReadDue(1)]) == [{"t": b"1"}, [("d", 1)]]
    assert await other.read([ReadStates(("t",)), ReadDue(1)]) == [{"t": b"2"}, []]
    await one.close()
    await other.close()


async def test_reads_are_answered_during_a_commit_and_see_a_finished_one(
    world: World,
) -> None:
    store = world.store()
    await store.load()
    in_flight = store.commit(store.pack(transaction(1, SetState("t", b"1"))))
    assert (await store.read([ReadStates(("t",))]))[0]["t"] in (None, b"1")
    assert list(await in_flight) == []
    assert await store.read([ReadStates(("t",))]) == [{"t": b"1"}]
    await store.close()
