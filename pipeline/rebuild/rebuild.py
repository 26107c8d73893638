"""`millpond rebuild`: an agent's state made anew from the log, in the store where it is, while its workers are stopped.

1. Mark the agent as being rebuilt: no worker of it starts from here on. See that none runs.
2. Finish each partition's journal: what the old state still owes Kafka is produced, as a next owner would.
3. Note each partition's fence in the mark. From here on an interrupted rebuild is finished by another one.
4. Remove the public keys that the private ones name, then the private ones (`removing.py`).
5. Fold each partition from the log's start to where it was. All of it is committed, so nothing is produced; the user's
   commands are left out: what they did is still there.
6. Take away the mark. A worker that starts now goes on where the last one was.
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
from millpond.pipeline.kafka.log import KafkaLog
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.rebuild.removal import Removal
from millpond.pipeline.replay.folding import Folding
from millpond.pipeline.replay.log_extent import LogExtent, horizon, shown_time, source
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.keyspace import Keyspace, keyspace
from millpond.pipeline.stores.registry import open_store
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, DecodeError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

BEGUN: Final = b"begun"  # the field of the mark that is there as long as it is


class WithoutCommands:
    """See `millpond.agents.ports.Store`: another one, to which the users' commands are not handed."""

    def __init__(self, store: Store[Any]) -> None:
        """`store` does the work."""
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
    """What a rebuild would do: records to fold, partitions to make anew, messages that are stored, what would be lost."""

    records: int
    partitions: int
    messages: int
    notes: list[str]
    losses: list[str]


class Rebuild:
    """One run, as a context manager's; `plan` comes first."""

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
        """Offsets gone by so far."""
        return 0 if self._folding is None else self._folding.folded

    # -- what is to be done ---------------------------------------------------------------------------------

    async def plan(self) -> RebuildPlan:
        """What there is to do. Nothing is changed.

        Raises:
            MillpondError: workers run, or the store holds nothing, or what is of another log.
        """
        await self._check_stopped()
        async with source(self._settings.kafka) as kafka:
            self._cluster_id = kafka.cluster_id
            self._extents = await kafka.extents(keys.SOURCE_TOPIC[self.agent])
        self._fences = {**await self._read_fences(), **await self._noted()}
        if not self._fences:
            raise MillpondError(
                f"{self._space.where} holds nothing of {self.agent}: its workers make it from the log by themselves"
            )
        self._check_log()
        messages, losses = await self._kept()
        lost = horizon(self.agent, self._extents)
        self.total = sum(
            max(fence.offset + 1 - self._extents[number].start, 0)
            for number, fence in self._fences.items()
        )
        notes = [] if lost is None else [lost]
        return RebuildPlan(self.total, len(self._fences), messages, notes, losses)

    async def _check_stopped(self) -> None:
        group = keys.group_id(self._settings.app, self.agent)
        admin = AIOKafkaAdminClient(**self._settings.kafka.client_options())
        try:
            await admin.start()
            told = await admin.describe_consumer_groups([group])
        finally:
            await admin.close()
        members = [member for response in told for found in response.groups for member in found[5]]
        if members:
            raise MillpondError(
                f"{len(members)} worker{'' if len(members) == 1 else 's'} of {self.agent} in the consumer group"
                f" {group}: stop them first (one that was killed is gone after"
                f" {self._settings.worker.session_timeout_s:g} s)"
            )

    async def _read_fences(self) -> dict[int, Applied]:
        numbers = range(self._settings.kafka.partitions)
        held = await self._space.ask(
            [("GET", keys.applied(self._partition(each))) for each in numbers]
        )
        return {
            number: self._decoded(number, fence)
            for number, fence in zip(numbers, held, strict=True)
            if fence is not None
        }

    async def _noted(self) -> dict[int, Applied]:
        """The fences of partitions that an interrupted rebuild has not finished."""
        pairs = await self._space.get("HGETALL", self._mark)
        held = dict(zip(pairs[::2], pairs[1::2], strict=True))
        held.pop(BEGUN, None)
        return {int(number): self._decoded(int(number), fence) for number, fence in held.items()}

    def _decoded(self, number: int, fence: Any) -> Applied:
        try:
            return msgspec.json.decode(fence, type=Applied)
        except (msgspec.DecodeError, TypeError) as error:
            raise MillpondError(
                f"{self._space.where} holds no fence of {self._partition(number)}: {error}"
            ) from error

    def _partition(self, number: int) -> Partition:
        return Partition(self._settings.app, self.agent, number)

    def _check_log(self) -> None:
        for number, fence in self._fences.items():
            held = f"{self._space.where} holds the state of {self._partition(number)}"
            if fence.cluster_id != self._cluster_id:
                raise MillpondError(
                    f"{held} of Kafka cluster {fence.cluster_id}, but this is cluster {self._cluster_id}"
                )
            if fence.offset >= self._extents[number].end:
                raise MillpondError(
                    f"{held} up to offset {fence.offset}, but the log ends before {self._extents[number].end}"
                )

    async def _kept(self) -> tuple[int, list[str]]:
        """How many messages are stored, and what of the store the log cannot bring back."""
        removal = await self._removal()
        messages = lost = 0
        async for number, _, entries in removal.entries():
            since = self._extents[number].complete_from
            messages += len(entries)
            lost += sum(since is not None and score < since * 1000 for _, score in entries)
        losses = [f"{lost} stored messages are older than the log"] if lost else []
        cut = [number for number in self._fences if self._extents[number].start]
        if self.agent == "sessions" and cut:
            losses.append(
                f"clients that were last heard of before {self._shown_start(cut)} are not in the log"
            )
        return messages, losses

    def _shown_start(self, cut: Sequence[int]) -> str:
        times = [self._extents[number].complete_from for number in cut]
        known = [each for each in times if each is not None]
        return shown_time(max(known)) if known else "its start"

    async def _removal(self) -> Removal:
        rules: dict[int, Rules] = {}
        for number in self._fences:
            held = await self._space.get("GET", keys.rules(self._partition(number)))
            try:
                rules[number] = self._rules if held is None else Rules.from_canonical(held.decode())
            except (DecodeError, UnicodeDecodeError):
                rules[number] = self._rules
        scores = {number: fence.score for number, fence in self._fences.items()}
        count = self._settings.kafka.partitions
        return Removal(self._space, self._settings.app, self.agent, rules, scores, count)

    # -- doing it -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Do what was planned.

        Raises:
            MillpondError: it could not be finished; the mark stays, and another rebuild goes on.
        """
        unfinished = await self._noted()
        await self._space.get("HSET", self._mark, BEGUN, 1)
        try:
            await self._check_stopped()  # whoever came since has not seen the mark
        except MillpondError:
            if not unfinished:
                await self._space.get("UNLINK", self._mark)
            raise
        waiting = [number for number in self._fences if number not in unfinished]
        await self._finish_journals(waiting)
        self._fences = {**await self._read_fences(), **unfinished}
        removal = await self._removal()
        for number, fence in self._fences.items():
            await self._space.get("HSET", self._mark, number, msgspec.json.encode(fence))
        await removal.public()
        for number in self._fences:
            await removal.private(number)
        await self._fold()
        await self._space.get("UNLINK", self._mark)

    async def _finish_journals(self, numbers: Sequence[int]) -> None:
        """Produce what the old state still owes, exactly as a next owner would before anything else."""
        kafka = self._settings.kafka
        producer = Producer(kafka.client_options(), kafka.message_bytes_max)
        group = keys.group_id(self._settings.app, self.agent)
        log = KafkaLog(
            producer, kafka.client_options(), group, self._settings.worker.batch_records_max
        )
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
            await driver.process(())
            await driver.finish()
        finally:
            await driver.close()

    async def _fold(self) -> None:
        pool = self._rules.pool(self.agent)
        starts = {number: extent.start for number, extent in self._extents.items()}
        self._folding = Folding(
            self.agent, self._settings, self._rules,
            lambda partition: WithoutCommands(open_store(pool, partition)), self._cluster_id, starts,
        )  # fmt: skip
        await self._folding.fold_to(
            {number: fence.offset + 1 for number, fence in self._fences.items()}
        )


@asynccontextmanager
async def rebuilding(agent: AgentName, settings: Settings, rules: Rules) -> AsyncIterator[Rebuild]:
    """A rebuild of the agent's store.

    Raises:
        ConfigError: it is a Redis Cluster.
        StoreDown, StoreRefused: it is away, or will not serve us.
    """
    pool = rules.pool(agent)
    if pool.type == "cluster":
        raise ConfigError(
            f"pool {pool.name!r} is a cluster, which cannot be rebuilt in place: empty it, and the workers do it"
        )
    async with keyspace(pool) as space:
        await space.check_primary()
        yield Rebuild(agent, settings, rules, space)


async def check_not_rebuilding(agent: AgentName, settings: Settings, rules: Rules) -> None:
    """Whether a worker may work on its store.

    Raises:
        MillpondError: a rebuild has begun and is not finished.
        StoreDown, StoreRefused: the store cannot be asked.
    """
    pool = rules.pool(agent)
    if pool.type == "cluster":
        return  # never rebuilt in place
    async with keyspace(pool) as space:
        name = keys.rebuild_marker(settings.app, agent)
        if await space.get("EXISTS", name):
            raise MillpondError(
                f"{space.where} is in the middle of a rebuild of {agent}: if none runs, `millpond rebuild {agent}`"
                " finishes it"
            )
