"""The log of one agent, folded into a store by the same driver and machines as live."""

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

# While one partition waits for Kafka or Redis, another one uses the processor. More than these would only use memory.
PARTITIONS_AT_ONCE: Final = 4

OpenStore = Callable[[Partition], Store[Any]]


class Folding:
    """Folds the partitions of an agent, each from its start. `fold_to` may be called again with later ends.

    A partition continues at the applied offset of its store. So an interrupted replay folds nothing twice.

    `positions`: the next offset of each partition that was folded to an end.
    """

    def __init__(
        self,
        agent: AgentName,
        settings: Settings,
        rules: Rules,
        open_store: OpenStore,
        cluster_id: str,
        starts: Mapping[int, int],
        *,
        keep_connected: bool = False,
    ) -> None:
        """`rules` are in force until the log names others.

        With `keep_connected`, each partition stays connected to Kafka for the next `fold_to`. Call `stop` at the end.
        """
        self.agent, self._settings, self._rules = agent, settings, rules
        self._open_store, self._cluster_id, self._starts = open_store, cluster_id, dict(starts)
        self._options = settings.kafka.client_options()
        self._keep_connected, self._logs = keep_connected, dict[int, ReplayLog]()
        self._drivers: dict[int, PartitionDriver[Any]] = {}
        self.positions: dict[int, int] = {}

    @property
    def folded(self) -> int:
        """The number of offsets between the starts and the current positions, skipped records and gaps included."""
        running = {number: driver.next_offset for number, driver in self._drivers.items()}
        return sum(
            max(position - self._starts[number], 0)
            for number, position in {**self.positions, **running}.items()
        )

    async def fold_to(self, ends: Mapping[int, int]) -> None:
        """Fold each partition up to its end, exclusive.

        Raises:
            LogMismatch: the store has state of another log, or of offsets behind the end.
            StoreRefused: the store refuses the user.
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
            topic = self._settings.kafka.topic_name(partition.topic)
            log = self._logs[number] = ReplayLog(self._options, topic, records_max)
        log.limit(bounds)
        driver = self._drivers[number] = PartitionDriver(
            partition, MACHINES[self.agent](), self._open_store(partition), log, self._rules, logger.info
        )  # fmt: skip
        try:
            # No records: the end counts as committed, so the driver catches up with it by itself.
            await driver.process(())
            await driver.finish()
            self.positions[number] = end
        finally:
            del self._drivers[number]
            await driver.close()
            if not self._keep_connected:
                await self._logs.pop(number).stop()

    async def stop(self) -> None:
        """Disconnect from Kafka."""
        while self._logs:
            await self._logs.popitem()[1].stop()
