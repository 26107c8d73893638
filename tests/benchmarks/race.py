"""Messages per second from a full Kafka into an empty Redis, by whoever does the job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from redis import Redis

from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys
from tests.benchmarks import scene, venvs
from tests.benchmarks.events import TOPICS, topic_name
from tests.benchmarks.scene import Process

# The clock starts when this much is stored: by then everybody is up and has met every topic.
START_SHARE: Final = 0.05
POLL_S: Final = 0.01
STALL_S: Final = 60.0
_numbers = count()


class Contestant(NamedTuple):
    """Who does the job: a peer's script, or workers of our own; `share` of the events it is measured over."""

    name: str
    title: str
    workers: int = 0  # 0: a peer
    share: float = 1.0


class Result(NamedTuple):
    """What came of one race."""

    rate: float  # messages per second
    zadds: int  # commands that it took to index the messages


MILLPOND: Final = Contestant("millpond", "one worker", workers=1)
# More events: the second worker comes when the first has been at it for some seconds, and the clock starts only then.
TWO: Final = Contestant("two-workers", "two workers", workers=2, share=4.0)
FAUST_VERSION: Final = venvs.version("faust", "faust-streaming")
FAUST: Final = Contestant("faust", f"Faust {FAUST_VERSION}, take(500)", share=0.3)
FAUST_UVLOOP: Final = Contestant("faust-uvloop", "the same on uvloop", share=0.3)
QUIXSTREAMS: Final = Contestant(
    "quixstreams", f"quixstreams {venvs.version('quixstreams', 'quixstreams')}"
)
FASTSTREAM: Final = Contestant(
    "faststream", f"faststream {venvs.version('faststream', 'faststream')}"
)
# Of each peer its environment, and its script with arguments.
FAUST_WORKER: Final = ("worker", "--without-web", "-l", "error")
SCRIPTS: Final = {
    FAUST: ("faust", "faust_take.py", *FAUST_WORKER),
    FAUST_UVLOOP: ("faust", "faust_take.py", "--loop", "uvloop", *FAUST_WORKER),
    QUIXSTREAMS: ("quixstreams", "quixstreams_sink.py"),
    FASTSTREAM: ("faststream", "faststream_batch.py"),
}


def run(contestant: Contestant, settings: KafkaSettings, events: int) -> Result:
    """One race of one contestant, as a consumer group that has read nothing yet."""
    wanted = int(events * contestant.share)
    group = f"bench-{contestant.name}-{next(_numbers)}"
    with TemporaryDirectory() as name, scene.redis(Path(name) / "redis") as redis:
        processes = _start(contestant, Path(name), group, settings, scene.address(redis))
        try:
            rate = measured(redis, wanted, processes, lambda: _ready(contestant, processes))
            _verify(redis, wanted)
            return Result(rate, redis.info("commandstats")["cmdstat_zadd"]["calls"])
        finally:
            for process in processes:
                process.kill()


def _start(
    contestant: Contestant, directory: Path, group: str, settings: KafkaSettings, redis: str
) -> list[Process]:
    if contestant.workers:
        scene.configure(directory, group, settings, redis)
        return [
            scene.millpond(f"worker-{at}", "worker", "messages", directory=directory)
            for at in range(contestant.workers)
        ]
    peer, script, *arguments = SCRIPTS[contestant]
    command = [str(venvs.python(peer)), str(venvs.PEERS / script), *arguments]
    environment = {
        "BENCH_DIRECTORY": str(directory),
        "BENCH_KAFKA": settings.bootstrap_servers[0],
        "BENCH_TOPIC": keys.MESSAGES_TOPIC,
        "BENCH_GROUP": group,
        "BENCH_REDIS": f"redis://{redis}",
    }
    return [Process(contestant.name, command, environment)]


def _ready(contestant: Contestant, processes: Sequence[Process]) -> bool:
    return not contestant.workers or all(process.ready_file.exists() for process in processes)


def measured(
    redis: Redis, events: int, processes: Sequence[Process], ready: Callable[[], bool]
) -> float:
    """Messages per second, from when all are ready and a share is stored until everything is."""
    start: tuple[float, int] | None = None
    progressed_at, before = time.monotonic(), 0
    while True:
        # A key for each message and each topic; our workers have some few of their own.
        stored, now = redis.dbsize() - TOPICS, time.monotonic()
        if start is None and stored >= events * START_SHARE and ready():
            start = now, stored
        if start is not None and stored >= events:
            since, first = start
            assert first < events / 2, "most was stored before all were ready: use more --events"
            return (stored - first) / (now - since)
        if stored > before:
            progressed_at, before = now, stored
        elif now - progressed_at > 1:
            for process in processes:
                process.check()
            assert now - progressed_at < STALL_S, f"nothing stored for {STALL_S:.0f} s"
        time.sleep(POLL_S)


def _verify(redis: Redis, events: int) -> None:
    """Everything is there: hashes of seven fields, and as many entries in the indexes."""
    deadline = time.monotonic() + 5
    while True:
        pipeline = redis.pipeline(transaction=False)
        for number in range(TOPICS):
            pipeline.zcard(keys.message_index(topic_name(number)))
        indexed = sum(pipeline.execute())
        if indexed >= events:
            break
        assert time.monotonic() < deadline, f"{indexed} of {events} messages are indexed"
    body = redis.hgetall(keys.message_body(f"{0:032x}"))
    assert list(body) == ["id", "from", "qos", "topic", "payload", "ts", "retain"]
