"""`millpond rebuild`: an agent's state made again from the log, in its own store, while its workers are stopped.

**State**: the mark, a hash `millpond:{app:agent}:rebuild`. It exists from step 1 to step 6.

- Field `begun`: the mark exists. Workers of the agent refuse to start.
- Field *partition*: the fence that the partition had in step 3. Its old private keys may be gone.

**Steps**

1. Set `begun`. Check that the agent's consumer group has no members.
2. Finish each partition's journal: produce the outputs that the old state still owes to Kafka.
3. Write each partition's fence into the mark.
4. Remove the public keys that the private ones name, and then the private ones (`removal.py`).
5. Fold each partition from the start of the log up to its old applied offset. Produce nothing, and run no user commands:
   both happened when the records were folded first.
6. Remove the mark. The next worker continues at the old applied offset.

**Interruption.** Before step 3 the old state is complete, and the next rebuild begins again. After step 3 the next rebuild
skips step 2 for the partitions in the mark, and takes their fences from it.

**Why step 1 checks again.** `plan` has already checked that no worker runs. A worker that started between the two checks
may have looked for the mark before it was set.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import msgspec
from aiokafka.admin import AIOKafkaAdminClient

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.effects import Refusal, RunCommand
from millpond.agents.ports import Applied, LoadedState, Log, Store, Transaction
from millpond.agents.reads import Read
from millpond.agents.registry import MACHINES
from millpond.pipeline.kafka.answers import answer, command_options, connected
from millpond.pipeline.kafka.log import KafkaLog
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.rebuild.removal import Removal
from millpond.pipeline.replay.folding import Folding
from millpond.pipeline.replay.log_extent import (
    LogExtent,
    describe_loss,
    format_time,
    open_extents,
)
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.keyspace import Keyspace, keyspace
from millpond.pipeline.stores.registry import open_store
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, DecodeError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

BEGUN: Final = b"begun"


class StoreWithoutCommands:
    """See `millpond.agents.ports.Store`. It passes everything to another store, except user commands."""

    def __init__(self, store: Store[Any]) -> None:
        self._store = store

    async def load(self) -> LoadedState:
        return await self._store.load()

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        return await self._store.read(reads)

    def pack(self, transaction: Transaction) -> Any:
        effects = [each for each in transaction.effects if not isinstance(each, RunCommand)]
        return self._store.pack(transaction._replace(effects=effects))

    def commit(self, packed: Any) -> Awaitable[Sequence[Refusal]]:
        return self._store.commit(packed)

    async def check(self) -> None:
        await self._store.check()

    async def close(self) -> None:
        await self._store.close()


class RebuildPlan(NamedTuple):
    """What a rebuild would do.

    - `records`: the number of offsets to fold.
    - `partitions`: the number of partitions that have state.
    - `messages`: the number of stored messages to remove.
    - `notes`: which records Kafka has deleted.
    - `losses`: what the log cannot bring back.
    """

    records: int
    partitions: int
    messages: int
    notes: list[str]
    losses: list[str]


class Rebuild:
    """One rebuild. Call `plan`, and then `run`. A progress bar reads `agent`, `total` and `folded`.

    - `_extents`: the extent of each partition's log.
    - `_fences`: the old fence of each partition that has state.
    """

    def __init__(self, agent: AgentName, settings: Settings, rules: Rules, space: Keyspace) -> None:
        self.agent: AgentName = agent
        self._settings, self._rules, self._space = settings, rules, space
        self._mark = keys.rebuild_marker(settings.app, agent)
        self._cluster_id = ""
        self._extents: dict[int, LogExtent] = {}
        self._fences: dict[int, Applied] = {}
        self._folding: Folding | None = None
        self.total = 0

    @property
    def folded(self) -> int:
        """The number of offsets that are folded."""
        return 0 if self._folding is None else self._folding.folded

    # -- the plan -------------------------------------------------------------------------------------------

    async def plan(self) -> RebuildPlan:
        """Find out what there is to do. Change nothing.

        Raises:
            MillpondError: workers run, or the store has no state, or state of another log.
        """
        await self._check_stopped()
        async with open_extents(self._settings.kafka) as kafka:
            self._cluster_id = kafka.cluster_id
            self._extents = await kafka.extents(keys.SOURCE_TOPIC[self.agent])
        self._fences = {**await self._stored_fences(), **await self._marked_fences()}
        if not self._fences:
            raise MillpondError(
                f"{self._space.where} holds no state of {self.agent}: start its workers, and they build it from the log"
            )
        self._check_log()
        messages, losses = await self._count_messages()
        loss = describe_loss(self.agent, self._extents)
        self.total = sum(
            max(fence.offset + 1 - self._extents[number].start, 0)
            for number, fence in self._fences.items()
        )
        notes = [] if loss is None else [loss]
        return RebuildPlan(self.total, len(self._fences), messages, notes, losses)

    async def _check_stopped(self) -> None:
        group = keys.group_id(self._settings.app, self.agent)
        kafka = self._settings.kafka
        admin = AIOKafkaAdminClient(**command_options(kafka))
        async with connected(kafka, admin):
            asked = admin.describe_consumer_groups([group])
            responses = await answer(kafka, f"describe the consumer group {group}", asked)
        # The sixth element of a described group is its list of members.
        members = [
            member for response in responses for found in response.groups for member in found[5]
        ]
        if members:
            raise MillpondError(
                f"{len(members)} worker{'' if len(members) == 1 else 's'} of {self.agent} in the consumer group"
                f" {group}: stop them first (a killed worker leaves the group after"
                f" {self._settings.worker.session_timeout_s:g} s)"
            )

    async def _stored_fences(self) -> dict[int, Applied]:
        numbers = range(self._settings.kafka.partitions)
        replies = await self._space.run(
            [("GET", keys.applied(self._partition(each))) for each in numbers]
        )
        return {
            number: self._space.decode_fence(self._partition(number), reply)
            for number, reply in zip(numbers, replies, strict=True)
            if reply is not None
        }

    async def _marked_fences(self) -> dict[int, Applied]:
        """Return the fences in the mark: those of the partitions that an interrupted rebuild did not finish."""
        pairs = await self._space.call("HGETALL", self._mark)
        fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
        fields.pop(BEGUN, None)
        return {
            int(number): self._space.decode_fence(self._partition(int(number)), fence)
            for number, fence in fields.items()
        }

    def _partition(self, number: int) -> Partition:
        return Partition(self._settings.app, self.agent, number)

    def _check_log(self) -> None:
        for number, fence in self._fences.items():
            partition, extent = self._partition(number), self._extents[number]
            self._space.check_cluster(partition, fence, self._cluster_id)
            if fence.offset >= extent.end:
                raise MillpondError(
                    f"{self._space.where} holds the state of {partition} up to offset {fence.offset},"
                    f" but the log ends before {extent.end}"
                )

    async def _count_messages(self) -> tuple[int, list[str]]:
        """Return the number of stored messages, and the losses that the log cannot bring back."""
        removal = await self._removal()
        messages = lost = 0
        async for number, _, entries in removal.entries():
            since = self._extents[number].complete_from
            messages += len(entries)
            # Scores are in µs.
            lost += sum(since is not None and score < since * 1000 for _, score in entries)
        losses = [f"{lost} stored messages are older than the log"] if lost else []
        cut = [number for number in self._fences if self._extents[number].start]
        # Sessions keep clients without an age, so any deleted record may be a client's last one.
        if self.agent == "sessions" and cut:
            losses.append(
                f"clients without an event since {self._complete_since(cut)} are not in the log"
            )
        return messages, losses

    def _complete_since(self, cut: Sequence[int]) -> str:
        times = [self._extents[number].complete_from for number in cut]
        known = [each for each in times if each is not None]
        return format_time(max(known)) if known else "its start"

    async def _removal(self) -> Removal:
        rules: dict[int, Rules] = {}
        for number in self._fences:
            canonical = await self._space.call("GET", keys.rules(self._partition(number)))
            try:
                rules[number] = (
                    self._rules if canonical is None else Rules.from_canonical(canonical.decode())
                )
            # Rules in force that cannot be read: those of the configuration are the best guess.
            except (DecodeError, UnicodeDecodeError):
                rules[number] = self._rules
        scores = {number: fence.score for number, fence in self._fences.items()}
        count = self._settings.kafka.partitions
        return Removal(self._space, self._settings.app, self.agent, rules, scores, count)

    # -- the work -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Rebuild the agent's state.

        Raises:
            MillpondError: the rebuild failed. The mark stays, and another rebuild finishes the work. If workers run and
                no earlier rebuild was interrupted, nothing is changed and the mark is removed.
        """
        unfinished = await self._marked_fences()
        await self._space.call("HSET", self._mark, BEGUN, 1)
        try:
            await self._check_stopped()
        except MillpondError:
            if not unfinished:
                await self._space.call("UNLINK", self._mark)
            raise
        intact = [number for number in self._fences if number not in unfinished]
        await self._finish_journals(intact)
        # Read again: a finished journal has moved the fence.
        self._fences = {**await self._stored_fences(), **unfinished}
        removal = await self._removal()
        for number, fence in self._fences.items():
            await self._space.call("HSET", self._mark, number, msgspec.json.encode(fence))
        await removal.public()
        for number in self._fences:
            await removal.private(number)
        await self._fold()
        await self._space.call("UNLINK", self._mark)

    async def _finish_journals(self, numbers: Sequence[int]) -> None:
        """Produce the outputs that the old state still owes, as a new owner does before anything else."""
        kafka = self._settings.kafka
        producer = Producer(kafka)
        group = keys.group_id(self._settings.app, self.agent)
        log = KafkaLog(producer, kafka, group, self._settings.worker.batch_records_max)
        await producer.start()
        await log.start()
        try:
            for number in numbers:
                await self._finish_journal(number, log)
        finally:
            await log.stop()
            await producer.stop()

    async def _finish_journal(self, number: int, log: Log) -> None:
        partition = self._partition(number)
        store: Store[Any] = open_store(self._rules.pool(self.agent), partition)
        driver = PartitionDriver(
            partition, MACHINES[self.agent](), store, log, self._rules, logger.info
        )
        try:
            # No records: the driver loads, produces the journal, and catches up with the committed offset.
            await driver.process(())
            await driver.finish()
        finally:
            await driver.close()

    async def _fold(self) -> None:
        pool = self._rules.pool(self.agent)
        starts = {number: extent.start for number, extent in self._extents.items()}
        self._folding = Folding(
            self.agent, self._settings, self._rules,
            lambda partition: StoreWithoutCommands(open_store(pool, partition)), self._cluster_id, starts,
        )  # fmt: skip
        await self._folding.fold_to(
            {number: fence.offset + 1 for number, fence in self._fences.items()}
        )


@asynccontextmanager
async def rebuilding(agent: AgentName, settings: Settings, rules: Rules) -> AsyncIterator[Rebuild]:
    """Connect to the agent's store, for a rebuild.

    Raises:
        ConfigError: the store is a Redis Cluster.
        StoreDown, StoreRefused: the store is down or a replica, or refuses the user.
    """
    pool = rules.pool(agent)
    if pool.type == "cluster":
        raise ConfigError(
            f"pool {pool.name!r} is a cluster, which cannot be rebuilt in place:"
            " empty the cluster, and the workers rebuild it"
        )
    async with keyspace(pool) as space:
        await space.check_primary()
        yield Rebuild(agent, settings, rules, space)


async def check_not_rebuilding(agent: AgentName, settings: Settings, rules: Rules) -> None:
    """Check that no rebuild of the agent is unfinished. Every worker does this at its start.

    Raises:
        MillpondError: a rebuild has begun and is not finished.
        StoreDown, StoreRefused: the store is down, or refuses the user.
    """
    pool = rules.pool(agent)
    # A cluster is never rebuilt in place.
    if pool.type == "cluster":
        return
    async with keyspace(pool) as space:
        name = keys.rebuild_marker(settings.app, agent)
        if await space.call("EXISTS", name):
            raise MillpondError(
                f"{space.where} is in the middle of a rebuild of {agent}: if none runs now,"
                f" run `millpond rebuild {agent}` to finish it"
            )
