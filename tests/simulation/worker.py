"""A simulated worker: one driver, its Kafka and its store, stepped by the world and killed at any await."""

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
    """Records on their way to Kafka."""

    worker: Worker
    records: Sequence[OutgoingRecord]
    reply: Reply


class Surroundings(Protocol):
    """What a worker needs of the world."""

    random: Random
    now_ms: int
    log: MemoryLog
    store: Store
    rules: Rules
    to_produce: list[ToProduce]
    commits_arrive: bool


class Worker:
    """Lives in `step`s. A paused one is not stepped; a crashed one never again."""

    def __init__(self, world: Surroundings, number: int) -> None:
        self.world, self.number = world, number
        connection = Connection(world.store, number, self._loaded, self._missing)
        self.driver: PartitionDriver[Packed] = PartitionDriver(
            PARTITION, MessagesMachine(), connection, self, world.rules, _unheard
        )
        self.paused = self.closing = self.ended = False
        self.owed: set[int] = set()  # offsets whose dead letters it may produce though others did
        self._owed_by_others: set[int] = set()  # the part of it that others have journaled
        self._failovers = world.store.failovers
        self._sent: set[int] = set()  # offsets whose dead letters it has produced
        self._handed: set[int] = set()  # offsets it could fold since it loaded
        self._run: Sequence[Record] = ()
        self._stored: LoadedState | None = None
        self._life = self._live()

    # -- its life ---------------------------------------------------------------------------------------

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
                self._hand(self._run)
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

    # -- what it knows of the log, for the judge --------------------------------------------------------

    def _hand(self, records: Iterable[Record]) -> None:
        self._handed.update(record.offset for record in records)

    def _loaded(self, stored: LoadedState) -> None:
        self._handed = {record.offset for record in self._run}
        self._stored = stored
        if self._failovers != self.world.store.failovers:
            self._failovers = self.world.store.failovers
            self._sent.clear()  # the notes that they are out may be lost
        self._owed_by_others = {
            output.offset
            for sequence, outputs in stored.journal.items()
            if self.world.store.content.writers[sequence] != self.number
            for output in outputs
        }

    def _missing(self, start: int, stop: int) -> frozenset[int]:
        return frozenset(range(start, stop)) - self._handed

    # -- its Kafka. See `millpond.agents.ports.Log` --------------------------------------------------------------

    async def bounds(self, partition: Partition) -> LogBounds:
        await Pause()
        bounds = await self.world.log.bounds(partition)
        if self._stored is not None:
            self._may_owe(self._stored, bounds)
            if self._stored.applied is None:  # an empty store begins where the log does
                self._handed = {offset for offset in self._handed if offset >= bounds.start}
            self._stored = None
        return bounds

    def _may_owe(self, stored: LoadedState, bounds: LogBounds) -> None:
        """What is in the journal, and what is neither in the store nor committed."""
        journaled = {output.offset for outputs in stored.journal.values() for output in outputs}
        applied = -1 if stored.applied is None else stored.applied.offset
        first = max(applied + 1, bounds.committed or 0)
        self.owed = journaled | set(range(first, first + 1_000))

    async def read(
        self, partition: Partition, start: int, stop: int
    ) -> AsyncIterator[Sequence[Record]]:
        await Pause()
        async for run in self.world.log.read(partition, start, stop):
            self._hand(run)
            yield run
            await Pause()

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        for record in records:
            if record.topic == keys.DEAD_LETTERS_TOPIC:
                offset = letter_offset(record)
                again = offset in self._sent and offset not in self._owed_by_others
                assert not again, f"a worker produced the dead letter of {offset} twice"
                self._sent.add(offset)
        sent = ToProduce(self, records, Reply())
        self.world.to_produce.append(sent)
        return cast(Awaitable[None], sent.reply)


def letter_offset(letter: OutgoingRecord) -> int:
    """The offset of the record that a dead letter is about."""
    return int(dict(letter.headers)["source-offset"])


def _unheard(notice: str) -> None:
    """Notices are for people."""
