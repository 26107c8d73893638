"""Kafka and Redis servers for tests that stop, kill, pause or restart them: a process with its own directory and port."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.stack.redis import redis_command
from millpond.pipeline.stack.servers import kafka_answers, redis_answers

READY_TIMEOUT_S = 90.0  # generous, since machines are shared
STOP_TIMEOUT_S = 60.0
KAFKA_HEAP_MIB = 256
STOPPED = "TZX"  # stopped, zombie or dead


class Server:
    """One child process at `address`. After a stop, `start` starts it again on the same port and data.

    Every method blocks. An async test calls `await asyncio.to_thread(server.kill)`.
    """

    def __init__(
        self,
        address: str,
        directory: Path,
        command: Callable[[], list[str]],
        answers: Callable[[], Awaitable[bool]],
    ) -> None:
        """`start` starts it. `address` is `redis://HOST:PORT` for Redis and `HOST:PORT` for Kafka."""
        self.address, self.directory = address, directory
        self._command, self._answers = command, answers
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start, and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.answers():
            assert self.process.poll() is None, f"{self.address} ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"{self.address} does not answer:\n{self.log()}"
            time.sleep(0.05)
        return self

    def answers(self) -> bool:
        """True if it serves clients now."""

        async def ask() -> bool:
            return await self._answers()

        # A new thread: asyncio.run cannot run inside a running event loop.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(asyncio.run, ask()).result()

    def log(self) -> str:
        """Return the end of its log."""
        return (self.directory / "log").read_text(errors="replace")[-4_000:]

    def stop(self) -> None:
        """Stop the process with SIGTERM, and wait for its end."""
        self._signal(signal.SIGTERM)
        self._wait()

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait for its end. Do nothing if it does not run."""
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self._wait()

    def pause(self) -> None:
        """Stop the process with SIGSTOP: connections stay open, but nothing is answered."""
        assert self.process is not None, f"{self.address} does not run"
        pause(self.process)

    def resume(self) -> None:
        """Continue a paused process."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None, f"{self.address} does not run"
        self.process.send_signal(number)

    def _wait(self) -> None:
        assert self.process is not None
        self.process.wait(STOP_TIMEOUT_S)
        self.process = None


def pause(process: subprocess.Popen[bytes] | psutil.Process) -> None:
    """Stop a process with SIGSTOP, and wait until all of its threads have stopped.

    The signal alone is not enough: on a busy machine a thread can answer one more request before it stops.
    """
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not all(state in STOPPED for state in _thread_states(process.pid)):
        assert time.monotonic() < deadline, f"process {process.pid} does not stop"
        time.sleep(0.005)


def _thread_states(pid: int) -> Iterator[str]:
    """Return the state of each thread as one letter (man 5 proc_pid_stat)."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        # The thread may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            yield stat.read_text().rpartition(") ")[2][0]


def kafka_server(
    directory: Path,
    overrides: Mapping[str, str] | None = None,
    settings: KafkaSettings | None = None,
) -> Server:
    """Return a Kafka server that is not started yet.

    `overrides` are broker properties. `settings` say how to connect to it; without them, in plain text.
    """
    port = free_port()
    server = KafkaServer(directory, port, free_port(), overrides, KAFKA_HEAP_MIB)
    address = f"{HOST}:{port}"
    asked = settings or KafkaSettings(bootstrap_servers=(address,))
    return Server(address, directory, server.prepare, lambda: kafka_answers(asked))


def redis_server(directory: Path) -> Server:
    """Return a Redis server like that of `millpond up`, not started yet."""
    port = free_port()
    address = f"redis://{HOST}:{port}"
    return Server(
        address, directory, lambda: redis_command(directory, port), lambda: redis_answers(address)
    )
