"""Keeps child processes running.

- Children are started in order: each is ready before the next one is started. One that fails fails the start.
- A child that ends later is restarted after a back-off, which doubles up to a limit.
- Children are stopped in the reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from millpond.pipeline.stack.processes import Process, identify
from millpond.schemas.errors import MillpondError

READY_TIMEOUT_S = 90.0
READY_POLL_S = 0.1
STOP_TIMEOUT_S = 20.0  # until SIGKILL; a worker's last batch and Kafka's clean stop take less
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 30.0
SETTLED_AFTER_S = 60.0  # after a run this long the back-off is the shortest again
LOG_LINES_SHOWN = 10  # in the message about a child that ended


@dataclass
class Child:
    """A child process: its command, its state, and how to see that it is ready. `before` runs before each start."""

    name: str
    command: list[str]
    log: Path
    ready: Callable[[], Awaitable[bool]]
    environment: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None
    process: Process | None = None
    is_ready: bool = False
    restarts: int = 0
    telemetry: str | None = None  # the URL of its metrics and health, if it has any

    def last_lines(self) -> str:
        """The last lines of its log, indented."""
        lines = self.log.read_text("utf-8", "replace").splitlines() if self.log.exists() else []
        return "\n".join(f"  {line}" for line in lines[-LOG_LINES_SHOWN:])


class Supervisor:
    """Starts, restarts and stops children. It prints through `say`, and calls `changed` when the state changes."""

    def __init__(self, say: Callable[[str], None], changed: Callable[[], None]) -> None:
        """No child runs before `start`."""
        self.children: list[Child] = []
        self._say, self._changed = say, changed
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self, child: Child) -> None:
        """Start a child, and wait until it is ready.

        Raises:
            MillpondError: it ended, or was not ready in time. The message has the end of its log.
        """
        self.children.append(child)
        running = self._spawn(child)
        await self._until_ready(child, running)
        self._tasks.append(asyncio.create_task(self._watch(child, running)))

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        child.before()
        child.is_ready = False
        with child.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches only us, and we stop the children in order.
            running = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **child.environment},
                start_new_session=True,
            )
        child.process = identify(running.pid)
        self._changed()
        return running

    async def _until_ready(self, child: Child, running: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            ready = await child.ready()
            if running.poll() is not None:
                raise MillpondError(
                    f"{child.name} ended with exit code {running.returncode}:\n{child.last_lines()}"
                )
            if ready:
                break
            if time.monotonic() > deadline:
                raise MillpondError(
                    f"{child.name} is not ready after {READY_TIMEOUT_S:.0f} s:\n{child.last_lines()}"
                )
            await asyncio.sleep(READY_POLL_S)
        child.is_ready = True
        self._changed()

    async def _watch(self, child: Child, running: subprocess.Popen[bytes]) -> None:
        """Restart the child whenever it ends, after a growing back-off."""
        backoff_s, started = BACKOFF_MIN_S, time.monotonic()
        while True:
            code = await self._exit_code(running)
            if self._stopping:
                return
            child.is_ready = False
            child.restarts += 1
            self._changed()
            if time.monotonic() - started > SETTLED_AFTER_S:
                backoff_s = BACKOFF_MIN_S
            self._say(
                f"{child.name} ended with exit code {code}; restarting it in {backoff_s:g} s."
                f" The end of {child.log}:\n{child.last_lines()}"
            )
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
            if self._stopping:
                return
            running, started = self._spawn(child), time.monotonic()
            try:
                await self._until_ready(child, running)
            except MillpondError as error:
                self._say(str(error))
            else:
                self._say(f"{child.name} is ready again")

    async def _exit_code(self, running: subprocess.Popen[bytes]) -> int:
        """Wait in a thread of its own until the process ends.

        asyncio's pool has only about as many threads as processors. Waiting children would occupy all of them, and none
        would be left to stop a child.
        """
        ended = asyncio.get_running_loop().create_future()

        def wait() -> None:
            code = running.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits any more
                ended.get_loop().call_soon_threadsafe(_set, ended, code)

        threading.Thread(target=wait, daemon=True).start()
        code: int = await ended
        return code

    async def stop(self) -> None:
        """Stop all children, the last one first."""
        self._stopping = True
        for child in reversed(self.children):
            if child.process is not None:
                await asyncio.to_thread(child.process.stop, STOP_TIMEOUT_S)
                child.is_ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _set(future: asyncio.Future[int], code: int) -> None:
    if not future.done():
        future.set_result(code)
