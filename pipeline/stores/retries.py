"""Back-off: the pause before another try, while no try has succeeded.

The pause after n failures is 0.05 s · 2ⁿ, at most 2 s in general, and the second half of it is random. So a worker notices soon that
a server is up, and its partitions do not all connect at the same moment.

A try that succeeds in part is a failure. A full Redis takes a connection and a load, and then refuses each write: without a
pause, a worker would connect, load and fail a hundred times a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from redis.backoff import EqualJitterBackoff

from millpond.schemas.errors import Fenced, StoreDown

log = logging.getLogger(__name__)
Result = TypeVar("Result")

BACKOFF_BASE_S, BACKOFF_MAX_S, BACKOFF_DOUBLINGS_MAX = 0.05, 2.0, 8


class Retries:
    """Counts the failures since the last success."""

    def __init__(self, pause_max_s: float = BACKOFF_MAX_S) -> None:
        self.failures = 0
        self._delays = EqualJitterBackoff(cap=pause_max_s, base=BACKOFF_BASE_S)

    def failed(self) -> None:
        """Count a failure."""
        self.failures += 1

    def succeeded(self) -> None:
        """Note a success: the next failure is a first one."""
        self.failures = 0

    async def pause(self) -> None:
        """Wait before another try. After a success there is nothing to wait for."""
        if self.failures:
            await asyncio.sleep(self._delays.compute(min(self.failures, BACKOFF_DOUBLINGS_MAX)))

    @contextmanager
    def counting(self, *, success: bool = True) -> Iterator[None]:
        """Count the failure of the block. Its success counts only with `success`."""
        try:
            yield
        except (StoreDown, Fenced):
            self.failed()
            raise
        if success:
            self.succeeded()


async def until_up(
    attempt: Callable[[], Awaitable[Result]], name: object, retries: Retries | None = None
) -> Result:
    """Repeat an attempt until it raises no `StoreDown`. Log the first failure and the success after it.

    `name` says in the log lines who waits. `retries` counts the failures; it does not count the success, because a store
    that can be loaded may still refuse to be written.
    """
    retries, down = retries or Retries(), False
    while True:
        try:
            result = await attempt()
        except StoreDown as error:
            if not down:
                log.warning("%s: the store is down: %s; retrying until it is up", name, error)
            down = True
            retries.failed()
            await retries.pause()
        else:
            if down:
                log.info("%s: the store is up again", name)
            return result
