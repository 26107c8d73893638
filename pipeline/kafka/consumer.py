"""Reads Kafka topics, and commits what is done: records finish in any order, and the unfinished are bounded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from millpond.pipeline.kafka.log import persist
from millpond.pipeline.kafka.offsets import OffsetTracker
from millpond.pipeline.settings import Settings

logger = logging.getLogger(__name__)

RECORDS_MAX: Final = 500  # of one turn
# A record that comes meanwhile is read at once; this is how soon one that finished is committed.
POLL_TIMEOUT_MS: Final = 100
COMMIT_INTERVAL_S: Final = 0.1
STOP_TIMEOUT_S: Final = 1.0  # for a last commit: what it misses is read again

# Takes a record, and what to call when all that comes of it is in Kafka; raises nothing.
HandleRecord: TypeAlias = Callable[[Any, Callable[[], None]], Awaitable[None]]


class GroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """One consumer of a group. What is not committed when it ends, or loses a partition, is read again."""

    def __init__(
        self, settings: Settings, group_id: str, topics: Sequence[str], handle: HandleRecord
    ) -> None:
        """`run` connects."""
        self._settings, self._group_id, self._topics = settings, group_id, topics
        self._handle = handle
        self._trackers: dict[TopicPartition, OffsetTracker] = {}
        self._commit_at = 0.0

    @property
    def unfinished(self) -> int:
        """Records that were read, and are not done with."""
        return sum(tracker.unfinished for tracker in self._trackers.values())

    async def run(self) -> NoReturn:
        """Until cancelled."""
        self._consumer = AIOKafkaConsumer(
            group_id=self._group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(self._settings.worker.session_timeout_s * 1000),
            heartbeat_interval_ms=int(self._settings.worker.session_timeout_s * 1000 / 4),
            **self._settings.kafka.client_options(),
        )
        self._consumer.subscribe(self._topics, listener=self)
        await persist(self._consumer.start)
        try:
            while True:
                await self._turn()
        finally:
            await self._stop()

    async def _turn(self) -> None:
        fetched = await persist(
            lambda: self._consumer.getmany(timeout_ms=POLL_TIMEOUT_MS, max_records=RECORDS_MAX)
        )
        # All are entered at once: a ledger must not be made of records that were read before a rebalance.
        entered = [self._enter(partition, records) for partition, records in fetched.items()]
        for tracker, records in entered:
            for record in records:
                await self._handle(record, partial(tracker.finish, record.offset))
        self._hold_back()
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._commit_at:
            self._commit_at = now_s + COMMIT_INTERVAL_S
            await self._commit()

    def _enter(
        self, partition: TopicPartition, records: Sequence[Any]
    ) -> tuple[OffsetTracker, Sequence[Any]]:
        tracker = self._trackers.setdefault(partition, OffsetTracker(records[0].offset))
        for record in records:
            tracker.begin(record.offset, len(record.value or b""))
        return tracker, records

    def _hold_back(self) -> None:
        """Read no more of a partition while too much of it is unfinished."""
        for partition in self._consumer.assignment():
            tracker = self._trackers.get(partition)
            if tracker is not None and tracker.full:
                self._consumer.pause(partition)
            else:
                self._consumer.resume(partition)

    async def _commit(self) -> None:
        """What is not committed comes again, as a duplicate."""
        assigned = self._consumer.assignment()
        offsets = {
            partition: offset
            for partition, tracker in self._trackers.items()
            if partition in assigned and (offset := tracker.due()) is not None
        }
        if not offsets:
            return
        trackers = {partition: self._trackers[partition] for partition in offsets}
        try:
            await self._consumer.commit(offsets)
        except KafkaError as error:
            logger.warning("what is done is not committed yet: %r", error)
            return
        for partition, offset in offsets.items():
            trackers[partition].committed(offset)

    async def _stop(self) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._commit()
        except TimeoutError:
            logger.warning("what was done last is not committed: it is read again")
        await self._consumer.stop()

    def on_partitions_revoked(self, revoked: Any) -> None:
        """What is not committed is read again by whoever gets the partition."""
        self._trackers.clear()

    def on_partitions_assigned(self, assigned: Any) -> None:
        """Reading goes on from what was committed."""
