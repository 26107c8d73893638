"""A consumer group of bridges with a real Kafka: what a rebalance repeats, and what it waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from millpond.pipeline.kafka.consumer import GroupConsumer, RecordClaim
from millpond.pipeline.settings import KafkaSettings, Settings
from tests.support.workers import until

PARTITIONS = 4
OF_EACH = 30  # records of a partition


class Member:
    """A member of the group. Of each partition it finishes the first ten records, has ten under way, and lets the rest wait."""

    def __init__(self, bootstrap: str, topic: str, *, stuck: bool = False) -> None:
        settings = Settings(kafka=KafkaSettings(bootstrap_servers=(bootstrap,)))
        self.consumer = GroupConsumer(
            settings, f"{topic}.group", [topic], self._handle, self._settle
        )
        self.waiting: list[tuple[int, RecordClaim]] = []
        self.under_way: list[tuple[int, RecordClaim]] = []
        self.finished: list[int] = []  # values of the records
        self.settled, self._stuck = 0, stuck

    async def _handle(self, record: Any, claim: RecordClaim) -> None:
        value = int(record.value)
        if record.offset < 10:
            self._finish(value, claim)
        else:
            (self.under_way if record.offset < 20 else self.waiting).append((value, claim))

    def _finish(self, value: int, claim: RecordClaim) -> None:
        self.finished.append(value)
        claim.finish()

    async def _settle(self) -> None:
        if self._stuck:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        for value, claim in self.under_way:
            self._finish(value, claim)
        self.under_way.clear()
        self.settled += 1

    def finish_all(self) -> None:
        for value, claim in self.under_way + self.waiting:
            if not claim.is_revoked():
                self._finish(value, claim)
        self.under_way, self.waiting = [], []

    @property
    def has_all(self) -> bool:
        return len(self.finished) + len(self.under_way) + len(self.waiting) >= PARTITIONS * OF_EACH


@contextlib.asynccontextmanager
async def running(*members: Member) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(member.consumer.run()) for member in members]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fill(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, PARTITIONS, 1)])
    await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        for value in range(PARTITIONS * OF_EACH):
            await producer.send_and_wait(topic, b"%d" % value, partition=value % PARTITIONS)


async def until_all(*members: Member) -> list[int]:
    """Wait until the members have finished every record. Returns the values in order, with repeats."""

    def finished() -> list[int]:
        return sorted(value for member in members for value in member.finished)

    async def all_finished() -> bool:
        for member in members:
            member.finish_all()
        return set(finished()) == set(range(PARTITIONS * OF_EACH))

    await until(all_finished, "every record to be finished")
    return finished()


async def test_a_rebalance_repeats_nothing_that_could_be_finished_in_time(
    kafka: str, app_name: str
) -> None:
    topic = f"{app_name}-rebalance"
    await fill(kafka, topic)
    first, second = Member(kafka, topic), Member(kafka, topic)

    async def all_read() -> bool:
        return first.has_all

    async def settled() -> bool:
        return first.settled >= 2  # once before its first assignment

    async with running(first):
        await until(all_read, "all records at the first member")
        waiting = list(first.waiting)  # what is read again after the rebalance is added to it
        async with running(second):
            await until(settled, "the rebalance")
            assert sorted(first.finished) == [
                value for value in range(PARTITIONS * OF_EACH) if value // PARTITIONS < 20
            ]
            assert all(claim.is_revoked() for _, claim in waiting)
            assert await until_all(first, second) == list(range(PARTITIONS * OF_EACH))
            assert second.finished


async def test_what_cannot_be_finished_in_time_is_repeated_and_not_lost(
    kafka: str, app_name: str
) -> None:
    topic = f"{app_name}-stuck"
    await fill(kafka, topic)
    first, second = Member(kafka, topic, stuck=True), Member(kafka, topic)

    async def all_read() -> bool:
        return first.has_all

    async with running(first):
        await until(all_read, "all records at the first member")
        async with running(second):
            finished = await until_all(first, second)
    repeated = {value for value in finished if finished.count(value) > 1}
    assert all(10 <= value // PARTITIONS < 20 for value in repeated)
