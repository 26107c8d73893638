"""The end of a worker process: it comes soon, after any failure, and with all possible offsets committed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from millpond.schemas import keys
from millpond.schemas.keys import Partition
from tests.support import given
from tests.support.servers import Server
from tests.support.workers import PARTITIONS, Pipeline, running, until

SESSION_TIMEOUT_S = 6  # as `Pipeline.configure` sets it


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        yield started


def configure(pipeline: Pipeline, commit_interval_s: float) -> None:
    config = pipeline.configure(given.store(), batch_records_max=50)
    commit_interval = f"[worker]\ncommit_interval_s = {commit_interval_s}\n"
    config.write_text(config.read_text().replace("[worker]\n", commit_interval))


async def applied(pipeline: Pipeline) -> dict[int, dict[str, Any]]:
    """The fences in Redis, by partition."""
    found = {}
    for number in range(PARTITIONS):
        fence: Any = await pipeline.redis.get(fence_key(pipeline, number))
        if fence:
            found[number] = json.loads(fence)
    return found


def fence_key(pipeline: Pipeline, number: int) -> str:
    return keys.applied(Partition(pipeline.app, "messages", number))


async def all_applied(pipeline: Pipeline) -> None:
    async def every_partition() -> bool:
        return len(await applied(pipeline)) == PARTITIONS

    await until(every_partition, "a fence of every partition")


async def committed(pipeline: Pipeline) -> dict[int, int]:
    admin = AIOKafkaAdminClient(bootstrap_servers=pipeline.bootstrap)
    await admin.start()
    offsets = await admin.list_consumer_group_offsets(keys.group_id(pipeline.app, "messages"))
    await admin.close()
    return {at.partition: found.offset for at, found in offsets.items()}


async def publish(pipeline: Pipeline, count: int = 400) -> None:
    await pipeline.publish([given.published(f"m{n}", f"t/{n % 40}") for n in range(count)])


async def test_a_worker_that_stops_commits_everything_that_redis_has(pipeline: Pipeline) -> None:
    configure(pipeline, commit_interval_s=3_600)
    worker = await pipeline.worker()
    await publish(pipeline)
    await all_applied(pipeline)
    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0
    fences = await applied(pipeline)
    assert await committed(pipeline) == {at: fences[at]["offset"] + 1 for at in range(PARTITIONS)}


async def test_a_partition_that_cannot_continue_ends_the_process_and_the_others_finish_first(
    pipeline: Pipeline,
) -> None:
    configure(pipeline, commit_interval_s=3_600)
    worker = await pipeline.worker()
    await publish(pipeline)
    await all_applied(pipeline)
    # As if partition 2 had been written by a worker of another cluster.
    pipeline.replays_as_live = False
    fence = (await applied(pipeline))[2] | {"cluster_id": "another"}
    await pipeline.redis.set(fence_key(pipeline, 2), json.dumps(fence))
    assert await worker.ended() == 1
    log = worker.log.read_text()
    assert "another" in log
    assert "Traceback" not in log
    fences, offsets = await applied(pipeline), await committed(pipeline)
    for number in (0, 1, 3):
        assert offsets[number] == fences[number]["offset"] + 1


async def test_a_crash_of_fausts_consumer_thread_ends_the_process(pipeline: Pipeline) -> None:
    configure(pipeline, commit_interval_s=0.1)
    crashing = (
        "import sys, aiokafka\n"
        "def commit(*_): raise RuntimeError('planted')\n"
        "aiokafka.AIOKafkaConsumer.commit = commit\n"
        "from millpond.pipeline.cli.main import main\n"
        f"sys.argv = ['millpond', 'worker', 'messages', '--config', '{pipeline.directory}/millpond.toml']\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", crashing], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        await publish(pipeline)
        _, log = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert b"worker messages failed: RuntimeError('planted')" in log


async def test_sigterm_ends_a_worker_while_kafka_is_down(
    app_name: str, own_kafka: Server, redis_server: str, tmp_path: Path
) -> None:
    async with running(app_name, own_kafka.address, redis_server, tmp_path) as pipeline:
        configure(pipeline, commit_interval_s=3_600)
        worker = await pipeline.worker()
        await publish(pipeline)
        await all_applied(pipeline)
        # Connections stay open without answers: aiokafka would wait without limit.
        own_kafka.pause()
        begin_s = time.monotonic()
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 1
        assert time.monotonic() - begin_s < SESSION_TIMEOUT_S + 10
        own_kafka.resume()
        assert "no clean end within 6 s; exiting" in worker.log.read_text()
