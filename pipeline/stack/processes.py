"""Processes that we started, identified by pid and start time. The system may give a pid to another process later."""

from __future__ import annotations

import contextlib

import psutil
from msgspec import Struct


class Process(Struct, frozen=True):
    """A process. `created_at` is its start time, in seconds since the epoch."""

    pid: int
    created_at: float

    def running(self) -> psutil.Process | None:
        """The process if it still runs, else None."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid)
            if found.create_time() == self.created_at and found.status() != psutil.STATUS_ZOMBIE:
                return found
        return None

    def stop(self, timeout_s: float) -> None:
        """Send SIGTERM, and SIGKILL if the process still runs after `timeout_s`."""
        found = self.running()
        if found is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            found.terminate()
            try:
                found.wait(timeout_s)
            except psutil.TimeoutExpired:
                found.kill()
                found.wait(timeout_s)


def identify(pid: int) -> Process:
    """Identify the process that has this pid now."""
    return Process(pid, psutil.Process(pid).create_time())
