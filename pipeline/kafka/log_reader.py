"""Reads parts of Millpond's topics for commands, in no consumer group, and says which parts were read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from msgspec import Struct

from millpond.pipeline.kafka.answers import answer, command_options, connected
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys
from millpond.schemas.errors import MillpondError

RUN_RECORDS: Final = 5_000  # of one fetch
FETCH_BYTES: Final = 4 * 1024 * 1024
# How long Kafka may send no record although the log has more. A new leader is elected in less.
SILENCE_S: Final = 15.0


class Searched(Struct, frozen=True, kw_only=True):
    """The part of a partition that was searched: offsets from `first` up to `stop`, without `stop`.

    The log has the offsets from `start` up to `end`, without `end`.
    """

    kafka_topic: str
    partition: int
    start: int
    first: int
    stop: int
    end: int

    @property
    def whole(self) -> bool:
        """True if all of the log was searched."""
        return self.first <= self.start and self.stop >= self.end


class LogReader:
    """Reads partitions of `mqtt.messages` and `mqtt.dead-letters`, in no consumer group. A context manager.

    Raises:
        MillpondError: Kafka cannot be reached, or does not have the topics.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        """It connects when it is entered."""
        self._settings = settings
        self._consumer = AIOKafkaConsumer(
            enable_auto_commit=False, auto_offset_reset="earliest",
            max_partition_fetch_bytes=FETCH_BYTES, **command_options(settings),
        )  # fmt: skip
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(connected(self._settings, self._consumer))
            known = await answer(self._settings, "list the topics", self._consumer.topics())
            searched = (keys.MESSAGES_TOPIC, keys.DEAD_LETTERS_TOPIC)
            missing = {self._settings.topic_name(topic) for topic in searched} - known
            if missing:
                raise MillpondError(f"Kafka has no topic {min(missing)}: run `millpond kafka init`")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def bounds(self, topics: Sequence[str], numbers: Sequence[int]) -> list[Searched]:
        """The bounds of partitions, topic by topic, with nothing searched.

        `first` and `stop` are at the end of the log.
        """
        asked = [(topic, number) for topic in topics for number in numbers]
        partitions = [self._in_kafka(*each) for each in asked]
        self._consumer.assign(partitions)
        self._consumer.pause(*partitions)
        starts, ends = await answer(
            self._settings, "read the bounds of the log", self._starts_and_ends(partitions)
        )
        return [
            Searched(
                kafka_topic=topic, partition=each.partition,
                start=starts[each], first=ends[each], stop=ends[each], end=ends[each],
            )
            for (topic, _), each in zip(asked, partitions, strict=True)
        ]  # fmt: skip

    async def _starts_and_ends(self, partitions: Sequence[TopicPartition]) -> tuple[Any, Any]:
        starts = await self._consumer.beginning_offsets(partitions)
        return starts, await self._consumer.end_offsets(partitions)

    async def first_since(self, bounds: Searched, at_ms: int) -> int:
        """The first offset whose record is as late as this time, or later."""
        partition = self._in_kafka(bounds.kafka_topic, bounds.partition)
        asked = self._consumer.offsets_for_times({partition: max(at_ms, 0)})
        found = (await answer(self._settings, "find a time in the log", asked))[partition]
        return bounds.end if found is None else int(found.offset)

    async def read(self, bounds: Searched, first: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        """Read the records from `first` up to `stop`, without `stop`.

        Raises:
            MillpondError: Kafka sends no more records.
        """
        partition = self._in_kafka(bounds.kafka_topic, bounds.partition)
        self._consumer.seek(partition, first)
        self._consumer.resume(partition)
        try:
            async with asyncio.timeout(SILENCE_S) as silence:
                while await self._consumer.position(partition) < stop:
                    fetched = await self._consumer.getmany(
                        partition, timeout_ms=1_000, max_records=RUN_RECORDS
                    )
                    if records := fetched.get(partition, ()):
                        silence.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                        yield [each for each in records if each.offset < stop]
        except TimeoutError as error:
            raise MillpondError(
                f"Kafka has sent no record of {bounds.kafka_topic}[{bounds.partition}] for {SILENCE_S:g} s"
            ) from error
        finally:
            self._consumer.pause(partition)

    def _in_kafka(self, topic: str, number: int) -> TopicPartition:
        return TopicPartition(self._settings.topic_name(topic), number)
