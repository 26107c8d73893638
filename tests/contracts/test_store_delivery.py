"""Every store, for delivery agents: tables of states, private indexes, places in a topic's index."""

from __future__ import annotations

from millpond.agents.effects import ClearBodyExpiry, Reindex, SetIndex, SetState, Table, Unindex
from millpond.agents.reads import (
    ReadAllStates,
    ReadBelow,
    ReadEntry,
    ReadIndex,
    ReadNames,
    ReadStates,
)
from millpond.pipeline.stores.redis.packing import BODY_GRACE_MS
from millpond.schemas import keys
from tests.contracts.store_worlds import FAR_MS, PARTITION, World, commit, kept, transaction


async def test_a_message_returns_to_its_index(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", "t", expires_at=FAR_MS), kept(2, "m2", "t")))
    await commit(store, transaction(2, Unindex(3, "t", ("m1",)), ClearBodyExpiry("m1")))
    assert world.dump()[keys.message_body("m1")].expires_at is None
    again = Reindex(4, "t", "m1", 1_000_009, FAR_MS + 5)
    forever = Reindex(4, "t", "m3", 1_000_010, None)
    assert await commit(store, transaction(3, again, forever)) == []
    assert await store.read([ReadIndex("t", 9)]) == [
        [("m2", 1_000_002), ("m1", 1_000_009), ("m3", 1_000_010)]
    ]
    assert world.dump()[keys.message_body("m1")].expires_at == FAR_MS + 5 + BODY_GRACE_MS
    world.put(keys.message_index("foreign"), b"foreign")
    refused = await commit(store, transaction(4, Reindex(5, "foreign", "m2", 7, None)))
    assert [(each.offset, each.part) for each in refused] == [(5, "index")]
    await store.close()


async def test_each_table_of_states_has_its_own_keys(world: World) -> None:
    store = world.store()
    await store.load()
    tables: tuple[Table, ...] = ("states", "windows", "members", "dead")
    await commit(store, transaction(1, *(SetState("k", name.encode(), name) for name in tables)))
    assert await store.read([ReadStates(("k", "x"), name) for name in tables]) == [
        {"k": name.encode(), "x": None} for name in tables
    ]
    await commit(store, transaction(2, SetState("k", None, "windows"), SetState("l", b"2", "dead")))
    found = await store.read([ReadAllStates(0, name) for name in tables])
    assert found == [
        (0, {"k": b"states"}), (0, {}), (0, {"k": b"members"}), (0, {"k": b"dead", "l": b"2"}),
    ]  # fmt: skip
    await store.close()


async def test_an_index_is_read_above_a_score_and_by_message(world: World) -> None:
    store = world.store()
    await store.load()
    far = 1_700_000_000_000_000  # µs since the epoch: scores must not be rounded
    entries = [kept(offset, f"m{offset}", "t") for offset in (far, far + 1, far + 2)]
    await commit(store, transaction(1, *entries))
    above, none, everything = await store.read(
        [
            ReadIndex("t", 5, 1_000_000 + far), ReadIndex("t", 5, 1_000_002 + far), ReadIndex("t", 2),
        ]
    )  # fmt: skip
    assert above == [(f"m{far + 1}", 1_000_001 + far), (f"m{far + 2}", 1_000_002 + far)]
    assert none == []
    assert everything == [(f"m{far}", 1_000_000 + far), (f"m{far + 1}", 1_000_001 + far)]
    assert await store.read(
        [ReadEntry("t", f"m{far + 1}"), ReadEntry("t", "m9"), ReadEntry("nowhere", "m9")]
    ) == [1_000_001 + far, None, None]
    world.put(keys.message_index("foreign"), b"foreign")
    assert await store.read([ReadEntry("foreign", "m"), ReadIndex("foreign", 5, 1)]) == [None, []]
    await store.close()


async def test_names_of_a_private_index_are_read_by_prefix_and_above_a_name(
    world: World,
) -> None:
    store = world.store()
    await store.load()
    names = ("queue/a", "queue/a/x", "queue/b", "queue/é", "other", "queue/c")
    placed = [SetIndex("waiting", name, 0) for name in names]
    removed = SetIndex("waiting", "queue/c", None)
    added_again = (SetIndex("waiting", "other", None), SetIndex("waiting", "other", 0))
    await commit(store, transaction(1, *placed, removed, *added_again))
    reads = [
        ReadNames(None, "waiting", "", "", 9),
        ReadNames(None, "waiting", "queue/", "", 2),
        ReadNames(None, "waiting", "queue/", "queue/a/x", 9),
        ReadNames(None, "waiting", "queue/a", "queue/b", 9),
        ReadNames(PARTITION, "waiting", "", "queue/b", 9),
        ReadNames(None, "nothing", "", "", 9),
    ]
    assert await store.read(reads) == [
        ["other", "queue/a", "queue/a/x", "queue/b", "queue/é"],
        ["queue/a", "queue/a/x"],
        ["queue/b", "queue/é"],
        [],
        ["queue/é"],
        [],
    ]
    await store.close()


async def test_the_last_score_of_a_batch_counts(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, SetIndex("work", "c", 1)))
    moved = (SetIndex("work", "c", None), SetIndex("work", "c", 5), SetIndex("work", "d", 4))
    await commit(store, transaction(2, *moved, SetIndex("work", "d", None)))
    assert await store.read([ReadBelow("work", 9, 5)]) == [[("c", 5)]]
    await store.close()
