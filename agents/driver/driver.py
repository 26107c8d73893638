"""The one driver of all machines: it reads, loads, steps, commits and produces, for one partition.

The driver decides nothing about messages or clients. The whole specification is docs/explanation/machines/driver.md.

CONCEPTS

- Run: records of one partition that Kafka handed over together, in order.
- Batch: a part of a run that becomes one transaction.
- Alone: a machine can ask that an event is a batch by itself, and that all events before it are in the store first.
- Position: the next offset to fold.
- Fence: the stored `Applied`. Each transaction expects the old one and writes a new one. So two owners never mix.
- Applied offset: the offset in the fence, the last one whose effects the store has.
- Outputs: what to produce to Kafka after the transaction. The transaction itself stores them in the journal.
- Committable offset: everything below it is in the store, and its outputs are in Kafka.

INVARIANTS

1. committable offset ≤ applied offset + 1 ≤ position, while the store has lost nothing.
2. The committable offset never goes back. A store that lost data is folded again, but outputs below are suppressed.
3. A sequence number names at most one transaction of a worker, even if the store lost data.
4. At most one transaction is in flight, and the next one is sent only when the reply of this one is known.
5. If a step finds a bug, nothing of its batch is written.

How they couple: because of 4, the fence alone answers after a lost reply whether the store applied the transaction. So
none is sent twice blindly. 1 follows from the order of work: stepping moves the position, the transaction writes the
fence, and Kafka's acknowledgement moves the committable offset. Because of 2, a rebuild repeats no output. Because of
3, a journal entry is never mistaken for a later one of this worker.

STATE

In the store: the fence, the journal, the rules in force, the seen ids, the machine's states. In memory:

- `_applied`: the fence that the next transaction expects. It is ahead of the store while a transaction is in flight.
- `_position`: see above. `_last`: the last record folded or skipped. Skipped records move both.
- `_reached`: the highest position of this worker. A store that went back is folded up to it, before new records.
- `_sequence`, `_now_ms`, `_score`: the sequence, log's time and score of the last step.
- `_in_flight`: the transaction that the store is applying. `_half_written`: events that the next one cleans up.
- `_loaded`: false before the first load, and after an error. The next call loads first.
- `_notices`: the log lines since the last success. A store that fails again and again is logged once for each reason.

TRANSITIONS

ON start, and after every reload (`_load`, then `_catch_up`):
1. Load fence, journal, rules and seen ids, and compare the fence with the log.
2. Set the position behind the applied offset, or to the start of the log, and restore the machine.
3. Produce what the journal holds. It comes first, so outputs of an earlier owner precede this one's.
4. Fold the log up to `_reached`, which is at least Kafka's committed offset.
5. Announce this worker's rules, if they are not in force (`start` and `maintain`).

ON a run (`_fold`), for each record:
1. Skip a record below the position.
2. Decode it, if the agent owns its key.
3. Send the batch so far and wait for it, if the event is stepped alone. Else add the record to the batch.

ON a full batch (`_send`). Step 1 overlaps with the store's work on the batch before:
1. Supply the machine with what it wants, step each event, pack the transaction.
2. Finish the transaction in flight.
3. Send this one: effects, outputs and fence, in one fenced transaction.

ON the reply (`_finish`):
1. Make one dead letter for each record with a refused part. The next transaction removes its other parts.
2. Start to produce these dead letters, then the outputs. The next transaction removes produced journal entries.

ON maintain, once a second:
1. Finish the transaction in flight, and wait for its outputs.
2. Send a transaction without records, if something waits for one. Skipped records do: a batch without owned records
   is not sent.
3. Else check the fence: this finds a store that lost data, and another owner.

ON StoreDown or Fenced: forget everything in memory, load again, and fold again what the store does not have.

ON any other error: check the fence. If another owner wrote, the error came from mixed reads: log its traceback and
load again. Else raise.

ON cancellation: forget everything in memory, so that `close` stores no position beyond what was sent.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic

from millpond.agents.driver.batch import (
    Batch,
    FoldedEvent,
    HalfWrittenEvent,
    InFlight,
    sort_refusals,
)
from millpond.agents.driver.decoding import RecordDecoder
from millpond.agents.driver.log_clock import log_time
from millpond.agents.driver.log_identity import check_log_identity
from millpond.agents.driver.observer import NullObserver, Observer
from millpond.agents.driver.outbox import Outbox
from millpond.agents.driver.outputs import Outputs
from millpond.agents.driver.rules_in_force import RulesInForce, first_rules_in_log
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

# Reasons logged in one outage. A store fails for one reason, or a few in turn.
NOTICES_MAX: Final = 16
NOTHING: Final = Record(-1, 0, None, None)  # in front of the first record


class PartitionDriver(Generic[Packed]):
    """Drives one machine over one partition. Calls must not overlap: each awaits the one before."""

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
        """`rules` are this worker's. `notice` gets the log lines."""
        self.partition, self.machine, self.store, self.log = partition, machine, store, log
        self._notice, self._observer = notice, observer or NullObserver()
        self._rules = RulesInForce(rules)
        self._decoder = RecordDecoder(partition, machine.owns)
        self._outputs = Outputs(partition, store.read, self._observer)
        self._outbox = Outbox(partition, log, self._outputs)
        self._ticks = Ticks()
        self._loaded = False
        self._cluster_id, self._partition_count = "", 0
        self._applied: Applied | None = None
        self._last = NOTHING
        self._position = self._reached = 0
        self._sequence = self._now_ms = self._score = 0
        self._in_flight: InFlight | None = None
        self._half_written: list[HalfWrittenEvent] = []
        self._notices: dict[str, None] = {}
        self.records_lost = 0  # records that retention removed before they were read

    # -- interface of the worker ------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the state, finish the journal, catch up with the log, and announce this worker's rules.

        Raises:
            LogMismatch: the store holds the state of another log.
            StoreRefused: the store does not execute our commands, as with wrong credentials.
        """
        await self._retry_with_reload([])
        await self._announce_rules()

    async def process(self, records: Sequence[Record]) -> None:
        """Fold a run of records. On return, the store has all batches but the last, which is in flight.

        Raises:
            BrokenInvariant: Millpond has a bug; the message names the record. Nothing of its batch is written.
        """
        await self._retry_with_reload(records)

    async def settle(self) -> None:
        """Wait until the store has all processed records, and Kafka their outputs."""
        await self._retry_with_reload([], self._settle)

    async def maintain(self) -> None:
        """Once a second: `finish`, check that the store still has this worker's fence, and announce the rules."""
        await self.finish()
        await self._announce_rules()

    async def finish(self) -> None:
        """Settle, then store what waits for a transaction: the position, produced journal entries, cleaning up."""
        await self._retry_with_reload([], self._maintain)

    async def close(self) -> None:
        """Finish what is in flight, and close the store. A store error is logged: the next owner continues."""
        try:
            if self._loaded:
                await self._settle()
                await self._store_pending()
        except StoreError as error:
            self._notice(
                f"{self.partition}: {error}; the last batch may be unfinished:"
                " the next owner continues from the state in the store"
            )
        finally:
            await self.store.close()

    def tick(self, wall_ms: int) -> OutgoingRecord | None:
        """Return the tick to produce now, or None; `wall_ms` is the owner's clock. See `Ticks.send`."""
        log_ms = log_time(self._now_ms, self._last.timestamp, wall_ms)
        if not self._ticks.send(self.machine.next_due_ms, log_ms, wall_ms):
            return None
        return self._to_own_partition(
            Tick(at=wall_ms, node=keys.AGENT_NODE, agent=self.partition.agent)
        )

    @property
    def committable(self) -> int | None:
        """The offset to commit: the store has all records below it, and Kafka their outputs; None before the first.

        It never goes back, even if the store loses its content and lower offsets are folded again.
        """
        return self._outbox.committable_offset or None

    @property
    def next_offset(self) -> int:
        """The next offset to fold."""
        return self._position

    @property
    def loaded_once(self) -> bool:
        """True once the state was loaded. Before that, `next_offset` says nothing."""
        return bool(self._cluster_id)

    @property
    def records_skipped(self) -> int:
        """How many records of other agents were skipped."""
        return self._decoder.records_skipped

    # -- load and compare -------------------------------------------------------------------------------

    async def _retry_with_reload(
        self, records: Sequence[Record], then: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Fold `records`, then do `then`. Load again and repeat, as long as the store fails or another owner writes."""
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
                self._notice_once(f"{error}; loading the state from the store again")
                self._forget()
            except Exception as error:
                superseded = await self._superseded()
                self._forget()
                if not superseded:
                    raise
                # The error may be a bug that only this moment shows: its traceback would be lost.
                self._notice_once(
                    f"{error!r}; another owner has written this partition since:"
                    f" loading the state from the store again\n{traceback.format_exc()}"
                )
            except BaseException:
                # Cancelled: the position is ahead of what was sent. `close` must not store it in a fence.
                self._forget()
                raise

    async def _superseded(self) -> bool:
        """True if another owner may have written: then a step saw its data beside ours, and its error means nothing."""
        if not self._loaded:
            return False
        try:
            await self._finish()
            await self.store.check()
        except (StoreDown, Fenced):
            return True
        return False

    def _notice_once(self, reason: str) -> None:
        """Log a reason, unless it was logged since the last success."""
        if reason not in self._notices and len(self._notices) < NOTICES_MAX:
            self._notices[reason] = None
            self._notice(f"{self.partition}: {reason}")

    def _forget(self) -> None:
        """Forget the transaction in flight and what was loaded. The next call loads again."""
        # Whether the store applied the cleaning up is unknown. It only removes, so the next transaction repeats it.
        if self._in_flight is not None:
            self._half_written[:0] = self._in_flight.cleaned
        self._in_flight, self._loaded = None, False

    async def _load(self) -> None:
        await self._outbox.wait()
        stored = await self.store.load()
        bounds = await self.log.bounds(self.partition)
        applied = self._applied = stored.applied
        await check_log_identity(self.partition, applied, bounds, self.log)
        self._cluster_id, self._partition_count = bounds.cluster_id, bounds.partition_count
        self._outputs.partition_count = bounds.partition_count
        self._position, self._last = bounds.start, NOTHING
        self._now_ms = self._score = 0
        if applied is not None:
            self._position = applied.offset + 1
            self._last = Record(applied.offset, applied.timestamp, None, None)
            self._now_ms, self._score = applied.now_ms, applied.score
            # Invariant 3: a store that lost transactions has a lower sequence than this worker has used.
            self._sequence = max(self._sequence, applied.sequence)
        self._reached = max(self._reached, self._position, bounds.start, bounds.committed or 0)
        # Records from the position on are folded again: the store decides again what it refuses of them.
        self._half_written = [
            half for half in self._half_written if half.refusal.offset < self._position
        ]
        self._decoder.forget_owners()
        self._ticks.forget_in_flight()
        state = {} if applied is None else applied.machine
        rules = (
            stored.rules if applied else await first_rules_in_log(self.partition, bounds, self.log)
        )
        self.machine.restore(state, stored, self._rules.restore(rules))
        await self._supply(())
        await self._outbox.finish_journal(stored, bounds.committed)
        self._loaded = True

    async def _catch_up(self, target: int) -> None:
        """Fold the log from the position to `target`.

        Kafka does not hand these records over: they are below the run, the committed offset, or what was reached
        before. It happens after a rebalance, and after a store lost data.
        """
        if self._position >= target:
            return
        start = (await self.log.bounds(self.partition)).start
        lost = min(start, target) - self._position
        if lost > 0:
            self.records_lost += lost
            self._position += lost
            self._notice(
                f"{self.partition}: {lost} records are no longer in the log: retention removed them before"
                " they were read; continuing behind them"
            )
        why = (
            "reading the log"
            if self._applied
            else "the store holds no state of it: rebuilding it from the log"
        )
        self._notice_once(f"{why}, from offset {self._position} to {target}")
        async for run in self.log.read(self.partition, self._position, target):
            await self._fold(run)
        # The last offsets may have no record: control records of Kafka, or retention since `bounds`.
        self._position = max(self._position, target)

    # -- fold -------------------------------------------------------------------------------------------

    async def _fold(self, records: Sequence[Record]) -> None:
        """Step and send the records from the position on, in as few transactions as possible."""
        batch = Batch()
        for record in records:
            if record.offset < self._position:
                continue
            found = self._decoder.decode(record)
            alone = isinstance(found, Base) and self.machine.alone(found)
            if alone:
                if batch.owned:
                    await self._send(batch)
                await self._finish()
                # A batch that owns nothing is not sent: the next transaction's fence covers its records.
                batch = Batch()
            self._advance(record)
            batch.add(record, found, self._now_ms)
            if alone:
                await self._send(batch)
                batch = Batch()
        if batch.owned:
            await self._send(batch)

    def _advance(self, record: Record) -> None:
        self._now_ms = log_time(self._now_ms, self._last.timestamp, record.timestamp)
        self._last, self._position = record, record.offset + 1
        self._reached = max(self._reached, self._position)

    async def _send(self, batch: Batch) -> None:
        """Step and pack a batch, finish the transaction in flight, and send the new one."""
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
        transaction = Transaction(
            self._applied, applied, effects, outputs, self._outbox.produced_entries()
        )
        packed = self.store.pack(transaction)
        # Packing is done: it overlapped with the store's work. Invariant 4 allows the next transaction only after this.
        await self._finish()
        # `_finish` may have appended half-written events. They wait for the next transaction.
        del self._half_written[: len(cleaned)]
        self._in_flight = InFlight(transaction, batch, cleaned, self.store.commit(packed))
        self._applied, self._sequence = applied, applied.sequence

    async def _step(
        self, batch: Batch, half_written: Sequence[HalfWrittenEvent]
    ) -> tuple[list[Effect], list[Output]]:
        """Return the batch's effects, and its outputs without those that Kafka has already."""
        machine, suppressed_below = self.machine, self._outbox.committable_offset
        effects: list[Effect] = []
        if half_written:
            await self._supply([half.event for half in half_written])
            for half in half_written:
                effects.extend(machine.refused(half.event, half.refusal))
        outputs: list[Output] = [x for x in batch.unreadable if x.offset >= suppressed_below]
        await self._supply([folded.event for folded in batch.folded])
        for folded in batch.folded:
            for item in self._decide(folded):
                if not isinstance(item, Output):
                    effects.append(item)
                elif folded.record.offset >= suppressed_below:
                    outputs.append(item)
        effects.extend(machine.finish())
        return effects, outputs

    async def _supply(self, events: Sequence[Event]) -> None:
        """Read for the machine until it wants nothing more; an answer can lead to another read."""
        while reads := self.machine.wanted(events, self._now_ms):
            # An index or a due set changes with every transaction. The other reads are of states: those of the
            # transaction in flight are in the machine's memory, and are not read.
            if self._in_flight is not None and any(
                isinstance(x, READS_AFTER_COMMIT) for x in reads
            ):
                await self._finish()
            for read, answer in zip(reads, await self.store.read(reads), strict=True):
                self.machine.supply(read, answer)

    def _decide(self, folded: FoldedEvent) -> Sequence[Effect | Output]:
        """Step one event. A DecodeError becomes a dead letter, any other error a BrokenInvariant.

        A score is the record's time in µs, or the last score plus 1: it orders an index, and never repeats.
        """
        record, event, now_ms = folded
        self._score = max(now_ms * 1000, self._score + 1)
        try:
            decided = self.machine.step(record.offset, event, now_ms, self._score)
        except DecodeError as error:
            return (DeadLetter(record.offset, str(error)),)
        except Exception as error:
            where = f"{self.partition}: offset {record.offset}"
            raise BrokenInvariant(f"{where}: {error!r}") from error
        if isinstance(event, RulesChanged):
            self._decoder.forget_owners()
            self._rules.changed(self.machine.rules)
        elif isinstance(event, Tick):
            self._ticks.folded(now_ms)
        return decided

    # -- finish -----------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Await the reply for the transaction in flight, then start to produce its outputs."""
        if self._in_flight is None:
            return
        transaction, batch, _, committing = self._in_flight
        refusals = await committing
        self._in_flight = None
        self._notices.clear()
        self.machine.settled()
        self._outbox.entries_removed(transaction.produced)
        half_written, dead_letters, others = sort_refusals(batch, refusals)
        self._observer.applied(batch, transaction, dead_letters)
        self._half_written += half_written
        for reason in others:
            self._notice(f"{self.partition}: {reason}")
        # A record that is folded again is refused again: its dead letter may be in Kafka already.
        new = [each for each in dead_letters if each.offset >= self._outbox.committable_offset]
        await self._outbox.put(transaction.applied, transaction.outputs, new, batch.records)

    async def _settle(self) -> None:
        await self._finish()
        await self._outbox.wait()

    async def _maintain(self) -> None:
        await self._settle()
        if not await self._store_pending():
            await self.store.check()
            self._notices.clear()

    async def _store_pending(self) -> bool:
        """Send a batch without records if something waits for a transaction; return True if so.

        That is cleaning up, produced journal entries, or skipped records behind the applied offset.
        """
        applied = -1 if self._applied is None else self._applied.offset
        produced = self._outbox.produced_entries()
        if not (self._half_written or produced or self._last.offset > applied):
            return False
        await self._send(Batch())
        await self._settle()
        return True

    # -- records for its own partition ------------------------------------------------------------------

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
