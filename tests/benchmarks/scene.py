"""Where a benchmark takes place: a Kafka and a Redis of its own, and processes that end with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from redis import Redis

from millpond.pipeline.kafka import topics
from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.stack.servers import kafka_answers
from tests.benchmarks.events import PARTITIONS
from tests.support import given, servers

KAFKA_HEAP_MIB: Final = 1024
LOG_SHOWN_CHARACTERS: Final = 4_000


@contextlib.contextmanager
def kafka(directory: Path, partitions: int = PARTITIONS) -> Iterator[KafkaSettings]:
    """A Kafka with our topics, empty."""
    server = KafkaServer(directory, free_port(), free_port(), None, KAFKA_HEAP_MIB)
    address = f"{HOST}:{server.port}"
    settings = KafkaSettings(bootstrap_servers=(address,), partitions=partitions)
    process = servers.Server(address, directory, server.prepare, lambda: kafka_answers(settings))
    try:
        process.start()
        asyncio.run(topics.create(settings))
        yield settings
    finally:
        process.kill()
        shutil.rmtree(directory)


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[Redis]:
    """A Redis as `millpond up` runs it, but for one thing: it does not rewrite its files halfway through.

    It would at a moment of its own choosing, in a process of its own, on the cores that are being measured.
    """
    process = servers.redis_server(directory)
    try:
        process.start()
        client = Redis.from_url(process.address, decode_responses=True)
        client.config_set("save", "")
        client.config_set("auto-aof-rewrite-percentage", 0)
        yield client
        client.close()
    finally:
        process.kill()
        shutil.rmtree(directory)


def address(client: Redis) -> str:
    """HOST:PORT of the server."""
    options = client.get_connection_kwargs()
    return f"{options['host']}:{options['port']}"


class Process:
    """A child process; `ready_file` is what a process of ours touches when it is ready."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.directory = Path(environment["BENCH_DIRECTORY"])
        self._log = self.directory / f"{name}.log"
        self.ready_file = self.directory / f"{name}.ready"
        variables = {**os.environ, **environment, "MILLPOND_READY_FILE": str(self.ready_file)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables,
                cwd=self.directory,
            )  # fmt: skip
        self.pid = self._process.pid

    def check(self) -> None:
        """It still runs."""
        log = self._log.read_text(errors="replace")[-LOG_SHOWN_CHARACTERS:]
        assert self._process.poll() is None, f"{self.name} ended:\n{log}"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped where it is, for so long."""
        servers.pause(self._process)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def millpond(name: str, *arguments: str, directory: Path) -> Process:
    """One of our own processes, by the `millpond.toml` of the directory."""
    command = [sys.executable, "-m", "millpond", *arguments]
    config = ["--config", str(directory / "millpond.toml")]
    return Process(name, [*command, *config], {"BENCH_DIRECTORY": str(directory)})


def configure(
    directory: Path,
    app: str,
    settings: KafkaSettings,
    redis_address: str,
    more: str = "",
    rules: str = "",
) -> None:
    """A `millpond.toml` with these rules; without, it stores every message: hash and index."""
    (directory / "millpond.toml").write_text(
        f'app = "{app}"\n'
        f'[kafka]\nbootstrap_servers = ["{settings.bootstrap_servers[0]}"]\n'
        f"partitions = {settings.partitions}\n"
        f"{more}"
        f'[pool.pool1]\nserver = "{redis_address}"\n' + (rules or given.store())
    )
