"""The outputs of one partition on their way to Kafka, after the transaction that decided them.

A transaction stores its outputs in the journal. The outbox produces them, and the next transaction removes the entry.
So a worker that dies in between leaves the entry to the next owner, which produces it (again).

Dead letters of refused parts are the exception: they are known only from the reply, so no journal has them. They are
lost if the reply is lost, or if the worker dies before Kafka has them. Then the other parts of the record stay, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from typing import Final, NamedTuple

from millpond.agents.driver.outputs import Outputs, needs_source
from millpond.agents.effects import DeadLetter, Output
from millpond.agents.ports import Applied, LoadedState, Log, OutgoingRecord, Record
from millpond.schemas.keys import Partition

# Batches whose outputs Kafka may have yet to acknowledge: enough to hide its latency, few enough that a worker without
# Kafka stops soon.
PENDING_MAX: Final = 4
# Produced at once. Look-ups can bring much more, and all of it would be in memory.
OUTGOING_BYTES_MAX: Final = 4 * 1024 * 1024


class PendingOutputs(NamedTuple):
    """Outputs of a batch that the store has applied, and that Kafka may have yet to acknowledge.

    `applied` is the batch's fence. It is None for dead letters of refused parts: the batch's other outputs follow them.
    `journaled` is the batch's journal entry. `acknowledged` is None if there was nothing to produce.
    """

    applied: Applied | None
    journaled: Sequence[Output]
    acknowledged: Awaitable[None] | None


class Outbox:
    """The outputs of one partition, in the order of its batches."""

    def __init__(self, partition: Partition, log: Log, outputs: Outputs) -> None:
        """Call `finish_journal` before anything else."""
        self._partition, self._log, self._outputs = partition, log, outputs
        self._pending: deque[PendingOutputs] = deque()
        # Journal entries that Kafka has, and that the store still keeps: sequence → outputs.
        self._produced: dict[int, Sequence[Output]] = {}
        self.produced = 0  # transactions up to this sequence have nothing left to produce
        # Kafka has the outputs of all records below it. It never goes back.
        self.committable_offset = 0

    async def finish_journal(self, stored: LoadedState, committed: int | None) -> None:
        """Produce the journal's entries: those of an earlier owner, and those of a transaction whose reply was lost.

        An entry that this worker has produced already is not produced again. `committed` is Kafka's committed offset.
        """
        assert not self._pending, "wait() comes first"
        for sequence, outputs in sorted(stored.journal.items()):
            # A sequence alone is not enough: after a failover, another owner may have used the same number.
            if self._produced.get(sequence) != outputs:
                offsets = {each.offset for each in outputs if needs_source(each)}
                records = {offset: await self._read(offset) for offset in sorted(offsets)}
                await (await self._produce(outputs, records))
        self._produced = dict(stored.journal)
        if stored.applied is not None:
            self.produced = stored.applied.sequence
            self.committable_offset = max(self.committable_offset, stored.applied.offset + 1)
        self.committable_offset = max(self.committable_offset, committed or 0)

    async def _read(self, offset: int) -> Record | None:
        """Return a record of the log, or None if retention has removed it."""
        found = None
        async for run in self._log.read(self._partition, offset, offset + 1):
            found = run[0]
        return found

    async def _produce(
        self, outputs: Sequence[Output], records: Mapping[int, Record | None]
    ) -> Awaitable[None]:
        """Read what the outputs refer to, and start to produce them in order. The result waits for Kafka.

        All but the last `OUTGOING_BYTES_MAX` are acknowledged on return.
        """
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
        """Start to produce the outputs of a batch that the store has applied.

        `refused` are the dead letters of refused parts, `records` the records of the batch.
        """
        acknowledged = None
        by_offset = {record.offset: record for record in records} if journaled or refused else {}
        if refused:
            # No journal has them, so they come first: producing the others reads the store, which can raise StoreDown.
            self._pending.append(PendingOutputs(None, (), await self._produce(refused, by_offset)))
        if journaled:
            acknowledged = await self._produce(journaled, by_offset)
        self._pending.append(PendingOutputs(applied, journaled, acknowledged))
        await self.wait(PENDING_MAX)

    async def wait(self, pending_max: int = 0) -> None:
        """Wait for Kafka until at most `pending_max` batches are pending, and advance the committable offset."""
        pending = self._pending
        while pending and (len(pending) > pending_max or pending[0].acknowledged is None):
            applied, journaled, acknowledged = pending[0]
            if acknowledged is not None:
                await acknowledged
            pending.popleft()
            if applied is None:
                continue
            if journaled:
                self._produced[applied.sequence] = journaled
            self.produced = applied.sequence
            self.committable_offset = max(self.committable_offset, applied.offset + 1)

    def produced_entries(self) -> list[int]:
        """Return the journal entries that Kafka has, for the next transaction to remove."""
        return list(self._produced)

    def entries_removed(self, sequences: Sequence[int]) -> None:
        """Note that the store has removed these journal entries."""
        for sequence in sequences:
            self._produced.pop(sequence, None)
