"""The contract of a log, for Kafka and for the log in memory: what the driver may rely on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from millpond.agents.ports import LogBounds, OutgoingRecord, Record
from millpond.schemas import keys
from millpond.schemas.keys import Partition
from tests.contracts.log_worlds import (
    PARTITION_COUNT,
    RUN_RECORDS_MAX,
    ConsumedRecord,
    KafkaWorld,
    MemoryWorld,
    World,
)

TWELVE = [b"%d" % number for number in range(12)]


@pytest.fixture(params=["kafka", "memory"])
async def world(
    request: pytest.FixtureRequest, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    # A topic for each test, because deleting one takes Kafka a while.
    topic = f"log-{app_name}"
    monkeypatch.setitem(keys.SOURCE_TOPIC, "messages", topic)
    if request.param == "memory":
        yield MemoryWorld(app_name)
        return
    world = KafkaWorld(app_name, request.getfixturevalue("kafka"), topic)
    await world.start()
    yield world
    await world.stop()


@pytest.fixture
def first(world: World) -> Partition:
    return Partition(world.app, "messages", 0)


@pytest.fixture
def second(world: World) -> Partition:
    return Partition(world.app, "messages", 1)


async def read(world: World, partition: Partition, start: int, stop: int) -> list[Record]:
    """Read a range, and check the size of its runs."""
    runs = [run async for run in world.log.read(partition, start, stop)]
    assert all(1 <= len(run) <= RUN_RECORDS_MAX for run in runs)
    return [record for run in runs for record in run]


async def offsets(world: World, partition: Partition, start: int, stop: int) -> list[int]:
    return [record.offset for record in await read(world, partition, start, stop)]


async def test_bounds_have_cluster_partition_count_start_end_and_committed_offset(
    world: World, first: Partition, second: Partition
) -> None:
    fresh = await world.log.bounds(first)
    assert fresh == LogBounds(fresh.cluster_id, PARTITION_COUNT, 0, 0, None)
    assert fresh.cluster_id
    await world.append(first, TWELVE)
    assert await world.log.bounds(first) == fresh._replace(end=12)
    await world.commit(first, 7)
    assert await world.log.bounds(first) == fresh._replace(end=12, committed=7)
    await world.forget(first, 5)
    assert await world.log.bounds(first) == fresh._replace(start=5, end=12, committed=7)
    await world.forget(first, 3)
    assert await world.log.bounds(first) == fresh._replace(start=5, end=12, committed=7)
    await world.forget(first, 12)
    assert await world.log.bounds(first) == fresh._replace(start=12, end=12, committed=7)
    await world.append(first, [b"next"])
    assert await world.log.bounds(first) == fresh._replace(start=12, end=13, committed=7)
    assert await world.log.bounds(second) == fresh


async def test_a_range_is_read_completely_and_in_order_without_its_end(
    world: World, first: Partition
) -> None:
    await world.append(first, TWELVE)
    records = await read(world, first, 0, 12)
    assert [record.value for record in records] == TWELVE
    assert [record.offset for record in records] == list(range(12))
    assert {record.key for record in records} == {b"key"}
    assert await offsets(world, first, 3, 8) == [3, 4, 5, 6, 7]
    assert await offsets(world, first, 11, 12) == [11]
    assert await offsets(world, first, 4, 4) == []


async def test_records_that_retention_deleted_are_skipped(world: World, first: Partition) -> None:
    await world.append(first, TWELVE)
    await world.forget(first, 9)
    assert await offsets(world, first, 0, 12) == [9, 10, 11]
    assert await offsets(world, first, 2, 9) == []
    await world.forget(first, 12)
    assert await offsets(world, first, 0, 12) == []


async def test_offsets_without_a_record_are_skipped(world: World, first: Partition) -> None:
    await world.append_and_leave_a_hole(first, [b"a", b"b", b"c"])
    await world.append(first, TWELVE)
    assert await offsets(world, first, 0, 8) == [0, 1, 2, 4, 5, 6, 7]
    assert await offsets(world, first, 2, 4) == [2]
    assert await offsets(world, first, 3, 4) == []


async def test_two_partitions_can_be_read_in_turn(
    world: World, first: Partition, second: Partition
) -> None:
    await world.append(first, TWELVE)
    await world.append(second, TWELVE[::-1])
    reading = world.log.read(first, 0, 12), world.log.read(second, 0, 12)
    values: tuple[list[bytes | None], ...] = [], []
    for _ in range(2):
        for run, read_so_far in zip(reading, values, strict=True):
            read_so_far += [record.value for record in await anext(run)]
    for run, read_so_far in zip(reading, values, strict=True):
        async for records in run:
            read_so_far += [record.value for record in records]
    assert values == (TWELVE, TWELVE[::-1])


async def test_all_partitions_can_be_read_at_the_same_time(world: World) -> None:
    partitions = [Partition(world.app, "messages", number) for number in range(PARTITION_COUNT)]
    values = [[b"%d.%d" % (number, at) for at in range(12)] for number in range(PARTITION_COUNT)]
    for partition, appended in zip(partitions, values, strict=True):
        await world.append(partition, appended)
    for start, stop in ((0, 3), (0, 12), (0, 7), (7, 12), (3, 4)):
        found = await asyncio.gather(*(read(world, each, start, stop) for each in partitions))
        assert [[record.value for record in records] for records in found] == [
            appended[start:stop] for appended in values
        ]
        # After the end of the ranges no partition is fetched.
        assert world.fetching == set()


async def test_a_range_is_read_on_although_retention_deletes_its_rest_meanwhile(
    world: World, first: Partition
) -> None:
    await world.append(first, TWELVE)
    runs = world.log.read(first, 0, 12)
    assert [record.offset for record in await anext(runs)] == [0, 1, 2, 3, 4]
    await world.forget(first, 12)
    await world.append(first, [b"next"])
    # A log may have fetched a part of the rest before.
    rest = [record.offset async for run in runs for record in run]
    assert rest == list(range(5, 5 + len(rest)))
    assert await offsets(world, first, 0, 13) == [12]


async def test_the_timestamp_of_a_record_is_its_append_time(world: World, first: Partition) -> None:
    begin_ms = int(time.time() * 1_000)
    for value in TWELVE[:3]:
        await world.append(first, [value])
    await world.log.produce([OutgoingRecord(first.topic, b"k", b"v", partition=0)])
    times = [record.timestamp for record in await read(world, first, 0, 4)]
    assert times == sorted(times)
    assert begin_ms <= times[0]
    assert times[-1] <= time.time() * 1_000


async def test_a_produced_record_is_unchanged_and_in_the_named_partition(
    world: World, first: Partition
) -> None:
    headers = (("reason", b"\xff\x00"), ("reason", b"twice"), ("empty", b""))
    await world.log.produce([
        OutgoingRecord(first.topic, b"k", b"v", headers, 2),
        OutgoingRecord(first.topic, None, b"no key", (), 2),
        OutgoingRecord(first.topic, b"no value", None, (), 2),
    ])  # fmt: skip
    assert await world.consume(first.topic) == [
        [], [],
        [ConsumedRecord(b"k", b"v", headers), ConsumedRecord(None, b"no key", ()), ConsumedRecord(b"no value", None, ())],
    ]  # fmt: skip


async def test_a_record_with_neither_key_nor_value_can_be_produced(
    world: World, first: Partition
) -> None:
    # The dead letter of an empty or deleted record has only headers.
    await world.log.produce([OutgoingRecord(first.topic, None, None, (("reason", b"r"),), 1)])
    (dead_letter,) = (await world.consume(first.topic))[1]
    assert not dead_letter.key
    assert not dead_letter.value
    assert dead_letter.headers == (("reason", b"r"),)


async def test_without_a_named_partition_the_key_decides(world: World, first: Partition) -> None:
    names = [b"key %d" % number for number in range(30)]
    await world.log.produce([
        OutgoingRecord(first.topic, name, b"%s, %d" % (name, turn)) for turn in range(3) for name in names
    ])  # fmt: skip
    partitions = await world.consume(first.topic)
    assert all(partitions)
    for name in names:
        (found,) = [
            values
            for records in partitions
            if (values := [record.value for record in records if record.key == name])
        ]
        assert found == [b"%s, %d" % (name, turn) for turn in range(3)]


async def test_concurrent_batches_are_produced_in_the_order_of_their_calls(
    world: World, first: Partition
) -> None:
    # Far more than the producer's buffer holds. A small record could overtake a large one that waits for room.
    sizes = [200_000, 100] * 5
    batches = [
        [b"%d.%d " % (batch, at) + b"x" * size for at in range(4)]
        for batch, size in enumerate(sizes)
    ]
    acknowledgements = [
        world.log.produce([OutgoingRecord(first.topic, b"k", value, (), 0) for value in batch])
        for batch in batches
    ]
    for acknowledged in acknowledgements:
        await acknowledged
        await acknowledged  # a second time is allowed
    records = (await world.consume(first.topic))[0]
    labels = [(record.value or b"").partition(b" ")[0].decode() for record in records]
    assert labels == [f"{batch}.{at}" for batch in range(10) for at in range(4)]
