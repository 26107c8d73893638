"""Faust's Kafka transport, changed in two things: it hands over whole runs of records, and commits our offsets.

Stock Faust hands an agent one event at a time and tracks acknowledgements per event; both cost more than what we
do with an event, and both lose or repeat events at a rebalance. Here one Faust message is one fetched run of a
partition, and what is committed is what the partition's driver says is in the store with its outputs in Kafka.
Every override has a contract test (tests/contracts/test_faust.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from faust.transport.drivers import aiokafka as stock
from faust.types import TP
from faust.types.tuples import ConsumerMessage, Message

from agents.ports import Record

ReleasePartitions = Callable[[set[TP]], Awaitable[None]]
CommittableOffsets = Callable[[], Mapping[TP, int]]


class Consumer(stock.Consumer):
    """Yields runs; commits what it is told. `release` and `committable` are set before it starts."""

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
            await self.perform_seek()
            return
        for tp, records in fetched.items():
            if not (active is None or tp in active or tp in self._buffered_partitions):
                continue
            for run in self._runs(records):
                if not self.flow_active or self.app.consumer_generation_id != generation:
                    return
                yield tp, self._run_message(tp, run, generation)

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

    def track_message(self, message: Message) -> None:
        """Nothing waits for a run to be acknowledged: the drivers know what is done."""

    def ack(self, message: Message) -> bool:
        """See `track_message`."""
        return True

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Offsets that are not in the log need no bookkeeping when only finished runs are committed."""

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit what the drivers say is done, if that is news."""
        assignment = self.assignment()
        offsets = {
            tp: offset
            for tp, offset in self.committable().items()
            if tp in assignment and offset != self._committed_offset.get(tp)
        }
        if not offsets or not await self._commit(offsets):
            return False
        self._committed_offset.update(offsets)
        return True

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Let the drivers finish and commit before the partitions are gone; upstream forgets first."""
        self.stop_flow()
        await self.release(revoked)
        await self.commit()
        await super().on_partitions_revoked(revoked)

    async def wait_empty(self) -> None:
        """Upstream waits here without a limit; the drivers have been released, within theirs."""
        await self.commit()

    async def on_stop(self) -> None:
        """Release everything before the last commit."""
        await self.release(set(self.assignment()))
        await super().on_stop()


class Transport(stock.Transport):
    """The stock transport with our consumer."""

    Consumer = Consumer
