"""A consumer of a group, for bridges: it hands records to a handler, and commits the offsets of finished ones.

A record is *finished* when Kafka has everything that the handler made of it: a report, an event, a dead letter.
Records finish in any order. One `OffsetTracker` for each partition knows which are unfinished.

Invariants:

1. Every record below a committed offset is finished. So a crash repeats records, and loses none.
2. The unfinished records of a partition are bounded. A full partition is paused until enough of them finish.
3. After a rebalance no offset of an earlier assignment is committed. The next owner reads those records again.

Each round reads, hands over, pauses full partitions, and commits if a commit is due.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from millpond.pipeline.kafka.offsets import OffsetTracker
from millpond.pipeline.kafka.retrying import persist, started
from millpond.pipeline.settings import Settings

logger = logging.getLogger(__name__)

RECORDS_MAX: Final = 500  # of one round
# Delays no record: a poll returns as soon as one arrives. Without records it bounds the wait until the next commit.
POLL_TIMEOUT_MS: Final = 100
COMMIT_INTERVAL_S: Final = 0.1
STOP_TIMEOUT_S: Final = (
    1.0  # for the last commit; without it the next owner reads the records again
)

# Takes a record, and a function to call when the record is finished. Must not raise.
HandleRecord: TypeAlias = Callable[[Any, Callable[[], None]], Awaitable[None]]


class GroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """One member of a consumer group. Uncommitted records are read again after a stop or rebalance."""

    def __init__(
        self, settings: Settings, group_id: str, topics: Sequence[str], handle: HandleRecord
    ) -> None:
        self._settings, self._group_id, self._topics = settings, group_id, topics
        self._handle = handle
        self._trackers: dict[TopicPartition, OffsetTracker] = {}
        self._commit_at = 0.0

    @property
    def unfinished(self) -> int:
        """The number of records that were read and are not finished."""
        return sum(tracker.unfinished for tracker in self._trackers.values())

    async def run(self) -> NoReturn:
        """Connect, and consume until cancelled. Waits while Kafka is down."""
        self._consumer = await started(self._new_consumer)
        try:
            while True:
                await self._poll_once()
        finally:
            await self._stop()

    def _new_consumer(self) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            group_id=self._group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(self._settings.worker.session_timeout_s * 1000),
            heartbeat_interval_ms=int(self._settings.worker.session_timeout_s * 1000 / 4),
            **self._settings.kafka.client_options(),
        )
        consumer.subscribe(self._topics, listener=self)
        return consumer

    async def _poll_once(self) -> None:
        fetched = await persist(
            lambda: self._consumer.getmany(timeout_ms=POLL_TIMEOUT_MS, max_records=RECORDS_MAX)
        )
        # Track all partitions before the first await. A rebalance during an await drops the trackers. A tracker made
        # after that would hold records of the earlier assignment, and their offsets would be committed.
        tracked = [self._track(partition, records) for partition, records in fetched.items()]
        for tracker, records in tracked:
            for record in records:
                await self._handle(record, partial(tracker.finish, record.offset))
        self._pause_full_partitions()
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._commit_at:
            self._commit_at = now_s + COMMIT_INTERVAL_S
            await self._commit()

    def _track(
        self, partition: TopicPartition, records: Sequence[Any]
    ) -> tuple[OffsetTracker, Sequence[Any]]:
        tracker = self._trackers.setdefault(partition, OffsetTracker(records[0].offset))
        for record in records:
            tracker.begin(record.offset, len(record.value or b""))
        return tracker, records

    def _pause_full_partitions(self) -> None:
        """Pause partitions with too many unfinished records, and resume the others."""
        for partition in self._consumer.assignment():
            tracker = self._trackers.get(partition)
            if tracker is not None and tracker.full:
                self._consumer.pause(partition)
            else:
                self._consumer.resume(partition)

    async def _commit(self) -> None:
        """Commit the offsets of finished records. A commit that fails is logged, and tried again in the next round."""
        assigned = self._consumer.assignment()
        offsets = {
            partition: offset
            for partition, tracker in self._trackers.items()
            if partition in assigned and (offset := tracker.offset_to_commit()) is not None
        }
        if not offsets:
            return
        trackers = {partition: self._trackers[partition] for partition in offsets}
        try:
            await self._consumer.commit(offsets)
        except KafkaError as error:
            logger.warning("%s: cannot commit offsets: %r; trying again", self._group_id, error)
            return
        for partition, offset in offsets.items():
            trackers[partition].mark_committed(offset)

    async def _stop(self) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._commit()
        except TimeoutError:
            logger.warning(
                "%s: Kafka did not take the last commit within %.0f s: the next owner handles those records again",
                self._group_id,
                STOP_TIMEOUT_S,
            )
        await self._consumer.stop()

    def on_partitions_revoked(self, revoked: Any) -> None:
        """Drop all trackers. aiokafka revokes every partition at each rebalance, also those that stay here."""
        self._trackers.clear()

    def on_partitions_assigned(self, assigned: Any) -> None:
        """Do nothing: aiokafka continues at the committed offsets."""
