"""The partitions that a worker owns: one task for each, with an inbox of runs and a driver.

Concepts:

- A *run* is a list of records of one partition, in order, as the transport hands it over.
- The *inbox* holds up to `INBOX_RUNS_MAX` runs. A full inbox makes the transport wait: this is back-pressure.
- A partition is *loading* until its driver has loaded its state, and *owned* from `assign` until `release` ends.
- *Maintenance* happens once a second: `driver.maintain` writes what waits for a transaction and checks the fence.

State of `Partitions`:

- `_tasks`: the owned partitions, by number.
- `_loading`: those of them that are loading.
- `assigned`: True once Kafka has made an assignment, even an empty one.

Transitions:

- ON assigned: start a task for each new partition. Partitions that are owned already continue.
- ON started: when no partition is loading any more, report ready.
- ON run: put the run into the inbox. A run of a partition that is not owned is dropped: its owner reads it.
- ON revoked, ON stop (`release`): each task finishes its run within the timeout, or is cancelled. Runs that wait in
  the inbox are dropped. Then forget the partitions, and return their last committable offsets.
- ON failure of a task: report it. The worker stops; the other partitions finish first.

Invariant: an offset is committed for an owned partition, or once by its release. So a worker never commits an older
offset after the next owner continued.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import Record
from millpond.pipeline.clock import now_ms

logger = logging.getLogger(__name__)

# Runs that wait for a partition. One is enough to overlap with the transaction of the run before. Each further one only
# uses memory, and is dropped and read again at a rebalance. Whether fewer than 4 are slower was not measured.
INBOX_RUNS_MAX = 4
MAINTAIN_INTERVAL_S = 1.0

NewDriver = Callable[[int], PartitionDriver[Any]]


class PartitionTask:
    """Runs one partition: folds the runs of its inbox, maintains the driver once a second, and produces ticks."""

    def __init__(self, driver: PartitionDriver[Any], on_started: Callable[[], None]) -> None:
        """Start the task. It calls `on_started` when the partition's state is loaded."""
        self.driver, self._on_started = driver, on_started
        self._inbox: asyncio.Queue[Sequence[Record]] = asyncio.Queue(INBOX_RUNS_MAX)
        self._closing = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=str(driver.partition))

    async def put(self, run: Sequence[Record]) -> None:
        """Put a run into the inbox. Wait while it is full, unless the task closes or has ended."""
        putting = asyncio.ensure_future(self._inbox.put(run))
        closing = asyncio.ensure_future(self._closing.wait())
        await asyncio.wait((putting, closing, self.task), return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()
        closing.cancel()

    async def close(self, timeout_s: float) -> None:
        """Finish the run in hand and end the task; cancel it after `timeout_s`. Raises no error of the task."""
        self._closing.set()
        # `wait` does not raise. The task's callback reports its error, and other partitions must finish undisturbed.
        _, busy = await asyncio.wait((self.task,), timeout=timeout_s)
        if busy:
            logger.warning(
                "%s: still busy after %.0f s; the next owner repeats the batch in hand",
                self.driver.partition,
                timeout_s,
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
                    # No run waits to be folded while the store applies this one: finish it now.
                    await self.driver.settle()
                await self._tick()
        finally:
            await self.driver.close()

    async def _next_run(self, timeout_s: float) -> Sequence[Record] | None:
        """Return the next run, or None after `timeout_s` or when the task closes."""
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
            await self.driver.log.produce([tick])


class Partitions:
    """All partitions of one agent that this process owns."""

    def __init__(
        self,
        new_driver: NewDriver,
        release_timeout_s: float,
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Call `on_ready` when all assigned partitions are loaded, and `on_failure` when one fails."""
        self._new_driver, self._release_timeout_s = new_driver, release_timeout_s
        self._on_ready, self._on_failure = on_ready, on_failure
        self._tasks: dict[int, PartitionTask] = {}
        self._loading: set[int] = set()
        self.assigned = False

    def assign(self, numbers: set[int]) -> None:
        """Start these partitions. Those that are owned already continue."""
        self.assigned = True
        for number in sorted(numbers - self._tasks.keys()):
            self._loading.add(number)
            self._tasks[number] = owned = PartitionTask(
                self._new_driver(number), partial(self._loaded, number)
            )
            owned.task.add_done_callback(self._task_ended)
        if not self._loading:
            self._on_ready()

    async def put(self, number: int, run: Sequence[Record]) -> None:
        """Hand a run to its partition. Drop it if the partition is not owned: its owner reads it."""
        owned = self._tasks.get(number)
        if owned is not None:
            await owned.put(run)

    async def release(self, numbers: set[int]) -> dict[int, int]:
        """Finish these partitions and forget them. Return the last committable offset of each that has one."""
        owned = {number: self._tasks[number] for number in numbers & self._tasks.keys()}
        await asyncio.gather(*(task.close(self._release_timeout_s) for task in owned.values()))
        for number in owned:
            self._loading.discard(number)
            # A rebalance and the end of the process may release the same partition at once.
            self._tasks.pop(number, None)
        return _committable(owned)

    def owned(self) -> Container[int]:
        """Return the numbers of the owned partitions."""
        return self._tasks.keys()

    def drivers(self) -> dict[int, PartitionDriver[Any]]:
        """Return the drivers of the owned partitions."""
        return {number: owned.driver for number, owned in self._tasks.items()}

    @property
    def loading(self) -> list[int]:
        """The numbers of the partitions that are loading."""
        return sorted(self._loading)

    def committable(self) -> dict[int, int]:
        """Return the committable offset of each owned partition that has one."""
        return _committable(self._tasks)

    def _loaded(self, number: int) -> None:
        self._loading.discard(number)
        if not self._loading:
            self._on_ready()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_failure(error)


def _committable(tasks: dict[int, PartitionTask]) -> dict[int, int]:
    offsets = {number: owned.driver.committable for number, owned in tasks.items()}
    return {number: offset for number, offset in offsets.items() if offset is not None}
