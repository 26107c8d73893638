"""What is read from outside is what the store holds, and nothing is changed by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.effects import DropBody, SetState
from agents.ports import ReadAllStates, ReadStates
from pipeline.stack.ports import free_port
from pipeline.stores.reader import Reader
from schemas.errors import StoreDown
from schemas.pool import Pool
from tests.contracts.store_worlds import (
    PARTITION,
    ClusterWorld,
    RedisWorld,
    commit,
    transaction,
)


def pool_of(world: RedisWorld) -> Pool:
    """How a rule file names this world."""
    seeds = world.seeds if isinstance(world, ClusterWorld) else [world.address]
    kind = "cluster" if isinstance(world, ClusterWorld) else "single"
    servers = tuple((seed.host, seed.port) for seed in seeds)
    return Pool(name="p", type=kind, servers=servers)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", ["redis", "cluster"], indirect=True)
async def test_states_are_read_and_left_as_they_are(world: RedisWorld) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, SetState("a", b"1"), SetState("b", b"2"), DropBody("m")))
    before = world.dump()
    async with Reader(pool_of(world)) as reader:
        assert await reader.read(
            PARTITION, [ReadStates(("a", "c")), ReadAllStates(0), ReadStates(())]
        ) == [{"a": b"1", "c": None}, (0, {"a": b"1", "b": b"2"}), {}]
    assert world.dump() == before
    await commit(store, transaction(2))  # nobody came in between
    await store.close()


async def test_a_server_that_is_away_is_told_at_once(tmp_path: Path) -> None:
    away = Pool(name="p", servers=(("127.0.0.1", free_port()),))
    with pytest.raises(StoreDown):
        async with Reader(away):
            pass
