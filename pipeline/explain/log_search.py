"""Records about one message, found in Kafka: which partitions are read from where, and what is picked out of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Self

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from msgspec import Struct, field, structs

from millpond.agents.topics.dedup import DEDUP_WINDOW_MS
from millpond.pipeline.explain.results import EventKind, LogEvent, Searched
from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError, MillpondError
from millpond.schemas.events import (
    DeliveriesSent,
    DeliveryFailed,
    Message,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
)

CHUNK_RECORDS: Final = 50_000  # read at once when searching backwards
RUN_RECORDS: Final = 5_000
FETCH_BYTES: Final = 4 * 1024 * 1024
SILENCE_S: Final = 30.0  # of a Kafka that has what is asked for; a new leader is elected in less

_KINDS: Final[Mapping[type[Any], EventKind]] = {
    MessageAcked: "acked",
    MessageDelivered: "delivered",
    DeliveryFailed: "failed",
    OperatorRequeue: "requeue",
    OperatorDrop: "drop",
    OperatorRewind: "rewind",
}

Progress = Callable[[int, int], None]  # records looked at, of how many


class LogReader:
    """The partitions of `mqtt.messages` and `mqtt.dead-letters`; a context manager. It is in no consumer group.

    Raises:
        MillpondError: Kafka is away, or has no such topics.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        """Connected when it is entered."""
        self._settings = settings
        self._consumer = AIOKafkaConsumer(
            enable_auto_commit=False, auto_offset_reset="earliest",
            max_partition_fetch_bytes=FETCH_BYTES, **settings.client_options(),
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        try:
            await self._consumer.start()
            known = await self._consumer.topics()
        except KafkaError as error:
            await self._consumer.stop()
            raise MillpondError(str(await unreachable(self._settings))) from error
        missing = {keys.MESSAGES_TOPIC, keys.DEAD_LETTERS_TOPIC} - known
        if missing:
            await self._consumer.stop()
            raise MillpondError(f"Kafka has no topic {min(missing)}: run `millpond kafka init`")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    async def bounds(self, partitions: Sequence[TopicPartition]) -> list[Searched]:
        """What the log has of partitions, of which nothing has been looked at: `first` and `stop` are its end."""
        self._consumer.assign(partitions)
        self._consumer.pause(*partitions)
        starts = await self._consumer.beginning_offsets(partitions)
        ends = await self._consumer.end_offsets(partitions)
        return [
            Searched(
                kafka_topic=each.topic, partition=each.partition,
                start=starts[each], first=ends[each], stop=ends[each], end=ends[each],
            )
            for each in partitions
        ]  # fmt: skip

    async def first_since(self, bounds: Searched, at_ms: int) -> int:
        """The first offset whose record is not older."""
        partition = _partition(bounds)
        found = (await self._consumer.offsets_for_times({partition: max(at_ms, 0)}))[partition]
        return bounds.end if found is None else int(found.offset)

    async def read(self, bounds: Searched, first: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        """The records from `first` up to, not with, `stop`."""
        partition = _partition(bounds)
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
                f"Kafka has told nothing of {partition.topic}[{partition.partition}] for {SILENCE_S:g} s"
            ) from error
        finally:
            self._consumer.pause(partition)


def _partition(bounds: Searched) -> TopicPartition:
    return TopicPartition(bounds.kafka_topic, bounds.partition)


class WantedMessage:
    """What is looked for: a message, by its id and by those that the broker gave its copies."""

    def __init__(self, message_id: str, topic: str | None, aliases: Iterable[str] = ()) -> None:
        """`topic` None: it is yet to be found out."""
        self.message_id, self.topic = message_id, topic
        self.copy_of: str | None = None  # whose, if the id is one that the broker gave a copy
        self._ids: dict[str, bytes] = {}
        self._escaped = False
        for each in (message_id, *aliases):
            self._add(each)

    def _add(self, message_id: str) -> None:
        self._ids[message_id] = msgspec.json.encode(message_id)[1:-1]
        # Other writers of JSON may escape what ours does not; letters and digits nobody does.
        plain = message_id.isascii() and message_id.replace("-", "").replace("_", "").isalnum()
        self._escaped |= not plain

    def may_be_in(self, value: bytes | None) -> bool:
        """Whether it is worth to decode a record."""
        if value is None:
            return False
        return any(each in value for each in self._ids.values()) or (
            self._escaped and b"\\" in value
        )

    def events(self, record: Any) -> list[LogEvent]:
        """What a record says of the message: a report of a bridge may be about several copies."""
        if record.topic == keys.DEAD_LETTERS_TOPIC:
            return self._dead_letters(record)
        if not self.may_be_in(record.value):
            return []
        try:
            event = codec.decode(record.value)
        except DecodeError:
            return []
        if isinstance(event, DeliveriesSent):
            return self._sent(record, event)
        named = getattr(event, "message_id", None)
        topic = getattr(event, "topic", None)
        if named not in self._ids or (topic and self.topic not in (None, topic)):
            return []
        found = _event(record, named, topic=topic)
        if isinstance(event, Message):
            kind: EventKind = "published" if isinstance(event, MessagePublished) else "retained"
            return [
                structs.replace(
                    found, kind=kind, client_id=event.client_id, qos=event.qos,
                    expires_at=event.expires_at,
                )
            ]  # fmt: skip
        lease = event.lease if isinstance(event, DeliveryFailed) else None
        return [
            structs.replace(
                found, kind=_KINDS[type(event)], lease=lease,
                client_id=getattr(event, "client_id", getattr(event, "subscriber", None)),
                qos=getattr(event, "qos", None), detail=getattr(event, "reason", None),
            )
        ]  # fmt: skip

    def _sent(self, record: Any, event: DeliveriesSent) -> list[LogEvent]:
        found = []
        for each in event.sent:
            if each.alias == self.message_id:
                self.copy_of = each.message_id
            if self.message_id in (each.message_id, each.alias):
                if each.alias is not None:
                    self._add(each.alias)
                one = _event(record, each.alias or each.message_id)
                found.append(
                    structs.replace(
                        one, kind="sent", client_id=each.client_id, lease=each.lease, qos=each.qos
                    )
                )
        return found

    def _dead_letters(self, record: Any) -> list[LogEvent]:
        headers = dict(record.headers)
        text = {name: value.decode("utf-8", "replace") for name, value in headers.items()}
        named = text.get("message-id")
        if named is None and self.may_be_in(record.value):
            try:
                named = getattr(codec.decode(record.value), "message_id", None)
            except DecodeError:
                # What nobody can read may still name it; its key is its topic.
                named = self.message_id
        if named != self.message_id:
            return []
        topic = None if record.key is None else record.key.decode("utf-8", "replace")
        if self.topic not in (None, topic):
            return []
        detail = f"{text.get('agent', '?')}: {text.get('reason', '?')}"
        found = _event(record, self.message_id, topic=topic)
        return [structs.replace(found, kind="dead_letter", detail=detail)]


def _event(record: Any, message_id: str, topic: str | None = None) -> LogEvent:
    return LogEvent(
        kind="published", kafka_topic=record.topic, partition=record.partition,
        offset=record.offset, at=record.timestamp, message_id=message_id, topic=topic,
    )  # fmt: skip


class SearchResult(Struct, kw_only=True):
    """What a search has come to."""

    events: list[LogEvent] = field(default_factory=list)
    searched: list[Searched] = field(default_factory=list)

    @property
    def published(self) -> LogEvent | None:
        """The last publish."""
        found = [each for each in self.events if each.kind == "published"]
        return found[-1] if found else None


async def search(
    log: LogReader,
    wanted: WantedMessage,
    numbers: Sequence[int],
    since_ms: int | None,
    records_max: int,
    progress: Progress = lambda done, total: None,
) -> SearchResult:
    """All records about a message in these partitions: backwards to its publish, then on from there, each time through
    at most so many records; then those among the dead letters. `since_ms` is about when it was published, if that is
    known.
    """
    topics = (keys.MESSAGES_TOPIC, keys.DEAD_LETTERS_TOPIC)
    every = await log.bounds([TopicPartition(each, at) for each in topics for at in numbers])
    bounds = every[: len(numbers)]
    steps = _Steps(progress, min(records_max, sum(each.end - each.start for each in bounds)))
    found = SearchResult()
    if since_ms is not None and len(bounds) == 1:
        found = await _from(log, wanted, bounds[0], since_ms, records_max, steps)
    if found.published is None:
        found = await _backwards(log, wanted, bounds, records_max, steps)
        published = found.published
        if published is not None:
            (where,) = (each for each in bounds if each.partition == published.partition)
            steps = _Steps(progress, min(records_max, where.end - published.offset))
            found = await _from(log, wanted, where, published.at, records_max, steps)
    where_found = found.events[0].partition if found.events else numbers[0]
    if found.events or len(numbers) == 1:
        (letters,) = (each for each in every[len(numbers) :] if each.partition == where_found)
        await _dead_letters(log, wanted, letters, records_max, found)
    return found


class _Steps:
    """Counts what was looked at."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self.done = progress, total, 0

    def add(self, records: int) -> None:
        self.done += records
        self._progress(min(self.done, self._total), self._total)


async def _from(
    log: LogReader,
    wanted: WantedMessage,
    bounds: Searched,
    at_ms: int,
    records_max: int,
    steps: _Steps,
) -> SearchResult:
    """Forwards from a publish. An ack may have overtaken it, by as long as one is waited for."""
    first = await log.first_since(bounds, at_ms - DEDUP_WINDOW_MS)
    stop = min(bounds.end, first + records_max)
    found = SearchResult(searched=[structs.replace(bounds, first=first, stop=stop)])
    async for run in log.read(bounds, first, stop):
        found.events += [event for record in run for event in wanted.events(record)]
        steps.add(len(run))
    return found


async def _backwards(
    log: LogReader,
    wanted: WantedMessage,
    bounds: Sequence[Searched],
    records_max: int,
    steps: _Steps,
) -> SearchResult:
    """A piece of each partition after the other, from its end, until the publish is found. Once anything is, the others
    are left alone.
    """
    found, searched, steps.done = SearchResult(), list(bounds), 0
    while steps.done < records_max:
        some = False
        for at, each in enumerate(searched):
            elsewhere = found.events and found.events[0].partition != each.partition
            if each.first <= each.start or elsewhere or steps.done >= records_max:
                continue
            some = True
            first = max(each.start, each.first - min(CHUNK_RECORDS, records_max - steps.done))
            chunk = [
                event
                async for run in log.read(each, first, each.first)
                for record in run
                for event in wanted.events(record)
            ]
            found.events[:0] = chunk
            steps.add(each.first - first)
            searched[at] = structs.replace(each, first=first)
            if wanted.copy_of is not None or any(event.kind == "published" for event in chunk):
                return SearchResult(events=found.events, searched=searched)
        if not some:
            break
    found.searched = searched
    return found


async def _dead_letters(
    log: LogReader, wanted: WantedMessage, bounds: Searched, records_max: int, found: SearchResult
) -> None:
    """The records about a message among the dead letters of its partition, after its publish."""
    first = bounds.start
    if found.published is not None:
        first = await log.first_since(bounds, found.published.at - DEDUP_WINDOW_MS)
    first = max(first, bounds.end - records_max)
    found.searched.append(structs.replace(bounds, first=first))
    async for run in log.read(bounds, first, bounds.end):
        found.events += [event for record in run for event in wanted.events(record)]
