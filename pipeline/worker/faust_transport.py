"""Faust's Kafka transport with two changes: it hands over whole runs of records, and commits the drivers' offsets.

Stock Faust hands an agent one record at a time, and tracks an acknowledgement for each. Both cost more than folding the
record. Both also lose or repeat records at a rebalance.

Concepts:

- A *run* is a list of records of one partition, in order. Here it is the value of one Faust message.
- A *driver's committable offset*: below it, the store has every record, and Kafka has the outputs.
- A *generation* is Faust's number of the current assignment. A rebalance begins a new one.
- The *flow* is stopped while a rebalance takes partitions away.

Invariants, and how they are kept:

1. **Only committable offsets are committed.** `force_commit`, the end of every commit of Faust's, asks `committable`.
   The topic is read with `acks=False`: otherwise Faust would collect acknowledgements that nothing removes.
2. **No run of an older generation is handed over.** `getmany` looks before each run. Faust drops those in its streams.
3. **A released partition is committed once, with its last offset, before another worker owns it.** `release` finishes
   the partition's batch. The commit follows, and only then does Kafka learn that the partition is free.
   The periodic commit cannot commit the partition afterwards: `committable` no longer contains it.

ON stop: release all partitions, wait for a commit on its way, commit the last offsets.
ON revoked: stop the flow, then the same for the revoked partitions.

The overrides and private names of Faust have contract tests in tests/contracts/test_faust.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from faust.exceptions import ConsumerNotStarted
from faust.transport.drivers import aiokafka as stock
from faust.types import TP
from faust.types.tuples import ConsumerMessage, Message

from millpond.agents.ports import Record

ReleasePartitions = Callable[[set[TP]], Awaitable[Mapping[TP, int]]]
CommittableOffsets = Callable[[], Mapping[TP, int]]


class Consumer(stock.Consumer):
    """Yields runs, and commits the drivers' offsets.

    A subclass sets these before the consumer starts:

    - `release` finishes and gives up partitions, and returns the last offset to commit for each.
    - `committable` returns the offset that may be committed, for each owned partition that has one.
    - `on_fetched`, optional, gets the records of a partition before they are handed over.
    """

    # mode names a logger after the module of a class. This name is among the libraries that log from WARNING on.
    logger = logging.getLogger("faust.transport")
    on_fetched: Callable[[TP, list[Any]], None] | None = None
    run_records_max: int
    run_bytes_max: int
    release: ReleasePartitions
    committable: CommittableOffsets

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Message]]:
        """Yield one message for each run. Its value is a list of `Record`; its offset is that of the last record."""
        fetched, active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if fetched is None or self.should_stop:
            return
        if not self.flow_active:
            await self._seek_back()
            return
        for tp, records in fetched.items():
            if not (active is None or tp in active or tp in self._buffered_partitions):
                continue
            if self.on_fetched is not None:
                self.on_fetched(tp, records)
            for run in self._runs(records):
                if not self.flow_active or self.app.consumer_generation_id != generation:
                    return
                yield tp, self._run_message(tp, run, generation)

    async def _seek_back(self) -> None:
        """Return to the committed offsets: records that were fetched and not handed over must be fetched again."""
        try:
            await self.perform_seek()
        except Exception as error:
            # During a rebalance no partition is assigned, or the coordinator is unknown. A new assignment starts at
            # the committed offsets in any case.
            self.log.info("cannot seek while a rebalance runs: %r", error)

    def on_buffer_full(self, tp: TP) -> None:
        """Do nothing. A full buffer already makes Faust's fetch loop wait until the agent has taken a run.

        Upstream also stops fetching the partition. With all partitions stopped it sleeps for a second, although the
        agent empties its buffer much sooner.
        """

    def _runs(self, records: list[Any]) -> list[list[Record]]:
        """Split records into runs of bounded length and size. A record above the size bound is a run of its own."""
        runs: list[list[Record]] = []
        size = 0
        for record in records:
            size += max(record.serialized_value_size, 0)  # -1 without a value
            full = not runs or size > self.run_bytes_max or len(runs[-1]) >= self.run_records_max
            if full:
                runs.append([])
                size = max(record.serialized_value_size, 0)
            runs[-1].append(Record(record.offset, record.timestamp, record.key, record.value))
        return runs

    def _run_message(self, tp: TP, run: list[Record], generation: int) -> Message:
        last = run[-1]
        return ConsumerMessage(
            tp.topic, tp.partition, last.offset, last.timestamp / 1000, 1, [], None,
            run,  # type: ignore[arg-type]  # RunSchema hands the value over unchanged
            None, 0, 0, tp, generation_id=generation,
        )  # fmt: skip

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit the offsets of `committable` that changed."""
        return await self._commit_changed(self.committable())

    async def _commit_changed(self, offsets: Mapping[TP, int]) -> bool:
        """Commit the offsets that differ from the last committed ones. True if there were any and Kafka has them.

        After a failure the next call tries them again.
        """
        changed = {
            tp: offset
            for tp, offset in offsets.items()
            if offset != self._committed_offset.get(tp) and tp in self.assignment()
        }
        # A crashed consumer thread answers no calls: `_commit` would wait without end.
        if not changed or self._thread.crashed or not await self._commit(changed):
            return False
        self._committed_offset.update(changed)
        return True

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Release the partitions and commit before they move. Upstream first forgets what to commit."""
        self.stop_flow()
        await self._release_and_commit(revoked)
        await super().on_partitions_revoked(revoked)

    async def _release_and_commit(self, partitions: set[TP]) -> None:
        last = await self.release(partitions)
        # A commit on its way has older offsets. Upstream's `commit` would wait for it, and not commit these.
        await self.maybe_wait_for_commit_to_finish()
        await self._commit_changed(last)

    async def on_stop(self) -> None:
        """Release all partitions and commit. A consumer that never started has none."""
        with contextlib.suppress(ConsumerNotStarted):
            await self._release_and_commit(self.assignment())
        await super().on_stop()


class Transport(stock.Transport):
    """The stock transport with our consumer."""

    Consumer = Consumer
