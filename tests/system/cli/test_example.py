"""The example is run as its first lines describe, against a real Kafka."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from millpond.schemas import keys
from tests.support import given
from tests.support.workers import WAIT_S, Pipeline, running, until

EXAMPLES = Path(__file__).parents[3] / "examples"
FAUST = Path(sys.executable).with_name("faust")


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        yield started


async def test_a_plain_faust_agent_reads_what_bridges_write(pipeline: Pipeline) -> None:
    # Given a topic with records that the example ignores, and some that cannot be decoded.
    await pipeline.publish([
        given.published("m1", "sensor/attic", payload="101.5"),
        given.published("m2", "sensor/attic", payload="99"),
        given.published("m3", "sensor/attic", payload="warm"),
        given.published("m4", "engine/1", payload="500"),
        given.delivered("m1", "sensor/attic"),
    ])  # fmt: skip
    for value in (b"no JSON", b"\xff", b"[1]", None):
        await pipeline.producer.send_and_wait(keys.MESSAGES_TOPIC, value, b"sensor/attic")
    # When the example runs, and another record comes.
    printed = pipeline.directory / "printed"
    with printed.open("wb") as stdout, (pipeline.directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                FAUST, "--datadir", pipeline.directory / "faust",
                "-A", "faust_agent", "worker", "--without-web",
            ],
            cwd=EXAMPLES, env={**os.environ, "KAFKA": f"kafka://{pipeline.bootstrap}"},
            stdout=stdout, stderr=log,
        )  # fmt: skip

    async def alarm(topic: str) -> None:
        async def has_alarm() -> bool:
            assert process.poll() is None, (pipeline.directory / "log").read_text()
            return topic in printed.read_text()

        await until(has_alarm, f"an alarm of {topic}")

    try:
        await alarm("sensor/attic")
        await pipeline.publish([given.published("m5", "sensor/cellar", payload="1e3")])
        # Then it prints the values above its threshold, and ends at SIGTERM.
        await alarm("sensor/cellar")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0
    finally:
        process.kill()
    lines = [line for line in printed.read_text().splitlines() if " is at " in line]
    assert lines == ["sensor/attic is at 101.5", "sensor/cellar is at 1000"]
