"""A `StoreReader` returns the content of the store, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from millpond.agents.effects import (
    DeleteBody,
    KeepReceipt,
    SetDue,
    SetRules,
    SetState,
    StoreMessage,
)
from millpond.agents.reads import ReadAllStates, ReadStates
from millpond.pipeline.stack.ports import free_port
from millpond.pipeline.stores.redis.inspection import (
    CountBefore,
    CountBetween,
    CountIndex,
    InspectionRead,
    ReadFence,
    ReadLifetime,
    ReadReceipt,
    ReadRules,
    ScanDue,
)
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.errors import StoreDown
from millpond.schemas.rules.pool import Pool
from tests.contracts.store_worlds import PARTITION, ClusterWorld, RedisWorld, commit, transaction
from tests.support import given


def pool_of(world: RedisWorld) -> Pool:
    """Return the pool of this store, as a configuration names it."""
    seeds = world.seeds if isinstance(world, ClusterWorld) else [world.address]
    kind = "cluster" if isinstance(world, ClusterWorld) else "single"
    servers = tuple((seed.host, seed.port) for seed in seeds)
    return Pool(name="p", type=kind, servers=servers)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", ["redis", "cluster"], indirect=True)
async def test_reading_states_changes_nothing(world: RedisWorld) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, SetState("a", b"1"), SetState("b", b"2"), DeleteBody("m")))
    before = world.dump()
    async with StoreReader(pool_of(world)) as reader:
        assert await reader.read(
            PARTITION, [ReadStates(("a", "c")), ReadAllStates(0), ReadStates(())]
        ) == [{"a": b"1", "c": None}, (0, {"a": b"1", "b": b"2"}), {}]
    assert world.dump() == before
    # A reader does not fence the owner.
    await commit(store, transaction(2))
    await store.close()


async def test_a_server_that_is_down_is_reported_at_once(tmp_path: Path) -> None:
    down = Pool(name="p", servers=(("127.0.0.1", free_port()),))
    with pytest.raises(StoreDown):
        async with StoreReader(down):
            pass


@pytest.mark.parametrize("world", ["redis", "cluster"], indirect=True)
async def test_counts_positions_receipts_and_the_fence_are_read(world: RedisWorld) -> None:
    store = world.store()
    await store.load()
    messages = [
        StoreMessage(at, given.published(f"m{at}", "t[*]"), at * 10, True, None) for at in (1, 2, 3)
    ]
    receipt = KeepReceipt(4, "m1", "acked", "sub", 7, 2**50)
    dues = [SetDue(name, 1_000) for name in ("index\0a*", "index\0b", "window\0index\0c")]
    last = transaction(1, *messages, receipt, SetRules("[]"), *dues)
    await commit(store, last)
    async with StoreReader(pool_of(world)) as reader:
        reads: list[InspectionRead] = [
            ReadFence(), ReadRules(), CountIndex("t[*]"), CountIndex("none"),
            CountBefore("t[*]", "m2"), CountBefore("t[*]", "none"), CountBetween("t[*]", 10, 30),
            CountBetween("t[*]", 10, 29), ReadReceipt("m1"), ReadReceipt("none"),
            ReadLifetime("m1"), ReadLifetime("none"),
        ]  # fmt: skip
        assert await reader.read(PARTITION, reads) == [
            last.applied, "[]", 3, 0, 1, None, 2, 1, {"acked:sub": 7}, {}, None, None,
        ]  # fmt: skip
        ((cursor, names),) = await reader.read(PARTITION, [ScanDue(0, "index\0")])
        assert (cursor, sorted(names)) == (0, ["index\0a*", "index\0b"])
        ((cursor, names),) = await reader.read(PARTITION, [ScanDue(0, "index\0a*")])
        assert names == ["index\0a*"]
        assert reader.foreign_keys == {}
        # A public key of another type counts as empty, like a missing one, and the reader names it.
        world.put("mqtt:msg:text", b"x")
        world.put("mqtt:receipt:text", b"x")
        public: list[InspectionRead] = [
            CountIndex("text"),
            CountBefore("text", "m"),
            CountBetween("text", 0, 9),
            ReadReceipt("text"),
        ]
        assert await reader.read(PARTITION, public) == [0, None, 0, {}]
        assert list(reader.foreign_keys) == ["mqtt:msg:text", "mqtt:receipt:text"]
        assert "WRONGTYPE" in reader.foreign_keys["mqtt:msg:text"]
        other = PARTITION._replace(number=99)
        assert await reader.read(other, [ReadFence(), ReadRules()]) == [None, None]
    await store.close()
