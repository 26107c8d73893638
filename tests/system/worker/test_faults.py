"""Faults of workers, Redis and Kafka, with real servers: no message is lost, and none is applied twice.

A rule `INCR seen:${msgid}` counts how often each message was applied. After every fault each counter must be 1.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from millpond.schemas import keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import MessagePublished
from tests.support import given
from tests.support.replays import check_replay
from tests.support.servers import Server, pause
from tests.support.workers import PARTITIONS, Pipeline, Worker, running, until

TOPICS = 20
COUNTED = (given.store(), given.command("INCR seen:${msgid}"))


def messages(first: int, count: int) -> list[MessagePublished]:
    return [
        given.published(f"m{number}", f"t/{number % TOPICS}")
        for number in range(first, first + count)
    ]


async def counted(pipeline: Pipeline, count: int) -> dict[bytes, int]:
    """How often each message was applied."""
    names = [f"seen:m{number}" for number in range(count)]
    values = await pipeline.redis.mget(names)
    return {name.encode(): int(value) for name, value in zip(names, values, strict=True) if value}


async def all_applied_once(pipeline: Pipeline, count: int) -> None:
    """Wait until every message is counted, stored and indexed, and check that each is so exactly once."""

    async def all_there() -> bool:
        return len(await counted(pipeline, count)) == count

    await until(all_there, f"{count} messages to be applied")
    assert set((await counted(pipeline, count)).values()) == {1}
    indexed: list[bytes] = []
    for number in range(TOPICS):
        entries: Any = await pipeline.redis.zrange(keys.message_index(f"t/{number}"), 0, -1)
        assert entries == sorted(entries, key=lambda entry: int(entry[1:]))
        indexed += entries
    assert len(indexed) == len(set(indexed)) == count
    async with pipeline.redis.pipeline(transaction=False) as bodies:
        for entry in indexed:
            bodies.exists(keys.message_body(entry.decode()))
        assert all(await bodies.execute())


async def some_applied(pipeline: Pipeline, count: int) -> None:
    """Wait until the worker has applied a part of the messages."""

    async def some() -> bool:
        return bool(await counted(pipeline, count))

    await until(some, "some messages to be applied")


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(*COUNTED, batch_records_max=50)
        yield started


async def kill(worker: Worker) -> None:
    worker.signal(signal.SIGKILL)
    await worker.ended()


async def test_a_worker_killed_again_and_again_applies_everything_once(pipeline: Pipeline) -> None:
    count = 20_000
    await pipeline.publish(messages(0, count))
    for _ in range(4):
        worker = await pipeline.worker()
        await some_applied(pipeline, count)
        await kill(worker)
    await pipeline.worker()
    await all_applied_once(pipeline, count)


async def test_a_worker_that_is_asked_to_stop_finishes_its_batch_and_its_successor_continues(
    pipeline: Pipeline,
) -> None:
    count = 20_000
    await pipeline.publish(messages(0, count))
    worker = await pipeline.worker()
    await some_applied(pipeline, count)
    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0
    await pipeline.worker()
    await all_applied_once(pipeline, count)


async def test_workers_that_join_and_leave_share_the_work_without_repeating_it(
    pipeline: Pipeline,
) -> None:
    first = await pipeline.worker()
    publishing = asyncio.create_task(slowly(pipeline, 6_000))
    second = await pipeline.worker()
    third = await pipeline.worker()
    first.signal(signal.SIGTERM)
    assert await first.ended() == 0
    await kill(second)
    await publishing
    await all_applied_once(pipeline, 6_000)
    assert third.process.poll() is None


async def slowly(pipeline: Pipeline, count: int) -> None:
    for first in range(0, count, 50):
        await pipeline.publish(messages(first, 50))
        await asyncio.sleep(0.05)


async def test_a_paused_worker_that_wakes_after_its_successor_wrote_writes_nothing(
    pipeline: Pipeline,
) -> None:
    count = 4_000
    paused = await pipeline.worker()
    await pipeline.publish(messages(0, count // 2))
    await some_applied(pipeline, count)
    await asyncio.to_thread(pause, paused.process)
    successor = await pipeline.worker()
    await pipeline.publish(messages(count // 2, count // 2))
    await all_applied_once(pipeline, count)
    paused.signal(signal.SIGCONT)
    await pipeline.publish(messages(count, 1_000))
    await all_applied_once(pipeline, count + 1_000)
    assert successor.process.poll() is None


async def test_a_restart_of_redis_loses_and_repeats_nothing(
    app_name: str, kafka: str, own_redis: Server, tmp_path: Path
) -> None:
    count = 6_000
    async with running(app_name, kafka, own_redis.address, tmp_path) as pipeline:
        pipeline.configure(*COUNTED, batch_records_max=50)
        await pipeline.worker()
        publishing = asyncio.create_task(slowly(pipeline, count))
        for _ in range(2):
            await some_applied(pipeline, count)
            await asyncio.to_thread(own_redis.kill)
            await asyncio.to_thread(own_redis.start)
        await publishing
        await all_applied_once(pipeline, count)


async def test_a_worker_waits_for_a_redis_that_does_not_answer(
    app_name: str, kafka: str, own_redis: Server, tmp_path: Path
) -> None:
    async with running(app_name, kafka, own_redis.address, tmp_path) as pipeline:
        pipeline.configure(*COUNTED, batch_records_max=50)
        worker = await pipeline.worker()
        own_redis.pause()
        await pipeline.publish(messages(0, 2_000))
        await asyncio.sleep(15)  # longer than the time-out of a reply: this is the fault itself
        own_redis.resume()
        await all_applied_once(pipeline, 2_000)
        assert worker.process.poll() is None


async def test_a_worker_that_starts_while_redis_is_down_waits_for_it(
    app_name: str, kafka: str, own_redis: Server, tmp_path: Path
) -> None:
    async with running(app_name, kafka, own_redis.address, tmp_path) as pipeline:
        pipeline.configure(*COUNTED, batch_records_max=50)
        await pipeline.publish(messages(0, 1_000))
        await asyncio.to_thread(own_redis.kill)
        starting = asyncio.create_task(pipeline.worker())
        await asyncio.sleep(8)  # longer than a worker takes to start: this is the fault itself
        (worker,) = pipeline.workers
        assert worker.process.poll() is None
        assert worker.log.read_text().count("the store is down") == 1
        await asyncio.to_thread(own_redis.start)
        await starting
        await all_applied_once(pipeline, 1_000)
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0


async def test_a_worker_that_is_asked_to_stop_while_it_waits_for_redis_ends(
    app_name: str, kafka: str, own_redis: Server, tmp_path: Path
) -> None:
    async with running(app_name, kafka, own_redis.address, tmp_path) as pipeline:
        config = pipeline.configure(*COUNTED)
        await asyncio.to_thread(own_redis.kill)
        worker = Worker(config, tmp_path / "waiting.log")

        async def waiting() -> bool:
            return "the store is down" in worker.log.read_text()

        await until(waiting, "the worker to wait for Redis")
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
        pipeline.replays_as_live = False
        await asyncio.to_thread(own_redis.start)


async def test_redis_emptied_under_a_running_worker_is_rebuilt_from_the_log(
    pipeline: Pipeline,
) -> None:
    await pipeline.worker()
    await pipeline.publish(messages(0, 3_000))
    await all_applied_once(pipeline, 3_000)
    await pipeline.redis.flushall()
    await all_applied_once(pipeline, 3_000)
    await pipeline.publish(messages(3_000, 100))
    await all_applied_once(pipeline, 3_100)


async def test_all_partitions_of_an_emptied_redis_are_rebuilt_although_nothing_is_published(
    pipeline: Pipeline,
) -> None:
    await pipeline.worker()
    await pipeline.publish(messages(0, 200))
    await all_applied_once(pipeline, 200)
    fences = await pipeline.redis.keys("*:applied")
    assert len(fences) == PARTITIONS
    await pipeline.redis.flushall()

    async def rebuilt() -> bool:
        return bool(await pipeline.redis.exists(*fences) == PARTITIONS)

    await until(rebuilt, "the fences of all partitions")
    await all_applied_once(pipeline, 200)
    await pipeline.publish(messages(200, 20))
    await all_applied_once(pipeline, 220)


async def test_a_worker_waits_for_a_kafka_that_is_down(
    app_name: str, own_kafka: Server, redis_server: str, tmp_path: Path
) -> None:
    async with running(app_name, own_kafka.address, redis_server, tmp_path) as pipeline:
        pipeline.configure(*COUNTED, batch_records_max=50)
        worker = await pipeline.worker()
        await pipeline.publish(messages(0, 1_000))
        await some_applied(pipeline, 1_000)
        await asyncio.to_thread(own_kafka.kill)
        await asyncio.sleep(10)  # longer than a session: this is the fault itself
        await asyncio.to_thread(own_kafka.start)
        await pipeline.publish(messages(1_000, 1_000))
        await all_applied_once(pipeline, 2_000)
        assert worker.process.poll() is None


async def test_a_worker_refuses_a_topic_that_was_created_again(pipeline: Pipeline) -> None:
    worker = await pipeline.worker()
    await pipeline.publish(messages(0, 1_000))
    await all_applied_once(pipeline, 1_000)
    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0
    admin = AIOKafkaAdminClient(bootstrap_servers=pipeline.bootstrap)
    await admin.start()
    await admin.delete_topics([keys.MESSAGES_TOPIC])

    async def gone() -> bool:
        return keys.MESSAGES_TOPIC not in await admin.list_topics()

    await until(gone, "the old topic to be gone")
    config = {"message.timestamp.type": "LogAppendTime"}
    await admin.create_topics([NewTopic(keys.MESSAGES_TOPIC, 4, 1, topic_configs=config)])
    await admin.close()
    refused = Worker(tmp_config(pipeline), pipeline.directory / "refused.log")
    pipeline.workers.append(refused)
    assert await refused.ended() == 1
    log = refused.log.read_text()
    assert "was the topic deleted and created again?" in log
    assert keys.MESSAGES_TOPIC in log
    assert "Traceback" not in log
    # A replay refuses the topic, too.
    pipeline.replays_as_live = False
    with pytest.raises(MillpondError, match="was the topic deleted and created again"):
        await check_replay(tmp_config(pipeline), pipeline.redis_url)


def tmp_config(pipeline: Pipeline) -> Path:
    return pipeline.directory / "millpond.toml"
