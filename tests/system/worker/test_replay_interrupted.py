"""An interrupted replay, also by SIGKILL: the target is marked as incomplete, and the same command continues."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis import Redis

from millpond.schemas import keys
from tests.support import given
from tests.support.replays import other_database, replay
from tests.support.workers import Pipeline, running, until


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as pipeline:
        yield pipeline


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_an_interrupted_replay_is_marked_as_incomplete_and_continues_with_the_same_command(
    pipeline: Pipeline, redis_server: str, number: signal.Signals
) -> None:
    into = other_database(redis_server)
    path = pipeline.configure(
        given.store(), given.command("INCR seen:${msgid}"), batch_records_max=20
    )
    await pipeline.worker()
    await pipeline.publish(given.published(f"m{at}", f"t/{at % 20}") for at in range(8_000))

    async def applied() -> bool:
        return len(await pipeline.redis.keys("seen:*")) == 8_000

    await until(applied, "all messages to be applied")
    command = [
        sys.executable, "-m", "millpond", "replay", "messages", "--config", str(path), "--into", into,
    ]  # fmt: skip
    with Redis.from_url(into, decode_responses=True) as target:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

        async def begun() -> bool:
            assert process.poll() is None
            return len(target.keys("seen:*")) > 100

        await until(begun, "the replay to have begun")
        process.send_signal(number)
        _, said = await asyncio.to_thread(process.communicate, timeout=60)
        marker = keys.replay_marker(pipeline.app, "messages")
        assert target.hget(marker, "complete") == "0"
        assert len(target.keys("seen:*")) < 8_000
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 1
            assert "is marked as incomplete; the same command continues" in said
            assert "Traceback" not in said
        # A replay from another time is refused.
        other = replay(path, into, "--from", "2026-01-01T00:00:00", agent="messages")
        assert "interrupted, from earliest" in other.stderr
        ended = replay(path, into, "--diff", redis_server, agent="messages")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert target.hget(marker, "complete") == "1"
        assert set(target.mget(target.keys("seen:*"))) == {"1"}
