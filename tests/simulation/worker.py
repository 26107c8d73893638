"""A simulated worker: one driver with its Kafka and its store. The world steps it, and can kill it at every await.

The worker also checks itself: it may produce a dead letter again only if it has a reason. Reasons are an entry in the
journal, and a record that is neither in the store nor committed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from random import Random
from typing import NamedTuple, Protocol, cast

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.messages.machine import MessagesMachine
from millpond.agents.ports import LoadedState, LogBounds, OutgoingRecord, Record
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.schemas import keys
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from tests.simulation.points import Pause, Reply
from tests.simulation.store import Connection, Packed, Store
from tests.support.partition import PARTITION


class ToProduce(NamedTuple):
    """Records that a worker has produced and that Kafka does not have yet."""

    worker: Worker
    records: Sequence[OutgoingRecord]
    reply: Reply


class Surroundings(Protocol):
    """The part of the world that a worker uses."""

    random: Random
    now_ms: int
    log: MemoryLog
    store: Store
    rules: Rules
    to_produce: list[ToProduce]
    commits_arrive: bool


class Worker:
    """Runs until its next await in each `step`. A paused worker is not stepped. A crashed one has ended.

    - `owed`: offsets whose dead letters it may produce, although another worker may have produced them.
    - `_owed_by_others`: those of them that other workers have journaled.
    - `_sent`: offsets whose dead letters it has produced.
    - `_offered`: offsets that it could fold since its last load.
    - `_run`: the records that it processes now.
    - `_stored`: the state that it has loaded, until it has asked for the bounds of the log.
    """

    def __init__(self, world: Surroundings, number: int) -> None:
        self.world, self.number = world, number
        connection = Connection(world.store, number, self._loaded, self._missing)
        self.driver: PartitionDriver[Packed] = PartitionDriver(
            PARTITION, MessagesMachine(), connection, self, world.rules, _ignore
        )
        self.paused = self.closing = self.ended = False
        self.owed: set[int] = set()
        self._owed_by_others: set[int] = set()
        self._failovers = world.store.failovers
        self._sent: set[int] = set()
        self._offered: set[int] = set()
        self._run: Sequence[Record] = ()
        self._stored: LoadedState | None = None
        self._life = self._live()

    # -- steps ------------------------------------------------------------------------------------------

    def step(self) -> None:
        try:
            self._life.send(None)
        except StopIteration:
            self.ended = True

    def crash(self) -> None:
        self._life.close()
        self.ended = True

    async def _live(self) -> None:
        random, driver = self.world.random, self.driver
        await driver.start()
        position = random.choice([driver.next_offset, self.world.log.committed.get(PARTITION, 0)])
        while not self.closing:
            self._run = self._fetch(position)
            if self._run:
                self._offer(self._run)
                position = self._run[-1].offset + 1
                await driver.process(self._run)
                self._run = ()
            elif random.random() < 0.5:
                await driver.settle()
            if random.random() < 0.3:
                await driver.maintain()
            tick = driver.tick(self.world.now_ms)
            if tick is not None:
                await self.produce([tick])
            self._commit()
            await Pause()
        await driver.close()
        self._commit()

    def _fetch(self, position: int) -> Sequence[Record]:
        size = self.world.random.choice([1, 2, 5, 20])
        log = self.world.log.records[PARTITION.topic, 0]
        return [record for record in log if record.offset >= position][:size]

    def _commit(self) -> None:
        offset = self.driver.committable
        if offset is not None and self.world.commits_arrive:
            self.world.log.committed[PARTITION] = offset

    # -- what it has read of the log, for the judge -----------------------------------------------------

    def _offer(self, records: Iterable[Record]) -> None:
        self._offered.update(record.offset for record in records)

    def _loaded(self, stored: LoadedState) -> None:
        self._offered = {record.offset for record in self._run}
        self._stored = stored
        if self._failovers != self.world.store.failovers:
            self._failovers = self.world.store.failovers
            # The store may have lost the notes that these were produced.
            self._sent.clear()
        self._owed_by_others = {
            output.offset
            for sequence, outputs in stored.journal.items()
            if self.world.store.content.writers[sequence] != self.number
            for output in outputs
        }

    def _missing(self, start: int, stop: int) -> frozenset[int]:
        return frozenset(range(start, stop)) - self._offered

    # -- its Kafka. See `millpond.agents.ports.Log` --------------------------------------------------------------

    async def bounds(self, partition: Partition) -> LogBounds:
        await Pause()
        bounds = await self.world.log.bounds(partition)
        if self._stored is not None:
            self._may_owe(self._stored, bounds)
            # The fold of an empty store begins at the start of the log.
            if self._stored.applied is None:
                self._offered = {offset for offset in self._offered if offset >= bounds.start}
            self._stored = None
        return bounds

    def _may_owe(self, stored: LoadedState, bounds: LogBounds) -> None:
        """Set `owed`: the offsets in the journal, and those that are neither in the store nor committed."""
        journaled = {output.offset for outputs in stored.journal.values() for output in outputs}
        applied = -1 if stored.applied is None else stored.applied.offset
        first = max(applied + 1, bounds.committed or 0)
        self.owed = journaled | set(range(first, first + 1_000))

    async def read(
        self, partition: Partition, start: int, stop: int
    ) -> AsyncIterator[Sequence[Record]]:
        await Pause()
        async for run in self.world.log.read(partition, start, stop):
            self._offer(run)
            yield run
            await Pause()

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        for record in records:
            if record.topic == keys.DEAD_LETTERS_TOPIC:
                offset = dead_letter_offset(record)
                again = offset in self._sent and offset not in self._owed_by_others
                assert not again, f"a worker produced the dead letter of {offset} twice"
                self._sent.add(offset)
        sent = ToProduce(self, records, Reply())
        self.world.to_produce.append(sent)
        return cast(Awaitable[None], sent.reply)


def dead_letter_offset(record: OutgoingRecord) -> int:
    """Return the offset of the record that became this dead letter."""
    return int(dict(record.headers)["source-offset"])


def _ignore(notice: str) -> None:
    """Drop a notice of the driver."""
