"""The one driver of all machines: load, skip, step, commit, output — for one partition.

The order of one batch, and why:

1. decode what the agent owns, load what the steps want, step, pack — while the batch before is in the store;
2. wait for the batch before: only now is it known what the store refused of it;
3. send this batch: effects, applied offset, sequence and journal in one fenced transaction;
4. once it is in, produce its outputs; the next transaction notes that they are out;
5. what is in the store and has its outputs in Kafka may be committed (`committable`).

A store that is down or was written by somebody else is loaded again and compared: what it has is skipped, what it
lost is read from the log again. Nothing is ever sent twice blindly.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic

from millpond.agents.driver.batch import Batch, FoldedEvent, HalfWrittenEvent, InFlight, sort_out
from millpond.agents.driver.decoding import RecordDecoder
from millpond.agents.driver.log_identity import compare
from millpond.agents.driver.observer import NullObserver, Observer
from millpond.agents.driver.outbox import Outbox
from millpond.agents.driver.outputs import Outputs
from millpond.agents.driver.rules_in_force import RulesInForce, lost_rules
from millpond.agents.driver.ticks import Ticks
from millpond.agents.effects import DeadLetter, Effect, Output
from millpond.agents.ports import (
    Applied,
    Log,
    Machine,
    OutgoingRecord,
    Packed,
    Record,
    Store,
    Transaction,
)
from millpond.agents.reads import READS_AFTER_COMMIT
from millpond.schemas import codec, keys
from millpond.schemas.errors import BrokenInvariant, DecodeError, Fenced, StoreDown, StoreError
from millpond.schemas.events import Base, Event, RulesChanged, Tick
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

NOTHING: Final = Record(-1, 0, None, None)


class PartitionDriver(Generic[Packed]):
    """Drives one machine over one partition. Calls must not overlap."""

    def __init__(
        self,
        partition: Partition,
        machine: Machine,
        store: Store[Packed],
        log: Log,
        rules: Rules,
        notice: Callable[[str], None],
        observer: Observer | None = None,
    ) -> None:
        """`rules` are this worker's; `notice` gets one line for each notable moment."""
        self.partition, self.machine, self.store, self.log = partition, machine, store, log
        self._notice, self._observer = notice, observer or NullObserver()
        self._rules = RulesInForce(rules)
        self._decoder = RecordDecoder(partition, machine.owns)
        self._outputs = Outputs(partition, store.read)
        self._outbox = Outbox(partition, log, self._outputs)
        self._ticks = Ticks()
        self._loaded = False
        self._cluster_id, self._partition_count = "", 0
        self._applied: Applied | None = None
        self._last = NOTHING  # the last record folded or skipped
        self._position = 0  # the next offset to fold
        self._reached = 0  # the highest position ever, whatever the store has
        self._sequence = self._now_ms = self._score = 0
        self._in_flight: InFlight | None = None
        self._half_written: list[HalfWrittenEvent] = []  # the next transaction cleans up after them
        self.records_lost = 0

    # -- what the worker calls --------------------------------------------------------------------------

    async def start(self) -> None:
        """Load, finish what the last owner left undone, catch up, and put this worker's rules in force.

        Raises:
            LogMismatch: the store belongs to another log.
            StoreRefused: the store will not serve us.
        """
        await self._retry_with_reload([])
        await self._announce_rules()

    async def process(self, records: Sequence[Record]) -> None:
        """Fold records, in order. When it returns, all but the last batch are in the store.

        Raises:
            BrokenInvariant: a bug of ours, at the record that it names; nothing of its batch is written.
        """
        await self._retry_with_reload(records)

    async def settle(self) -> None:
        """Everything processed is in the store, and its outputs are out."""
        await self._retry_with_reload([], self._settle)

    async def maintain(self) -> None:
        """Once a second: finish what is in flight, note what is out, and see that the store is still ours."""
        await self.finish()
        await self._announce_rules()

    async def finish(self) -> None:
        """Everything processed, and how far that is, is in the store; nothing is left in flight or to be noted."""
        await self._retry_with_reload([], self._maintain)

    async def close(self) -> None:
        """Finish what is in flight, once, and let go. The store's errors pass: the next owner goes on from there."""
        try:
            if self._loaded:
                await self._settle()
                await self._write_notes()
        except StoreError as error:
            self._notice(
                f"{self.partition}: {error}; the next owner goes on from what the store holds"
            )
        finally:
            await self.store.close()

    def tick(self, wall_ms: int) -> OutgoingRecord | None:
        """The tick to produce now: if something is due by the owner's clock and no tick is under way."""
        if not self._ticks.send(self.machine.next_due_ms, wall_ms):
            return None
        return self._to_own_partition(
            Tick(at=wall_ms, node=keys.AGENT_NODE, agent=self.partition.agent)
        )

    @property
    def committable(self) -> int | None:
        """The offset to commit: everything below is in the store and its outputs are in Kafka.

        A store that lost its content is rebuilt from lower offsets, but what was sent is not sent again: this
        never goes back.
        """
        return self._outbox.out_until or None

    @property
    def next_offset(self) -> int:
        """The next offset to be folded."""
        return self._position

    @property
    def records_skipped(self) -> int:
        """Records of other agents so far."""
        return self._decoder.records_skipped

    # -- load and compare -------------------------------------------------------------------------------

    async def _retry_with_reload(
        self, records: Sequence[Record], then: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Fold `records` and do `then`, whatever happens to the store in the meantime."""
        while True:
            try:
                if not self._loaded:
                    await self._load()
                await self._catch_up(records[0].offset if records else self._reached)
                await self._fold(records)
                if then is not None:
                    await then()
                return
            except (StoreDown, Fenced) as error:
                self._notice(f"{self.partition}: {error}; loading what the store holds")
                self._forget()
            except Exception as error:
                superseded = await self._superseded()
                self._forget()
                if not superseded:
                    raise
                self._notice(f"{self.partition}: {error}; but it has another owner by now: loading")
            except BaseException:
                # The position is beyond what was stepped and never sent: nobody may write it any more.
                self._forget()
                raise

    async def _superseded(self) -> bool:
        """Whether somebody else may have written: what we read was then of another time than what we hold."""
        if not self._loaded:
            return False
        try:
            await self._finish()
            await self.store.check()
        except (StoreDown, Fenced):
            return True
        return False

    def _forget(self) -> None:
        if self._in_flight is not None:
            self._half_written[:0] = self._in_flight.cleaned
        self._in_flight, self._loaded = None, False

    async def _load(self) -> None:
        await self._outbox.wait()
        stored = await self.store.load()
        bounds = await self.log.bounds(self.partition)
        applied = self._applied = stored.applied
        await compare(self.partition, applied, bounds, self.log)
        self._cluster_id, self._partition_count = bounds.cluster_id, bounds.partition_count
        self._outputs.partition_count = bounds.partition_count
        self._position, self._last = bounds.start, NOTHING
        self._now_ms = self._score = 0
        if applied is not None:
            self._position = applied.offset + 1
            self._last = Record(applied.offset, applied.timestamp, None, None)
            self._now_ms, self._score = applied.now_ms, applied.score
            # Never below what this worker has used: a store that lost writes must not see a sequence twice.
            self._sequence = max(self._sequence, applied.sequence)
        self._reached = max(self._reached, self._position, bounds.start, bounds.committed or 0)
        self._half_written = [
            half for half in self._half_written if half.refusal.offset < self._position
        ]
        self._decoder.forget()
        self._ticks.forget()
        state = {} if applied is None else applied.machine
        rules = stored.rules if applied else await lost_rules(self.partition, bounds, self.log)
        self.machine.restore(state, stored, self._rules.restore(rules))
        await self._supply(())
        await self._outbox.finish_journal(stored, bounds.committed)
        self._loaded = True

    async def _catch_up(self, target: int) -> None:
        """Fold what the log holds up to `target` and was not handed over: lost by the store, or by a rebalance."""
        if self._position >= target:
            return
        start = (await self.log.bounds(self.partition)).start
        lost = min(start, target) - self._position
        if lost > 0:
            self.records_lost += lost
            self._position += lost
            self._notice(
                f"{self.partition}: {lost} records were gone from the log before they were read"
            )
        why = "reading" if self._applied else "the store holds nothing of it: rebuilding it from"
        self._notice(f"{self.partition}: {why} the log from {self._position} to {target}")
        async for run in self.log.read(self.partition, self._position, target):
            await self._fold(run)
        self._position = max(self._position, target)

    # -- fold -------------------------------------------------------------------------------------------

    async def _fold(self, records: Sequence[Record]) -> None:
        """Step and send the records from the position on, in as few transactions as may be."""
        batch = Batch()
        for record in records:
            if record.offset < self._position:
                continue
            found = self._decoder.event(record)
            alone = isinstance(found, Base) and self.machine.alone(found)
            if alone:
                if batch.owned:
                    await self._send(batch)
                await self._finish()
                batch = Batch()
            self._advance(record)
            batch.add(record, found, self._now_ms)
            if alone:
                await self._send(batch)
                batch = Batch()
        if batch.owned:
            await self._send(batch)

    def _advance(self, record: Record) -> None:
        self._now_ms = max(self._now_ms, record.timestamp)
        self._last, self._position = record, record.offset + 1
        self._reached = max(self._reached, self._position)

    async def _send(self, batch: Batch) -> None:
        """One transaction, packed while the one before is in the store."""
        cleaned = tuple(self._half_written)
        self._observer.stepping(self._sequence + 1)
        effects, outputs = await self._step(batch, cleaned)
        applied = Applied(
            offset=self._last.offset,
            timestamp=self._last.timestamp,
            cluster_id=self._cluster_id,
            partition_count=self._partition_count,
            sequence=self._sequence + 1,
            produced=self._outbox.produced,
            now_ms=self._now_ms,
            score=self._score,
            machine=self.machine.partition_state(),
        )
        transaction = Transaction(self._applied, applied, effects, outputs, self._outbox.notes())
        packed = self.store.pack(transaction)
        await self._finish()
        del self._half_written[: len(cleaned)]
        self._in_flight = InFlight(transaction, batch, cleaned, self.store.commit(packed))
        self._applied, self._sequence = applied, applied.sequence

    async def _step(
        self, batch: Batch, half_written: Sequence[HalfWrittenEvent]
    ) -> tuple[list[Effect], list[Output]]:
        """What the batch asks of the store and of Kafka; what is out already is not asked for again."""
        machine, out_until = self.machine, self._outbox.out_until
        effects: list[Effect] = []
        if half_written:
            await self._supply([half.event for half in half_written])
            for half in half_written:
                effects.extend(machine.refused(half.event, half.refusal))
        outputs: list[Output] = [x for x in batch.unreadable if x.offset >= out_until]
        await self._supply([folded.event for folded in batch.folded])
        for folded in batch.folded:
            for item in self._decide(folded):
                if not isinstance(item, Output):
                    effects.append(item)
                elif folded.record.offset >= out_until:
                    outputs.append(item)
        effects.extend(machine.finish())
        return effects, outputs

    async def _supply(self, events: Sequence[Event]) -> None:
        while reads := self.machine.wanted(events, self._now_ms):
            if self._in_flight is not None and any(
                isinstance(x, READS_AFTER_COMMIT) for x in reads
            ):
                await self._finish()
            for read, answer in zip(reads, await self.store.read(reads), strict=True):
                self.machine.supply(read, answer)

    def _decide(self, folded: FoldedEvent) -> Sequence[Effect | Output]:
        record, event, now_ms = folded
        self._score = max(record.timestamp * 1000, self._score + 1)
        try:
            decided = self.machine.step(record.offset, event, now_ms, self._score)
        except DecodeError as error:
            return (DeadLetter(record.offset, str(error)),)
        except Exception as error:
            where = f"{self.partition}: offset {record.offset}"
            raise BrokenInvariant(f"{where}: {error!r}") from error
        if isinstance(event, RulesChanged):
            self._decoder.forget()
            self._rules.changed(self.machine.rules)
        elif isinstance(event, Tick):
            self._ticks.folded(now_ms)
        return decided

    # -- finish -----------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Wait until the batch in flight is in the store, then start to produce what it owes."""
        if self._in_flight is None:
            return
        transaction, batch, _, committing = self._in_flight
        refusals = await committing
        self._in_flight = None
        self.machine.settled()
        self._outbox.noted(transaction.produced)
        half_written, letters, others = sort_out(batch, refusals)
        self._observer.applied(batch, transaction, letters)
        self._half_written += half_written
        for reason in others:
            self._notice(f"{self.partition}: {reason}")
        news = [letter for letter in letters if letter.offset >= self._outbox.out_until]
        await self._outbox.put(transaction.applied, transaction.outputs, news, batch.records)

    async def _settle(self) -> None:
        """Everything sent is in the store, and its outputs are out."""
        await self._finish()
        await self._outbox.wait()

    async def _maintain(self) -> None:
        await self._settle()
        if not await self._write_notes():
            await self.store.check()

    async def _write_notes(self) -> bool:
        """A transaction of its own for what waits for one; whether there was anything."""
        written = -1 if self._applied is None else self._applied.offset
        if not (self._half_written or self._outbox.notes() or self._last.offset > written):
            return False
        await self._send(Batch())
        await self._settle()
        return True

    # -- what it writes into its own partition ----------------------------------------------------------

    async def _announce_rules(self) -> None:
        rules = self._rules.to_announce()
        if rules is not None:
            event = RulesChanged(
                at=self._now_ms, node=keys.AGENT_NODE, agent=self.partition.agent, rules=rules
            )
            await self.log.produce([self._to_own_partition(event)])

    def _to_own_partition(self, event: Event) -> OutgoingRecord:
        key = keys.record_key(event).encode()
        return OutgoingRecord(
            self.partition.topic, key, codec.encode(event), (), partition=self.partition.number
        )
