"""What Kafka says of an agent's log before it is replayed: where it begins and ends, and what it no longer holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName

FIRST_RECORD_TIMEOUT_S: Final = 30.0


class LogExtent(NamedTuple):
    """What a partition holds. `complete_from` is the time (ms) of its first record if there were others before; None if it
    holds everything, or nothing at all.
    """

    start: int
    end: int
    complete_from: int | None


class LogExtents:
    """The topics of one Kafka."""

    def __init__(self, reader: AIOKafkaConsumer, cluster_id: str, count: int) -> None:
        self._reader, self.cluster_id, self.count = reader, cluster_id, count

    def _partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(self.count)]

    async def extents(self, topic: str) -> dict[int, LogExtent]:
        """What each partition of a topic holds now."""
        partitions = self._partitions(topic)
        starts = await self._reader.beginning_offsets(partitions)
        ends = await self._reader.end_offsets(partitions)
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
                f"Kafka does not give out the first record of {waiting[0]}"
            ) from error
        return times

    async def at(self, topic: str, time_ms: int) -> dict[int, int]:
        """The first offset of each partition whose record is of this time or later; its end if there is none."""
        partitions = self._partitions(topic)
        found = await self._reader.offsets_for_times(dict.fromkeys(partitions, time_ms))
        ends = await self._reader.end_offsets(partitions)
        return {
            each.partition: ends[each] if found.get(each) is None else found[each].offset
            for each in partitions
        }


@asynccontextmanager
async def source(settings: KafkaSettings) -> AsyncIterator[LogExtents]:
    """A Kafka, asked without joining a group.

    Raises:
        ConfigError: it cannot be reached, or its topics have other partitions than the settings say.
    """
    options = settings.client_options()
    admin = AIOKafkaAdminClient(**options)
    reader = AIOKafkaConsumer(enable_auto_commit=False, **options)
    try:
        try:
            await admin.start()
            await reader.start()
            cluster = await admin.describe_cluster()
            described = await admin.describe_topics([keys.CLIENTS_TOPIC, keys.MESSAGES_TOPIC])
        except KafkaError as error:
            raise await unreachable(settings) from error
        _check_topics(described, settings)
        yield LogExtents(reader, str(cluster["cluster_id"]), settings.partitions)
    finally:
        await reader.stop()
        await admin.close()


def _check_topics(described: list[dict[str, Any]], settings: KafkaSettings) -> None:
    for topic in described:
        name, count = topic["topic"], len(topic["partitions"])
        if topic["error_code"]:
            raise ConfigError(f"Kafka has no topic {name}: run `millpond kafka init`")
        if count != settings.partitions:
            raise ConfigError(
                f"[kafka] partitions is {settings.partitions}, but {name} has {count}: set partitions = {count}"
            )


def horizon(agent: AgentName, extents: Mapping[int, LogExtent]) -> str | None:
    """In words, what of an agent's log is gone; None if nothing is."""
    cut = {number: extent for number, extent in extents.items() if extent.start}
    if not cut:
        return None
    topic, lost = keys.SOURCE_TOPIC[agent], sum(extent.start for extent in cut.values())
    times = [each.complete_from for each in cut.values() if each.complete_from is not None]
    told = f"{topic} has lost its first {lost} records, in {len(cut)} of {len(extents)} partitions"
    since = f": complete from {shown_time(max(times))} on" if times else ""
    return f"{told}{since}; what followed from earlier ones alone is missing"


def shown_time(at_ms: int) -> str:
    """A time as users write it."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
