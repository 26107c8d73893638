"""Real servers for tests that stop, kill, pause or restart them: one process each, own directory, free ports."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.stack.redis import redis_command
from millpond.pipeline.stack.stack import kafka_answers, redis_answers

READY_TIMEOUT_S = 90.0  # generous, since machines are shared
STOP_TIMEOUT_S = 60.0
KAFKA_HEAP_MIB = 256
STOPPED = "TZX"  # stopped, or no longer there


class Server:
    """One child process at `address`: started and stopped as often as a test wants, always on the same port and data.

    Every method blocks; from an async test call `await asyncio.to_thread(server.kill)`.
    """

    def __init__(
        self,
        address: str,
        directory: Path,
        command: Callable[[], list[str]],
        answers: Callable[[], Awaitable[bool]],
    ) -> None:
        """Not started yet. Redis: `redis://HOST:PORT`; Kafka: `HOST:PORT`."""
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
        """Whether it does its work now."""

        async def ask() -> bool:
            return await self._answers()

        # A thread of its own, so that this works inside a running event loop too.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(asyncio.run, ask()).result()

    def log(self) -> str:
        """What it has said so far, the end of it."""
        return (self.directory / "log").read_text(errors="replace")[-4_000:]

    def stop(self) -> None:
        """SIGTERM, and wait until it is gone."""
        self._signal(signal.SIGTERM)
        self._wait()

    def kill(self) -> None:
        """kill -9, and wait until it is gone; does nothing if it does not run."""
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self._wait()

    def pause(self) -> None:
        """Stop the process where it is: connections stay open, nothing is answered."""
        assert self.process is not None, f"{self.address} does not run"
        pause(self.process)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None, f"{self.address} does not run"
        self.process.send_signal(number)

    def _wait(self) -> None:
        assert self.process is not None
        self.process.wait(STOP_TIMEOUT_S)
        self.process = None


def pause(process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP, and wait until it holds: a signal is only pending until each thread has taken notice of it, and on a
    busy machine a thread may answer one more request before.
    """
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not all(state in STOPPED for state in _thread_states(process.pid)):
        assert time.monotonic() < deadline, f"process {process.pid} does not stop"
        time.sleep(0.005)


def _thread_states(pid: int) -> Iterator[str]:
    """The state of each thread, one letter (man 5 proc_pid_stat)."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            yield stat.read_text().rpartition(") ")[2][0]


def kafka_server(
    directory: Path,
    overrides: Mapping[str, str] | None = None,
    settings: KafkaSettings | None = None,
) -> Server:
    """A Kafka that is not started yet. `overrides` are broker properties; `settings` are how to ask it (default: plain)."""
    port = free_port()
    server = KafkaServer(directory, port, free_port(), overrides, KAFKA_HEAP_MIB)
    address = f"{HOST}:{port}"
    asked = settings or KafkaSettings(bootstrap_servers=(address,))
    return Server(address, directory, server.prepare, lambda: kafka_answers(asked))


def redis_server(directory: Path) -> Server:
    """A Redis, as `millpond up` runs it, that is not started yet."""
    port = free_port()
    address = f"redis://{HOST}:{port}"
    return Server(
        address, directory, lambda: redis_command(directory, port), lambda: redis_answers(address)
    )
