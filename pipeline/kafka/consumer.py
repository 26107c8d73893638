"""A consumer of a group, for bridges: it hands records to a handler, and commits the offsets of finished ones.

A record is *finished* when Kafka has everything that the handler made of it: a report, an event, a dead letter.
Records finish in any order. One `OffsetTracker` for each partition knows which are unfinished.

Invariants:

1. Every record below a committed offset is finished. So a crash repeats records, and loses none.
2. The unfinished records of a partition are bounded. A full partition is paused until enough of them finish.
3. A rebalance ends every assignment, also of partitions that stay here. No offset of it is committed afterwards.
4. A record that nothing was done about when its assignment ended is left to the next owner. Before that owner reads, what
   is under way is finished and committed, if this takes less than `SETTLE_TIMEOUT_S`. So a rebalance repeats few records.

Each round reads, hands over, pauses full partitions, and commits if a commit is due.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

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
# At the end of an assignment: how long the group waits for this member
SETTLE_TIMEOUT_S: Final = 2.0


class RecordClaim(NamedTuple):
    """A record that a member of the group has read and not finished."""

    tracker: OffsetTracker
    offset: int

    def finish(self) -> None:
        """Allow the commit of the record. After a rebalance this changes nothing."""
        self.tracker.finish(self.offset)

    def is_revoked(self) -> bool:
        """True if the next owner of the partition reads the record, too: only finish what is under way."""
        return self.tracker.revoked


# Takes a record and the claim to it. Must not raise.
HandleRecord: TypeAlias = Callable[[Any, RecordClaim], Awaitable[None]]
# Waits until nothing is under way. It is called when all claims are revoked.
Settle: TypeAlias = Callable[[], Awaitable[None]]


def after_calls(count: int, call: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls `call` when it has been called `count` times: a record with several results."""
    left = count

    def one() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            call()

    return one


class GroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """One member of a consumer group. Uncommitted records are read again after a stop or rebalance."""

    def __init__(
        self,
        settings: Settings,
        group_id: str,
        topics: Sequence[str],
        handle: HandleRecord,
        settle: Settle,
    ) -> None:
        """`topics` are names in Kafka: a user's, or from `KafkaSettings.topic_name`."""
        self._settings, self._group_id, self._topics = settings, group_id, topics
        self._handle, self._settle = handle, settle
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
        # Track all partitions before the first await: aiokafka returns no records of an assignment that has ended, but
        # this one may end during an await. Then nothing more of it is handed over.
        tracked = [self._track(partition, records) for partition, records in fetched.items()]
        for tracker, records in tracked:
            for record in records:
                if tracker.revoked:
                    break
                await self._handle(record, RecordClaim(tracker, record.offset))
        self._pause_full_partitions()
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._commit_at:
            self._commit_at = now_s + COMMIT_INTERVAL_S
            await self._commit(self._trackers)

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

    async def _commit(self, trackers: Mapping[TopicPartition, OffsetTracker]) -> None:
        """Commit the offsets of finished records. A commit that fails is logged, and tried again in the next round."""
        offsets = {
            partition: offset
            for partition, tracker in trackers.items()
            if (offset := tracker.offset_to_commit()) is not None
        }
        if not offsets:
            return
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
                await self._commit(self._trackers)
        except TimeoutError:
            logger.warning(
                "%s: Kafka did not take the last commit within %.0f s: the next owner handles those records again",
                self._group_id,
                STOP_TIMEOUT_S,
            )
        await self._consumer.stop()

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Revoke all claims, finish what is under way, and commit. The group waits for this call."""
        trackers, self._trackers = self._trackers, {}
        for tracker in trackers.values():
            tracker.revoked = True
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                await self._settle()
                await self._commit(trackers)
        except TimeoutError:
            logger.warning(
                "%s: some records are still under way %g s after their partitions were revoked: the next owner repeats them",
                self._group_id,
                SETTLE_TIMEOUT_S,
            )

    def on_partitions_assigned(self, assigned: Any) -> None:
        """Do nothing: aiokafka continues at the committed offsets."""
