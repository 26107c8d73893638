"""What Redis itself can take: the commands of our workers from redis-benchmark, pipelined."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from millpond.schemas import keys
from tests.benchmarks import scene
from tests.benchmarks.events import PAYLOAD, TOPICS, event, topic_name

PROGRAMS: Final = ("redis-benchmark", "valkey-benchmark")
CLIENTS: Final = 4  # as many connections as a worker has partitions here
PIPELINE: Final = 500
# Twelve digits, by chance below TOPICS: three of them are as good as an id of 32 characters.
RANDOM: Final = "__rand_int__"
RANDOM_ID: Final = RANDOM * 3
PAYLOAD_SHAPE: Final = "x" * len(PAYLOAD)  # quotes would break the program's own CSV


def program() -> str:
    """The benchmark program that comes with Redis or Valkey."""
    for name in PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise SystemExit(
        "the limit of Redis is measured with redis-benchmark, which is not installed:"
        " it is in the packages redis-tools (Debian, Ubuntu), redis (Fedora, Homebrew), valkey"
    )


def run(events: int, entries: int) -> float:
    """Messages per second, with as many index `entries` in a ZADD as the worker had."""
    sample = event(0)
    # fmt: off
    body = [
        "HSET", keys.message_body(RANDOM_ID), "id", RANDOM_ID, "from", sample.client_id, "qos", "1",
        "topic", sample.topic, "payload", PAYLOAD_SHAPE, "ts", str(sample.published_at // 1000),
        "retain", "false",
    ]
    # fmt: on
    topic = topic_name(0).replace("0000000", RANDOM)
    index = ["ZADD", keys.message_index(topic), "NX"]
    for _ in range(entries):
        index += [f"1700{RANDOM}", RANDOM_ID]
    with TemporaryDirectory() as name, scene.redis(Path(name) / "redis") as redis:
        address = scene.address(redis)
        seconds = events / rate(address, events, body)
        commands = events // entries
        seconds += commands / rate(address, commands, index)
    return events / seconds


def rate(address: str, commands: int, command: list[str]) -> float:
    """Commands per second."""
    port = address.rpartition(":")[2]
    # fmt: off
    done = subprocess.run(
        [program(), "-p", port, "-n", str(commands), "-c", str(CLIENTS), "-P", str(PIPELINE),
         "-r", str(TOPICS), "--csv", *command],
        capture_output=True, text=True, check=True,
    )
    # fmt: on
    (row,) = csv.DictReader(done.stdout.splitlines())
    return float(row["rps"])
