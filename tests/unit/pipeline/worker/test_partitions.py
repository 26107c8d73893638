"""The partitions of a worker, in memory: a released partition is finished, committed once, and forgotten."""

from __future__ import annotations

import asyncio

import pytest

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.messages.machine import MessagesMachine
from millpond.agents.ports import Transaction
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.pipeline.stores.memory.server import MemoryServer
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.pipeline.worker.partitions import Partitions
from millpond.schemas import keys
from millpond.schemas.keys import Partition
from tests.support import given

PARTITION_COUNT = 3
RELEASE_TIMEOUT_S = 0.2


class World:
    """Partitions with a log and a store in memory."""

    def __init__(self) -> None:
        self.log = MemoryLog(lambda: 10_000, PARTITION_COUNT)
        self.server = MemoryServer()
        self.ready = 0
        self.failures: list[BaseException] = []
        self.partitions = Partitions(
            self._driver, RELEASE_TIMEOUT_S, self._note_ready, self.failures.append
        )

    def _driver(self, number: int) -> PartitionDriver[Transaction]:
        partition = Partition("millpond", "messages", number)
        store = MemoryStore(partition, self.server)
        rules = given.rules(given.store())
        return PartitionDriver(partition, MessagesMachine(), store, self.log, rules, print)

    def _note_ready(self) -> None:
        self.ready += 1

    async def fill(self, number: int, count: int) -> int:
        """Append events, hand over the whole log of the partition, and return its end."""
        for at in range(count):
            event = given.published(f"m{number}.{at}")
            self.log.append(keys.MESSAGES_TOPIC, number, *given.key_and_value(event))
        records = self.log.records[keys.MESSAGES_TOPIC, number]
        await self.partitions.put(number, records)
        return records[-1].offset + 1

    async def settle(self) -> None:
        """Let all tasks run until they wait."""
        for _ in range(50):
            await asyncio.sleep(0)


async def test_a_released_partition_returns_its_offset_once() -> None:
    world = World()
    world.partitions.assign({0, 1})
    await world.settle()
    assert world.ready == 1
    ends = {number: await world.fill(number, 5) for number in (0, 1)}
    await world.settle()
    assert world.partitions.committable() == ends
    assert await world.partitions.release({0, 2}) == {0: ends[0]}
    assert world.partitions.committable() == {1: ends[1]}
    assert await world.partitions.release({0, 1}) == {1: ends[1]}
    assert world.partitions.committable() == {}


async def test_a_partition_that_is_assigned_again_commits_only_what_it_has_loaded_since() -> None:
    world = World()
    world.partitions.assign({0})
    await world.settle()
    end = await world.fill(0, 5)
    await world.partitions.release({0})
    world.partitions.assign({0})
    assert world.partitions.committable() == {}  # another owner may have continued in between
    await world.settle()
    assert world.partitions.committable() == {0: end}
    await world.partitions.release({0})


async def test_a_failed_partition_is_reported_and_the_others_still_finish() -> None:
    world = World()
    world.partitions.assign({0, 1})
    await world.settle()
    world.log.append(keys.MESSAGES_TOPIC, 0, None, None)
    end = await world.fill(1, 5)
    task = world.partitions._tasks[0]

    async def process(_: object) -> None:
        raise AssertionError("a bug of ours")

    task.driver.process = process  # type: ignore[method-assign,assignment]
    await world.fill(0, 1)
    await world.settle()
    assert [str(failure) for failure in world.failures] == ["a bug of ours"]
    assert (await world.partitions.release({0, 1}))[1] == end


async def test_a_partition_that_is_busy_for_too_long_is_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.partitions.assign({0})
    await world.settle()

    async def process(_: object) -> None:
        await asyncio.Event().wait()

    world.partitions._tasks[0].driver.process = process  # type: ignore[method-assign,assignment]
    await world.fill(0, 1)
    await world.settle()
    await asyncio.wait_for(world.partitions.release({0}), 10 * RELEASE_TIMEOUT_S)
    assert "still busy" in caplog.text
    assert world.partitions.committable() == {}
