"""How far the agents are behind: of each partition what is committed, what Redis has applied, and what Kafka has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Final, Self, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from msgspec import Struct, structs

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.settings import KafkaSettings, Settings
from millpond.pipeline.stores.redis.inspection import ReadFence
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas import keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

REQUEST_TIMEOUT_MS: Final = 10_000  # who looks wants to know that Kafka does not answer
RETRY_INTERVAL_S: Final = 0.2
FETCH_BYTES: Final = 1  # Kafka answers with the first batch, however large
FIRST_RECORDS_TIMEOUT_S: Final = 5.0  # to read the oldest record of each partition

Answer = TypeVar("Answer")


class PartitionLag(Struct, frozen=True, kw_only=True):
    """One partition of one agent. `committed` and `next` are the offsets of the first record that is not committed, or
    not applied; `oldest_at` (ms) is when the log got that one, if there is one.
    """

    agent: AgentName
    partition: int
    start: int
    end: int
    committed: int | None
    applied: int | None
    oldest_at: int | None = None

    @property
    def next(self) -> int:
        """Where the agent goes on: what retention dropped is passed over. A Redis that holds nothing of it, whatever was
        committed, is rebuilt from the start.
        """
        return self.start if self.applied is None else max(self.start, self.applied + 1)

    @property
    def behind(self) -> int:
        """Records that are not applied."""
        return max(self.end - self.next, 0)


class AgentLag(Struct, frozen=True, kw_only=True):
    """All partitions of an agent. `oldest_at` (ms) is of the oldest event that is not applied."""

    agent: AgentName
    partitions: tuple[PartitionLag, ...]

    @property
    def behind(self) -> int:
        """Records that are not applied."""
        return sum(each.behind for each in self.partitions)

    @property
    def uncommitted(self) -> int:
        """Records that are not committed; what retention dropped does not count."""
        return sum(each.end - max(each.start, each.committed or 0) for each in self.partitions)

    @property
    def oldest_at(self) -> int | None:
        """When the log got the oldest event that is not applied."""
        return min((x.oldest_at for x in self.partitions if x.oldest_at is not None), default=None)


class LagReader:
    """What Kafka says of the agents' groups; a context manager.

    Raises:
        MillpondError: Kafka is away.
        KafkaError: it went away meanwhile.
    """

    def __init__(self, settings: KafkaSettings, app: str) -> None:
        """Connected when it is entered."""
        self._settings, self._app = settings, app
        options = settings.client_options()
        self._admin = AIOKafkaAdminClient(request_timeout_ms=REQUEST_TIMEOUT_MS, **options)
        self._consumer = AIOKafkaConsumer(
            enable_auto_commit=False, auto_offset_reset="earliest",
            request_timeout_ms=REQUEST_TIMEOUT_MS, max_partition_fetch_bytes=FETCH_BYTES, **options,
        )  # fmt: skip
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self._admin.close)
        self._stack.push_async_callback(self._consumer.stop)
        try:
            await self._admin.start()
            await self._consumer.start()
        except KafkaError as error:
            await self._stack.aclose()
            raise MillpondError(str(await unreachable(self._settings))) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def of(self, agents: Iterable[AgentName]) -> list[AgentLag]:
        """Each agent's partitions, with nothing known of Redis."""
        return [await self._of(agent) for agent in agents]

    async def _of(self, agent: AgentName) -> AgentLag:
        partitions = await self._partitions(keys.SOURCE_TOPIC[agent])
        if not partitions:
            return AgentLag(agent=agent, partitions=())
        group = keys.group_id(self._app, agent)
        held = await _persist(
            lambda: self._admin.list_consumer_group_offsets(group, partitions=partitions)
        )
        committed = {each: at.offset for each, at in held.items() if at.offset >= 0}
        starts = await self._consumer.beginning_offsets(partitions)
        ends = await self._consumer.end_offsets(partitions)
        return AgentLag(
            agent=agent,
            partitions=tuple(
                PartitionLag(
                    agent=agent, partition=each.partition, start=starts[each], end=ends[each],
                    committed=committed.get(each), applied=None,
                )
                for each in partitions
            ),
        )  # fmt: skip

    async def _partitions(self, topic: str) -> list[TopicPartition]:
        cluster = await self._consumer._client.fetch_all_metadata()  # noqa: SLF001  no public call does it
        return [
            TopicPartition(topic, at) for at in sorted(cluster.partitions_for_topic(topic) or ())
        ]

    async def oldest(self, lags: Sequence[PartitionLag]) -> dict[int, int]:
        """When the log got the first record that is not applied, of partitions of one agent that are behind."""
        wanted = {
            TopicPartition(keys.SOURCE_TOPIC[each.agent], each.partition): each.next
            for each in lags
            if each.behind
        }
        found: dict[int, int] = {}
        if not wanted:
            return found
        self._consumer.assign(list(wanted))
        for partition, offset in wanted.items():
            self._consumer.seek(partition, offset)
        try:
            async with asyncio.timeout(FIRST_RECORDS_TIMEOUT_S):
                while wanted:
                    fetched = await self._consumer.getmany(*wanted, timeout_ms=500, max_records=1)
                    for partition, records in fetched.items():
                        found[partition.partition] = records[0].timestamp
                        del wanted[partition]
                        self._consumer.pause(partition)
        except TimeoutError:
            pass  # the age of those is not known; how much it is, is
        return found


async def _persist(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """The answer of a call that a Kafka which has just begun may not answer at once."""
    deadline = asyncio.get_running_loop().time() + REQUEST_TIMEOUT_MS / 1000
    while True:
        try:
            return await call()
        except KafkaError as error:
            if not error.retriable or asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(RETRY_INTERVAL_S)


async def lags(
    offsets: LagReader, settings: Settings, rules: Rules, agents: Sequence[AgentName] = AGENT_NAMES
) -> list[AgentLag]:
    """How far each agent is, by Kafka and by Redis.

    Raises:
        KafkaError: Kafka does not answer.
        StoreDown, StoreRefused: Redis does not.
    """
    found = []
    # What is applied is asked for first: then it is never ahead of the end.
    for agent in agents:
        applied = await _applied(settings, rules, agent)
        (lag_of,) = await offsets.of([agent])
        known = [
            structs.replace(each, applied=applied.get(each.partition)) for each in lag_of.partitions
        ]
        oldest = await offsets.oldest(known)
        found.append(
            AgentLag(
                agent=agent,
                partitions=tuple(
                    structs.replace(each, oldest_at=oldest.get(each.partition)) for each in known
                ),
            )
        )
    return found


async def _applied(settings: Settings, rules: Rules, agent: AgentName) -> dict[int, int]:
    found = {}
    async with StoreReader(rules.pool(agent)) as reader:
        for number in range(settings.kafka.partitions):
            partition = Partition(settings.app, agent, number)
            (fence,) = await reader.read(partition, [ReadFence()])
            if fence is not None:
                found[number] = fence.offset
    return found
