"""The partitions this worker owns: one task each, from its inbox through its driver."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import Log, Record
from millpond.pipeline.clock import now_ms

logger = logging.getLogger(__name__)

# Runs that wait for a partition: one being folded and one ready to overlap with its flush is enough; more only
# delays the moment a worker notices that it fell behind.
INBOX_RUNS_MAX = 4
MAINTAIN_INTERVAL_S = 1.0

NewDriver = Callable[[int], PartitionDriver[Any]]


class PartitionTask:
    """One partition: takes runs from its inbox, folds them, tends the driver once a second."""

    def __init__(
        self, driver: PartitionDriver[Any], log: Log, on_started: Callable[[], None]
    ) -> None:
        """Starts at once; `on_started` is called when the partition's state is loaded."""
        self.driver, self._log, self._on_started = driver, log, on_started
        self._inbox: asyncio.Queue[Sequence[Record]] = asyncio.Queue(INBOX_RUNS_MAX)
        self._closing = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=str(driver.partition))

    async def put(self, run: Sequence[Record]) -> None:
        """Hand over a run; waits while the inbox is full, unless the partition is being released."""
        putting = asyncio.ensure_future(self._inbox.put(run))
        closing = asyncio.ensure_future(self._closing.wait())
        await asyncio.wait((putting, closing, self.task), return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()
        closing.cancel()

    async def close(self, timeout_s: float) -> None:
        """Finish the run being folded and let go; give up after `timeout_s` (the next owner goes on)."""
        self._closing.set()
        # What went wrong in the task is said where the task ends; here the others must be able to finish.
        _, busy = await asyncio.wait((self.task,), timeout=timeout_s)
        if busy:
            logger.warning(
                "%s: still busy after %.0f s; letting go", self.driver.partition, timeout_s
            )
            self.task.cancel()
            await asyncio.wait((self.task,))

    async def _run(self) -> None:
        try:
            await self.driver.start()
            self._on_started()
            maintained_at = time.monotonic()
            while not self._closing.is_set():
                run = await self._next_run(maintained_at + MAINTAIN_INTERVAL_S - time.monotonic())
                if run is not None:
                    await self.driver.process(run)
                if time.monotonic() - maintained_at >= MAINTAIN_INTERVAL_S:
                    await self.driver.maintain()
                    maintained_at = time.monotonic()
                elif self._inbox.empty():
                    await self.driver.settle()  # nothing to overlap with the flush
                await self._tick()
        finally:
            await self.driver.close()

    async def _next_run(self, timeout_s: float) -> Sequence[Record] | None:
        """The next run, or None when it is time to tend or to close."""
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        getting = asyncio.ensure_future(self._inbox.get())
        closing = asyncio.ensure_future(self._closing.wait())
        await asyncio.wait(
            (getting, closing), timeout=max(timeout_s, 0), return_when=asyncio.FIRST_COMPLETED
        )
        closing.cancel()
        if getting.done():
            return getting.result()
        getting.cancel()
        return None

    async def _tick(self) -> None:
        tick = self.driver.tick(now_ms())
        if tick is not None:
            await self._log.produce([tick])


class Partitions:
    """All partitions of one agent that this process owns."""

    def __init__(
        self,
        new_driver: NewDriver,
        log: Log,
        release_timeout_s: float,
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`on_ready` is called when all that was assigned is loaded, `on_failure` when a partition cannot go on."""
        self._new_driver, self._log, self._release_timeout_s = new_driver, log, release_timeout_s
        self._on_ready, self._on_failure = on_ready, on_failure
        self._tasks: dict[int, PartitionTask] = {}
        self._loading: set[int] = set()
        self.assigned = False  # whether Kafka has ever said which are ours, if only that none is

    def assign(self, numbers: set[int]) -> None:
        """Begin with these partitions; those already owned go on."""
        self.assigned = True
        for number in sorted(numbers - self._tasks.keys()):
            self._loading.add(number)
            self._tasks[number] = owned = PartitionTask(
                self._new_driver(number), self._log, partial(self._loaded, number)
            )
            owned.task.add_done_callback(self._ended)
        if not self._loading:
            self._on_ready()

    async def put(self, number: int, run: Sequence[Record]) -> None:
        """A run of a partition; one that is no longer ours is dropped: its next owner reads it."""
        owned = self._tasks.get(number)
        if owned is not None:
            await owned.put(run)

    async def release(self, numbers: set[int]) -> dict[int, int]:
        """Finish and let go: the last offsets that may be committed. Nothing here knows them afterwards, so that
        they cannot be committed again after another owner went on.
        """
        owned = {number: self._tasks[number] for number in numbers & self._tasks.keys()}
        await asyncio.gather(*(task.close(self._release_timeout_s) for task in owned.values()))
        for number in owned:
            self._loading.discard(number)
            self._tasks.pop(number, None)  # a rebalance and our own end may both let go
        return _committable(owned)

    def owned(self) -> Container[int]:
        """The partitions that are this worker's now."""
        return self._tasks.keys()

    def drivers(self) -> dict[int, PartitionDriver[Any]]:
        """Of the partitions that are this worker's now."""
        return {number: owned.driver for number, owned in self._tasks.items()}

    @property
    def loading(self) -> list[int]:
        """The partitions whose state is not loaded yet."""
        return sorted(self._loading)

    def committable(self) -> dict[int, int]:
        """The offset that may be committed, per partition that has one."""
        return _committable(self._tasks)

    def _loaded(self, number: int) -> None:
        self._loading.discard(number)
        if not self._loading:
            self._on_ready()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_failure(error)


def _committable(tasks: dict[int, PartitionTask]) -> dict[int, int]:
    offsets = {number: owned.driver.committable for number, owned in tasks.items()}
    return {number: offset for number, offset in offsets.items() if offset is not None}
