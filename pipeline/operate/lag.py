"""How far the agents are behind.

Each partition of an agent has three positions in the log. All are offsets of records:

- `end`: the next record that Kafka will write.
- `committed`: the first record that the consumer group has not committed. Kafka stores it.
- `applied`: the last record whose effects Redis has. The fence in Redis holds it.

A worker applies a record before it commits its offset. Retention may delete records that an agent has not applied. Then
`start` is higher than `applied` + 1, and the agent continues at `start`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, Self, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from msgspec import Struct, structs

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka.answers import (
    ANSWER_TIMEOUT_S,
    answer,
    command_options,
    connected,
)
from millpond.pipeline.settings import KafkaSettings, Settings
from millpond.pipeline.stores.redis.inspection import ReadFence
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

# Shorter than the time for an answer, so that the error is Kafka's own.
RETRIED_S: Final = ANSWER_TIMEOUT_S - 1
RETRY_INTERVAL_S: Final = 0.2
FETCH_BYTES: Final = 1  # Kafka answers with at least one batch, however large: one is enough
FIRST_RECORDS_TIMEOUT_S: Final = 5.0  # to read one record of each partition

Answer = TypeVar("Answer")


class PartitionLag(Struct, frozen=True, kw_only=True):
    """One partition of one agent, in the log from `start` to `end`.

    `applied` is the last applied offset, None if Redis has no state of the partition. `oldest_at` (ms) is the time of
    the first record that is not applied, None if there is none.
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
        """The offset where the agent continues. It skips records that retention deleted.

        Without a state in Redis the agent begins at the start of the log, whatever the group has committed.
        """
        return self.start if self.applied is None else max(self.start, self.applied + 1)

    @property
    def behind(self) -> int:
        """How many records are not applied."""
        return max(self.end - self.next, 0)


class AgentLag(Struct, frozen=True, kw_only=True):
    """All partitions of one agent."""

    agent: AgentName
    partitions: tuple[PartitionLag, ...]

    @property
    def behind(self) -> int:
        """How many records are not applied."""
        return sum(each.behind for each in self.partitions)

    @property
    def uncommitted(self) -> int:
        """How many records are not committed. Records that retention deleted do not count."""
        return sum(each.end - max(each.start, each.committed or 0) for each in self.partitions)

    @property
    def oldest_at(self) -> int | None:
        """The time (ms) of the oldest record that is not applied, None if there is none."""
        times = (each.oldest_at for each in self.partitions if each.oldest_at is not None)
        return min(times, default=None)

    def describe(self) -> dict[str, Any]:
        """The agent as a JSON object. Times are ms since the epoch."""
        return {
            "agent": self.agent,
            "behind": self.behind,
            "uncommitted": self.uncommitted,
            "oldest_at": self.oldest_at,
            "partitions": [
                {**structs.asdict(each), "behind": each.behind} for each in self.partitions
            ],
        }


class LagReader:
    """Reads the offsets of the agents' consumer groups from Kafka. A context manager.

    Raises:
        MillpondError: Kafka cannot be reached, or does not answer.
    """

    def __init__(self, settings: KafkaSettings, app: str) -> None:
        """It connects when it is entered."""
        self._settings, self._app = settings, app
        options = command_options(settings)
        self._admin = AIOKafkaAdminClient(**options)
        self._consumer = AIOKafkaConsumer(
            enable_auto_commit=False, auto_offset_reset="earliest",
            max_partition_fetch_bytes=FETCH_BYTES, **options,
        )  # fmt: skip
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        clients = connected(self._settings, self._admin, self._consumer)
        await self._stack.enter_async_context(clients)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def of(self, agents: Iterable[AgentName]) -> list[AgentLag]:
        """Read the offsets of each agent's partitions. What Redis has applied is not part of them."""
        return [
            await answer(self._settings, f"read the offsets of {agent}", self._of(agent))
            for agent in agents
        ]

    async def _of(self, agent: AgentName) -> AgentLag:
        partitions = await self._partitions(keys.SOURCE_TOPIC[agent])
        if not partitions:
            return AgentLag(agent=agent, partitions=())
        group = keys.group_id(self._app, agent)
        offsets = await _retried(
            lambda: self._admin.list_consumer_group_offsets(group, partitions=partitions)
        )
        committed = {each: at.offset for each, at in offsets.items() if at.offset >= 0}
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
        name = self._settings.topic_name(topic)
        cluster = await self._consumer._client.fetch_all_metadata()  # noqa: SLF001  no public call does this
        return [TopicPartition(name, at) for at in sorted(cluster.partitions_for_topic(name) or ())]

    async def oldest(self, lags: Sequence[PartitionLag]) -> dict[int, int]:
        """Read the time of the first record that is not applied, for each partition of one agent that is behind."""
        topic_name = self._settings.topic_name
        wanted = {
            TopicPartition(topic_name(keys.SOURCE_TOPIC[each.agent]), each.partition): each.next
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
            pass  # those partitions are listed without an age
        return found


async def _retried(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Repeat a call while it fails with a retriable error. A Kafka that has just started may do that."""
    deadline = asyncio.get_running_loop().time() + RETRIED_S
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
    """Read the lag of each agent from Kafka and Redis.

    Raises:
        MillpondError: Kafka does not answer.
        StoreDown, StoreRefused: Redis does not answer, or refuses.
    """
    found = []
    # Redis is read first: an applied offset must not be ahead of the end of its log.
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
