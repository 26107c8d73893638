"""What goes to Kafka once the store has what it came from, and what is known to be there."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from typing import Final, NamedTuple

from millpond.agents.driver.outputs import Outputs, needs_source
from millpond.agents.effects import DeadLetter, Output
from millpond.agents.ports import Applied, LoadedState, Log, OutgoingRecord, Record
from millpond.schemas.keys import Partition

# Batches whose outputs may be on their way to Kafka at once: enough to hide its latency, few enough that a
# worker that loses Kafka stops soon.
UNDER_WAY_MAX: Final = 4
OUTGOING_BYTES_MAX: Final = (
    4 * 1024 * 1024
)  # of what is produced at once: look-ups may bring much more


class PendingOutputs(NamedTuple):
    """Outputs of a batch in the store. `applied` is its fence if they are its last, else None. `acknowledged` is None
    if there was nothing to produce; `journaled` is what the store keeps of them until it is told that they are out.
    """

    applied: Applied | None
    journaled: Sequence[Output]
    acknowledged: Awaitable[None] | None


class Outbox:
    """The outputs of one partition, in the order of its batches."""

    def __init__(self, partition: Partition, log: Log, outputs: Outputs) -> None:
        """`finish_journal` comes first."""
        self._partition, self._log, self._outputs = partition, log, outputs
        self._under_way: deque[PendingOutputs] = deque()
        self._done: dict[int, Sequence[Output]] = {}  # journal entries that are out and still kept
        self.produced = 0  # transactions up to this sequence have nothing left to produce
        self.out_until = 0  # outputs of records below this offset are in Kafka; never goes back

    async def finish_journal(self, stored: LoadedState, committed: int | None) -> None:
        """Produce what the store's transactions still owe: an earlier owner's, or one whose reply was lost.

        What this worker has produced itself is not produced again, even if the store still keeps it.
        """
        assert not self._under_way, "wait() comes first"
        for sequence, outputs in sorted(stored.journal.items()):
            if self._done.get(sequence) != outputs:
                offsets = {each.offset for each in outputs if needs_source(each)}
                records = {offset: await self._read(offset) for offset in sorted(offsets)}
                await (await self._produce(outputs, records))
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

    async def _produce(
        self, outputs: Sequence[Output], records: Mapping[int, Record | None]
    ) -> Awaitable[None]:
        """What they refer to is read; then they are on their way, in order, and not too many at once."""
        outgoing: list[OutgoingRecord] = []
        size = 0
        async for record in self._outputs.records(outputs, records):
            outgoing.append(record)
            size += len(record.value or b"")
            if size > OUTGOING_BYTES_MAX:
                await self._log.produce(outgoing)
                outgoing, size = [], 0
        return self._log.produce(outgoing)

    async def put(
        self,
        applied: Applied,
        journaled: Sequence[Output],
        refused: Sequence[DeadLetter],
        records: Sequence[Record],
    ) -> None:
        """Start to produce what a batch in the store owes; `refused` came up only when it was written."""
        acknowledged = None
        by_offset = {record.offset: record for record in records} if journaled or refused else {}
        if refused:
            # Nobody else knows of them: they are on their way before a store that is down can interrupt us.
            self._under_way.append(
                PendingOutputs(None, (), await self._produce(refused, by_offset))
            )
        if journaled:
            acknowledged = await self._produce(journaled, by_offset)
        self._under_way.append(PendingOutputs(applied, journaled, acknowledged))
        await self.wait(UNDER_WAY_MAX)

    async def wait(self, under_way_max: int = 0) -> None:
        """Take note of the batches whose outputs are out; wait while more than so many are under way."""
        waiting = self._under_way
        while waiting and (len(waiting) > under_way_max or waiting[0].acknowledged is None):
            applied, journaled, acknowledged = waiting[0]
            if acknowledged is not None:
                await acknowledged
            waiting.popleft()
            if applied is None:
                continue
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
