"""A Redis Cluster whose shards fail over to a replica that lacks the last writes: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.effects import DeleteBody, RunCommand, SetState, Unindex
from millpond.agents.messages.machine import MessagesMachine
from millpond.agents.ports import Transaction
from millpond.agents.reads import ReadBody, ReadIndex
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.pipeline.stores.redis.cluster_check import cluster_weaknesses
from millpond.pipeline.stores.redis.cluster_store import ClusterStore
from millpond.pipeline.stores.redis.connection import Access, Address
from millpond.schemas import keys
from millpond.schemas.errors import StoreDown
from millpond.schemas.rules.pool import Pool
from tests.contracts.store_worlds import PARTITION, applied, commit, kept, transaction
from tests.support import given
from tests.support.redis_servers import Shard, replicated_cluster

ACCESS = Access(reply_timeout_s=1.0)


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[list[Shard]]:
    """Three primaries with one replica each."""
    with replicated_cluster(tmp_path) as found:
        yield found


def store_of(shards: list[Shard]) -> ClusterStore:
    seeds = [
        Address("127.0.0.1", node.port) for each in shards for node in (each.primary, each.replica)
    ]
    return ClusterStore(PARTITION, seeds, ACCESS)


def shard_of(shards: list[Shard], key: str) -> Shard:
    slots = shards[0].primary.client.execute_command("CLUSTER SLOTS")
    slot = key_slot(key.encode())
    (port,) = [node[1] for first, last, node, *_ in slots if first <= slot <= last]
    return next(each for each in shards if each.primary.port == port)


def foreign_topic(shards: list[Shard]) -> str:
    """Return a topic whose index is not in the shard of the fence."""
    home = shard_of(shards, keys.applied(PARTITION))
    names = (f"t{number}" for number in range(100))
    return next(name for name in names if shard_of(shards, keys.message_index(name)) is not home)


async def again(store: ClusterStore, sent: Transaction) -> None:
    """Do what a driver does after an error: load, and send again what the store does not have."""
    async with asyncio.timeout(30):
        while (await store.load()).applied != sent.applied:
            try:
                await commit(store, sent)
            except StoreDown:
                continue
            return


async def test_what_a_replica_does_not_have_is_not_acknowledged(shards: list[Shard]) -> None:
    store, topic = store_of(shards), foreign_topic(shards)
    shard = shard_of(shards, keys.message_index(topic))
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", topic)))
    shard.cut()
    second = transaction(2, kept(2, "m2", topic))
    for _ in range(2):
        # The second try repeats what the primary has already. Its replica still does not have it.
        with pytest.raises(StoreDown, match="CLUSTER FORGET"):
            await commit(store, second)
        assert (await store.load()).applied == applied(1)
    shard.fail_over()
    await again(store, second)
    assert await store.read([ReadIndex(topic, 5)]) == [[("m1", 1_000_001), ("m2", 1_000_002)]]
    assert all(await store.read([ReadBody("m1"), ReadBody("m2")]))
    await store.close()


async def test_a_repeat_that_changes_nothing_waits_for_what_it_repeats(
    shards: list[Shard],
) -> None:
    store, topic = store_of(shards), foreign_topic(shards)
    shard = shard_of(shards, keys.message_index(topic))
    # Only the index entry is in the shard whose replica hangs.
    names = (f"m{number}" for number in range(100))
    message = next(name for name in names if shard_of(shards, keys.message_body(name)) is not shard)
    await store.load()
    await commit(store, transaction(1, SetState("t", b"s")))
    shard.replica.pause()
    sent = transaction(2, kept(2, message, topic))
    for _ in range(2):
        with pytest.raises(StoreDown, match="no replica"):
            await commit(store, sent)
        assert (await store.load()).applied == applied(1)
    shard.replica.resume()
    await again(store, sent)
    assert await store.read([ReadIndex(topic, 5)]) == [[(message, 1_000_002)]]
    await store.close()


async def test_a_removal_that_a_failover_loses_is_done_again(shards: list[Shard]) -> None:
    store, topic = store_of(shards), foreign_topic(shards)
    shard = shard_of(shards, keys.message_index(topic))
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", topic)))
    shard.cut()
    removal = transaction(2, Unindex(2, topic, ("m1",)), DeleteBody("m1"))
    with pytest.raises(StoreDown):
        await commit(store, removal)
    shard.fail_over()
    await again(store, removal)
    assert await store.read([ReadIndex(topic, 5), ReadBody("m1")]) == [[], {}]
    await store.close()


async def test_nothing_is_removed_and_no_command_runs_before_a_replica_has_the_fence(
    shards: list[Shard],
) -> None:
    store, topic = store_of(shards), foreign_topic(shards)
    home = shard_of(shards, keys.applied(PARTITION))
    other = shard_of(shards, keys.message_index(topic))
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", topic)))
    home.cut()
    # The key of the counter is in the shard of the topic's index.
    count = RunCommand(2, (b"INCR", f"count:{{{keys.message_index(topic)}}}".encode()))
    removal = transaction(2, SetState("t", b"s"), Unindex(2, topic, ("m1",)), count)
    with pytest.raises(StoreDown):
        await commit(store, removal)
    home.fail_over()
    assert (await store.load()).applied == applied(1)
    assert await store.read([ReadIndex(topic, 5)]) == [[("m1", 1_000_001)]]
    await commit(store, removal)
    assert other.primary.client.get(count.arguments[1]) == b"1"
    await store.close()


async def test_a_shard_without_replicas_is_named_at_start(
    shards: list[Shard], three_nodes: list[object]
) -> None:
    def pool(port: int) -> Pool:
        return Pool(name="p", type="cluster", servers=(("127.0.0.1", port),))

    assert await cluster_weaknesses(pool(shards[0].primary.port)) == []
    shards[0].fail_over()
    (weakness,) = await cluster_weaknesses(pool(shards[1].primary.port))
    assert f"127.0.0.1:{shards[0].replica.port} " in weakness
    assert str(shards[1].primary.port) not in weakness


async def test_messages_survive_shards_that_fail_over_one_after_the_other(
    shards: list[Shard],
) -> None:
    log, notices = MemoryLog(lambda: 10_000), list[str]()
    topics = [f"t/{number}" for number in range(20)]
    store = store_of(shards)
    rules = given.rules(given.store())
    driver = PartitionDriver(PARTITION, MessagesMachine(), store, log, rules, notices.append)
    await driver.start()
    stored = 0
    for shard in shards:
        for lagging in (False, True):
            if lagging:
                shard.cut()
            for _ in range(200):
                event = given.published(f"m{stored}", topics[stored % len(topics)])
                log.append(PARTITION.topic, PARTITION.number, *given.key_and_value(event))
                stored += 1
            records = log.records[PARTITION.topic, PARTITION.number]
            working = asyncio.ensure_future(driver.process(records[driver.next_offset :]))
            await asyncio.wait((working,), timeout=2)
            if lagging:
                shard.fail_over()
            async with asyncio.timeout(30):
                await working
    async with asyncio.timeout(30):
        await driver.maintain()
    found = await store.read([ReadIndex(topic, stored) for topic in topics])
    indexed = {message_id for entries in found for message_id, _ in entries}
    missing = {f"m{number}" for number in range(stored)} - indexed
    assert not missing
    assert all(await store.read([ReadBody(f"m{number}") for number in range(stored)]))
    await driver.close()
