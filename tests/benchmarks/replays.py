"""How fast a log is replayed into another Redis, beside a live worker that folds the same; and with how much memory."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import psutil
from redis import Redis

from millpond.schemas import keys
from tests.benchmarks import scene
from tests.benchmarks.events import fill, publishes
from tests.benchmarks.progress import until_applied
from tests.benchmarks.scene import Process
from tests.benchmarks.table import Row, most_row, progress, ratio_row, thousands

APP: Final = "bench-replay"
EVENTS: Final = 1_000_000
# The clock runs from here to there: by then everybody is up, and nobody is about to end.
FIRST_SHARE, LAST_SHARE = 0.1, 0.98


class Folded(NamedTuple):
    """Records per second, and MiB of the process at the beginning and at the end."""

    rate: float
    first: float
    last: float


def rows() -> list[Row]:
    """A million events, folded by a live worker and by a replay."""
    live, replay = run(EVENTS)
    progress(f"replay: {replay}; live: {live}")
    what = f"replay of {EVENTS:,} events"
    memory = f"{replay.last:.0f} MiB : {replay.first:.0f} MiB"
    return [
        ratio_row(f"{what} : one live worker", [replay.rate], [live.rate], 1),
        most_row(
            f"{what}, RSS at its end : at a tenth", memory, replay.last / replay.first, 1.2, "x"
        ),
    ]


def run(events: int) -> tuple[Folded, Folded]:
    """What waits in Kafka: folded by one worker, then replayed."""
    with TemporaryDirectory() as name, scene.kafka(Path(name) / "kafka") as settings:
        directory = Path(name)
        progress(f"replay: writing {events:,} events into Kafka")
        bootstrap = settings.bootstrap_servers[0]
        asyncio.run(fill(bootstrap, keys.MESSAGES_TOPIC, publishes(events)))
        with scene.redis(directory / "live") as live:
            scene.configure(directory, APP, settings, scene.address(live))
            worker = scene.millpond("worker", "worker", "messages", directory=directory)
            found = _folded(worker, live, events)
            with scene.redis(directory / "target") as target:
                into = f"redis://{scene.address(target)}"
                process = Process(
                    "replay",
                    [
                        sys.executable, "-m", "millpond", "replay", "messages", "--into", into,
                        "--config", str(directory / "millpond.toml"),
                    ],
                    {"BENCH_DIRECTORY": str(directory)},
                )  # fmt: skip
                return found, _folded(process, target, events)


def _folded(process: Process, redis: Redis, events: int) -> Folded:
    memory = psutil.Process(process.pid).memory_info
    try:
        started, before = until_applied(process, redis, APP, "messages", int(events * FIRST_SHARE))
        first = memory().rss / 2**20
        ended, done = until_applied(process, redis, APP, "messages", int(events * LAST_SHARE))
        last = memory().rss / 2**20
    finally:
        process.kill()
    rate = (done - before) / (ended - started)
    progress(f"{process.name}: {thousands(rate)}")
    return Folded(rate, first, last)
