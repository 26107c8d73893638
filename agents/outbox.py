"""What goes to Kafka once the store has what it came from, and what is known to be there."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from typing import Final, NamedTuple

from agents.dead_letters import dead_letter
from agents.effects import Output
from agents.ports import Applied, Log, Record, Stored
from schemas.keys import Partition

# Batches whose outputs may be on their way to Kafka at once: enough to hide its latency, few enough that a
# worker that loses Kafka stops soon.
UNDER_WAY_MAX: Final = 4


class UnderWay(NamedTuple):
    """A batch in the store. `acknowledged` is None if it had nothing to produce; `journaled` is what the store
    keeps of its outputs until it is told that they are out.
    """

    applied: Applied
    journaled: Sequence[Output]
    acknowledged: Awaitable[None] | None


class Outbox:
    """The outputs of one partition, in the order of its batches."""

    def __init__(self, partition: Partition, log: Log) -> None:
        """`finish_journal` comes first."""
        self._partition, self._log = partition, log
        self._under_way: deque[UnderWay] = deque()
        self._done: dict[int, Sequence[Output]] = {}  # journal entries that are out and still kept
        self.produced = 0  # transactions up to this sequence have nothing left to produce
        self.out_until = 0  # outputs of records below this offset are in Kafka; never goes back
        self.dead_letters = 0

    async def finish_journal(self, stored: Stored, committed: int | None) -> None:
        """Produce what the store's transactions still owe: an earlier owner's, or one whose reply was lost.

        What this worker has produced itself is not produced again, even if the store still keeps it.
        """
        assert not self._under_way, "wait() comes first"
        for sequence, outputs in sorted(stored.journal.items()):
            if self._done.get(sequence) != outputs:
                records = {output.offset: await self._read(output.offset) for output in outputs}
                await self._produce(outputs, records)
        self._done = dict(stored.journal)
        if stored.applied is not None:
            self.produced = stored.applied.sequence
            self.out_until = max(self.out_until, stored.applied.offset + 1)
        self.out_until = max(self.out_until, committed or 0)

    async def _read(self, offset: int) -> Record | None:
        found = None
        async for run in self._log.read(self._partition, offset, offset + 1):
            found = run[0]
        return found

    def _produce(
        self, outputs: Sequence[Output], records: Mapping[int, Record | None]
    ) -> Awaitable[None]:
        self.dead_letters += len(outputs)
        return self._log.produce(
            [dead_letter(self._partition, output, records.get(output.offset)) for output in outputs]
        )

    async def put(
        self,
        applied: Applied,
        journaled: Sequence[Output],
        refused: Sequence[Output],
        records: Sequence[Record],
    ) -> None:
        """Start to produce what a batch in the store owes; `refused` came up only when it was written."""
        acknowledged = None
        if journaled or refused:
            by_offset = {record.offset: record for record in records}
            acknowledged = self._produce([*journaled, *refused], by_offset)
        self._under_way.append(UnderWay(applied, journaled, acknowledged))
        await self.wait(UNDER_WAY_MAX)

    async def wait(self, under_way_max: int = 0) -> None:
        """Take note of the batches whose outputs are out; wait while more than so many are under way."""
        waiting = self._under_way
        while waiting and (len(waiting) > under_way_max or waiting[0].acknowledged is None):
            applied, journaled, acknowledged = waiting[0]
            if acknowledged is not None:
                await acknowledged
            waiting.popleft()
            if journaled:
                self._done[applied.sequence] = journaled
            self.produced = applied.sequence
            self.out_until = max(self.out_until, applied.offset + 1)

    def notes(self) -> list[int]:
        """The journal entries that are out, and that the store may forget."""
        return list(self._done)

    def noted(self, sequences: Sequence[int]) -> None:
        """The store has forgotten these journal entries."""
        for sequence in sequences:
            self._done.pop(sequence, None)
