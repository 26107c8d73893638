"""Faust's Kafka transport, changed in two things: it hands over whole runs of records, and commits our offsets.

Stock Faust hands an agent one event at a time and tracks acknowledgements per event; both cost more than what we
do with an event, and both lose or repeat events at a rebalance. Here one Faust message is one fetched run of a
partition, and what is committed is what the partition's driver says is in the store with its outputs in Kafka.
The topic is read without acknowledgements (`acks=False`): Faust keeps them per message until it commits by them.
Every override has a contract test (tests/contracts/test_faust.py).
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
    """Yields runs; commits what it is told.

    Set before it starts: `release` lets go of partitions and says what may be committed of them, once;
    `committable` says what may be committed of those that are still owned; `fetched`, if anybody wants to know, is
    told of the records of a partition as they come.
    """

    logger = logging.getLogger("faust.transport")  # or it would say in our name what each part does
    fetched: Callable[[TP, list[Any]], None] | None = None
    run_records_max: int
    run_bytes_max: int
    release: ReleasePartitions
    committable: CommittableOffsets

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Message]]:
        """One message per run of a partition; its value is a list of `Record`, its offset the last one's."""
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
            if self.fetched is not None:
                self.fetched(tp, records)
            for run in self._runs(records):
                if not self.flow_active or self.app.consumer_generation_id != generation:
                    return
                yield tp, self._run_message(tp, run, generation)

    async def _seek_back(self) -> None:
        """What was fetched and not handed over is fetched again, unless a rebalance takes care of it."""
        try:
            await self.perform_seek()
        except Exception as error:
            # In the middle of a rebalance nothing is assigned, or the coordinator is not known.
            self.log.info("Could not seek while the flow was stopped: %r", error)

    def on_buffer_full(self, tp: TP) -> None:
        """The agent's buffer, when full, makes whoever reads from Kafka wait until it has room. Upstream also asks no
        more for the partition, and sleeps for a second once that are all: the agent has long been idle by then.
        """

    def _runs(self, records: list[Any]) -> list[list[Record]]:
        """Bounded in records and bytes; a record that is larger than the bound is a run of its own."""
        runs: list[list[Record]] = []
        size = 0
        for record in records:
            size += max(record.serialized_value_size, 0)  # -1: no value
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
            run,  # type: ignore[arg-type]  # the value is the run: RunSchema hands it over as it is
            None, 0, 0, tp, generation_id=generation,
        )  # fmt: skip

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit what the drivers say is done, if that is news."""
        return await self._commit_news(self.committable())

    async def _commit_news(self, offsets: Mapping[TP, int]) -> bool:
        """Whether there was news, and Kafka has it; if not, it is news the next time too."""
        news = {
            tp: offset
            for tp, offset in offsets.items()
            if offset != self._committed_offset.get(tp) and tp in self.assignment()
        }
        # A thread that crashed serves nobody any more: it would be waited for without end.
        if not news or self._thread.crashed or not await self._commit(news):
            return False
        self._committed_offset.update(news)
        return True

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Let the drivers finish and commit before the partitions are gone; upstream forgets first."""
        self.stop_flow()
        await self._release_and_commit(revoked)
        await super().on_partitions_revoked(revoked)

    async def _release_and_commit(self, partitions: set[TP]) -> None:
        last = await self.release(partitions)
        # One that is under way was told less, and upstream's `commit` would only wait for it.
        await self.maybe_wait_for_commit_to_finish()
        await self._commit_news(last)

    async def on_stop(self) -> None:
        """Release everything and commit, if it ever came to that."""
        with contextlib.suppress(ConsumerNotStarted):
            await self._release_and_commit(self.assignment())
        await super().on_stop()


class Transport(stock.Transport):
    """The stock transport with our consumer."""

    Consumer = Consumer
