"""The extent of an agent's log in Kafka: where it begins and ends, and which records Kafka has deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from millpond.pipeline.kafka.answers import answer, command_options, connected
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName

FIRST_RECORD_TIMEOUT_S: Final = 15.0  # a new leader is elected in less


class LogExtent(NamedTuple):
    """The offsets of one partition: `end` is exclusive.

    `complete_from`: the time (ms) of the first record, if Kafka has deleted records before it. None if Kafka has deleted
    nothing, or everything.
    """

    start: int
    end: int
    complete_from: int | None


class LogExtents:
    """Asks one Kafka cluster for the extents of its topics, without a consumer group."""

    def __init__(self, reader: AIOKafkaConsumer, cluster_id: str, settings: KafkaSettings) -> None:
        self._reader, self.cluster_id, self._settings = reader, cluster_id, settings

    def _partitions(self, topic: str) -> list[TopicPartition]:
        name = self._settings.topic_name(topic)
        return [TopicPartition(name, number) for number in range(self._settings.partitions)]

    async def extents(self, topic: str) -> dict[int, LogExtent]:
        """Return the extent of each partition of a topic.

        Raises:
            MillpondError: Kafka does not return the first record of a partition in time.
        """
        partitions, reader = self._partitions(topic), self._reader
        what = f"read the bounds of {topic}"
        starts = await answer(self._settings, what, reader.beginning_offsets(partitions))
        ends = await answer(self._settings, what, reader.end_offsets(partitions))
        cut = [each for each in partitions if 0 < starts[each] < ends[each]]
        times = await self._first_times(cut)
        return {
            each.partition: LogExtent(starts[each], ends[each], times.get(each))
            for each in partitions
        }

    async def _first_times(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        times: dict[TopicPartition, int] = {}
        if not partitions:
            return times
        self._reader.assign(partitions)
        await self._reader.seek_to_beginning(*partitions)
        try:
            async with asyncio.timeout(FIRST_RECORD_TIMEOUT_S):
                while waiting := [each for each in partitions if each not in times]:
                    fetched = await self._reader.getmany(*waiting, timeout_ms=500)
                    times |= {each: run[0].timestamp for each, run in fetched.items()}
        except TimeoutError as error:
            raise MillpondError(
                f"Kafka did not return the first record of {waiting[0].topic}[{waiting[0].partition}]"
                f" within {FIRST_RECORD_TIMEOUT_S:g} s: check its log and run the command again"
            ) from error
        return times

    async def offsets_at(self, topic: str, time_ms: int) -> dict[int, int]:
        """Return the offset of each partition's first record at or after a time; without such a record, its end."""
        partitions = self._partitions(topic)
        what, reader = f"find a time in {topic}", self._reader
        finding = reader.offsets_for_times(dict.fromkeys(partitions, time_ms))
        found = await answer(self._settings, what, finding)
        ends = await answer(self._settings, what, reader.end_offsets(partitions))
        return {
            each.partition: ends[each] if found.get(each) is None else found[each].offset
            for each in partitions
        }


@asynccontextmanager
async def open_extents(settings: KafkaSettings) -> AsyncIterator[LogExtents]:
    """Connect to Kafka.

    Raises:
        ConfigError: a topic is missing, or its partition count is not that of the settings.
        MillpondError: Kafka cannot be reached.
    """
    options = command_options(settings)
    admin = AIOKafkaAdminClient(**options)
    reader = AIOKafkaConsumer(enable_auto_commit=False, **options)
    async with connected(settings, admin, reader):
        cluster = await answer(settings, "describe the cluster", admin.describe_cluster())
        names = map(settings.topic_name, (keys.CLIENTS_TOPIC, keys.MESSAGES_TOPIC))
        describing = admin.describe_topics(list(names))
        described = await answer(settings, "describe the topics", describing)
        _check_topics(described, settings)
        yield LogExtents(reader, str(cluster["cluster_id"]), settings)


def _check_topics(described: list[dict[str, Any]], settings: KafkaSettings) -> None:
    for topic in described:
        name, count = topic["topic"], len(topic["partitions"])
        if topic["error_code"]:
            raise ConfigError(f"Kafka has no topic {name}: run `millpond kafka init`")
        if count != settings.partitions:
            raise ConfigError(
                f"[kafka] partitions is {settings.partitions}, but {name} has {count}: set partitions = {count}"
            )


def describe_loss(agent: AgentName, extents: Mapping[int, LogExtent]) -> str | None:
    """Describe which records of an agent's log Kafka has deleted. None if it has deleted none."""
    cut = {number: extent for number, extent in extents.items() if extent.start}
    if not cut:
        return None
    topic, lost = keys.SOURCE_TOPIC[agent], sum(extent.start for extent in cut.values())
    times = [each.complete_from for each in cut.values() if each.complete_from is not None]
    loss = f"{topic} has lost its first {lost} records, in {len(cut)} of {len(extents)} partitions"
    since = f": complete from {format_time(max(times))} on" if times else ""
    return f"{loss}{since}; state that only older records made is missing"


def format_time(at_ms: int) -> str:
    """Return a time in the form that options such as `--from` accept."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
