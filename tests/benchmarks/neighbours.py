"""How much of this machine others used meanwhile: what a figure is worth."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import psutil

# A measurement during which others used more than this is repeated, so many times at most; the least disturbed counts.
CORES_MAX: Final = 0.2
TRIES_MAX: Final = 3

Result = TypeVar("Result")


class Usage(NamedTuple):
    """Seconds of CPU so far: everybody's, what the hypervisor took included, and ours with all that we started."""

    everybody: float
    ours: float


def usage() -> Usage:
    """Ours are this process, those below it, and those of them that have ended."""
    times = psutil.cpu_times()
    everybody = times.user + times.nice + times.system + times.softirq + times.irq + times.steal
    own = psutil.Process()
    ours = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            ours += sum(process.cpu_times()[:4])  # user and system, and those of ended children
    return Usage(everybody, ours)


def undisturbed(
    attempt: Callable[[], Result], tell: Callable[[Result, float], None]
) -> tuple[Result, float]:
    """The least disturbed of a few attempts, and the cores that others used meanwhile."""
    attempts: list[tuple[Result, float]] = []
    while len(attempts) < TRIES_MAX:
        before, started = usage(), time.monotonic()
        result = attempt()
        after, seconds = usage(), time.monotonic() - started
        others = (after.everybody - before.everybody) - (after.ours - before.ours)
        attempts.append((result, max(others, 0.0) / seconds))
        tell(*attempts[-1])
        if attempts[-1][1] <= CORES_MAX:
            break
    return min(attempts, key=lambda each: each[1])
