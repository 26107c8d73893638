"""One agent's log, folded into a database through the same machines as live, as far as is asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import LogBounds, Store
from millpond.agents.registry import MACHINES
from millpond.pipeline.replay.log import ReplayLog
from millpond.pipeline.settings import Settings
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

# Partitions at a time: some hide each other's waiting for Kafka and Redis, more would only take memory.
PARTITIONS_AT_ONCE: Final = 4

OpenStore = Callable[[Partition], Store[Any]]


class Folding:
    """Folds partitions from `starts` on; what an earlier run has folded already is not folded again."""

    def __init__(
        self,
        agent: AgentName,
        settings: Settings,
        rules: Rules,
        open_store: OpenStore,
        cluster_id: str,
        starts: Mapping[int, int],
        *,
        again: bool = False,
    ) -> None:
        """`rules` count where the log does not name any. If it is to be asked `again`, it stays connected to Kafka until
        it is stopped.
        """
        self.agent, self._settings, self._rules = agent, settings, rules
        self._open_store, self._cluster_id, self._starts = open_store, cluster_id, dict(starts)
        self._options = settings.kafka.client_options()
        self._again, self._logs = again, dict[int, ReplayLog]()
        self._drivers: dict[int, PartitionDriver[Any]] = {}
        self.positions: dict[int, int] = {}  # the next offset of each partition that was folded

    @property
    def folded(self) -> int:
        """Offsets gone by so far, skipped records and gaps among them."""
        running = {number: driver.next_offset for number, driver in self._drivers.items()}
        return sum(
            max(position - self._starts[number], 0)
            for number, position in {**self.positions, **running}.items()
        )

    async def fold_to(self, ends: Mapping[int, int]) -> None:
        """Fold each partition up to, not including, its end.

        Raises:
            LogMismatch: the database holds what is not of this log, or of beyond the end.
            StoreRefused: it will not serve us.
        """
        room = asyncio.Semaphore(PARTITIONS_AT_ONCE)

        async def fold(number: int, end: int) -> None:
            async with room:
                await self._fold(number, end)

        tasks = [
            asyncio.create_task(fold(number, end))
            for number, end in sorted(ends.items())
            if end > self.positions.get(number, self._starts[number])
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fold(self, number: int, end: int) -> None:
        partition = Partition(self._settings.app, self.agent, number)
        count = self._settings.kafka.partitions
        bounds = LogBounds(self._cluster_id, count, self._starts[number], end, end)
        log = self._logs.get(number)
        if log is None:
            records_max = self._settings.worker.batch_records_max
            log = self._logs[number] = ReplayLog(self._options, records_max)
        log.limit(bounds)
        driver = self._drivers[number] = PartitionDriver(
            partition, MACHINES[self.agent](), self._open_store(partition), log, self._rules, logger.info
        )  # fmt: skip
        try:
            await driver.process(())  # the end is as good as committed: it catches up with that
            await driver.finish()
            self.positions[number] = end
        finally:
            del self._drivers[number]
            await driver.close()
            if not self._again:
                await self._logs.pop(number).stop()

    async def stop(self) -> None:
        """Disconnect from Kafka."""
        while self._logs:
            await self._logs.popitem()[1].stop()
