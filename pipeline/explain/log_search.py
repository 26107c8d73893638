"""The search for the records about one message in Kafka.

- If Redis knows when the message was stored, its partition is read forwards from shortly before that time.
- Otherwise each partition is read backwards in chunks, from its end, until a chunk has the publish. Records that follow
  the publish may name the message by the id of a copy, which only a report in between reveals. So the partition is read
  once more, forwards from the publish.
- At last the same partition of the dead-letter topic is read.

Each pass reads at most `records_max` records. The result says which offsets were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct, field, structs

from millpond.agents.topics.dedup import DEDUP_WINDOW_MS
from millpond.pipeline.explain.results import EventKind, LogEvent
from millpond.pipeline.kafka.log_reader import LogReader, Searched
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError
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

CHUNK_RECORDS: Final = 50_000  # of one step backwards

_KINDS: Final[Mapping[type[Any], EventKind]] = {
    MessageAcked: "acked",
    MessageDelivered: "delivered",
    DeliveryFailed: "failed",
    OperatorRequeue: "requeue",
    OperatorDrop: "drop",
    OperatorRewind: "rewind",
}

Progress = Callable[[int, int], None]  # called with the number of records read, and the total


class WantedMessage:
    """The message that is searched for, by its id and by the ids that the broker gave to its copies."""

    def __init__(self, message_id: str, topic: str | None, aliases: Iterable[str] = ()) -> None:
        """`topic` is None while it is unknown."""
        self.message_id, self.topic = message_id, topic
        self.copy_of: str | None = None  # the message's own id, if `message_id` is that of a copy
        self._ids: dict[str, bytes] = {}  # as they stand in JSON
        self._may_be_escaped = False  # true if a record may have an escape in one of the ids
        for each in (message_id, *aliases):
            self._add(each)

    def _add(self, message_id: str) -> None:
        self._ids[message_id] = msgspec.json.encode(message_id)[1:-1]
        # Other writers of JSON may escape characters that ours does not. None escapes letters and digits.
        plain = message_id.isascii() and message_id.replace("-", "").replace("_", "").isalnum()
        self._may_be_escaped |= not plain

    def may_be_in(self, value: bytes | None) -> bool:
        """True if a record may name the message, so that it is worth decoding."""
        if value is None:
            return False
        return any(each in value for each in self._ids.values()) or (
            self._may_be_escaped and b"\\" in value
        )

    def events(self, record: Any) -> list[LogEvent]:
        """The events in a record of `mqtt.messages` that are about the message.

        A report may have several: one for each copy.
        """
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

    def dead_letters(self, record: Any) -> list[LogEvent]:
        """The events in a record of `mqtt.dead-letters` that are about the message."""
        headers = dict(record.headers)
        text = {name: value.decode("utf-8", "replace") for name, value in headers.items()}
        named = text.get("message-id")
        if named is None and self.may_be_in(record.value):
            try:
                named = getattr(codec.decode(record.value), "message_id", None)
            except DecodeError:
                # The record has the id somewhere, though it cannot be decoded. Its key is its topic.
                named = self.message_id
        if named != self.message_id:
            return []
        topic = None if record.key is None else record.key.decode("utf-8", "replace")
        if self.topic not in (None, topic):
            return []
        detail = f"{text.get('agent', '?')}: {text.get('reason', '?')}"
        found = _event(record, self.message_id, topic=topic)
        return [
            structs.replace(
                found, kind="dead_letter", kafka_topic=keys.DEAD_LETTERS_TOPIC, detail=detail
            )
        ]


def _event(record: Any, message_id: str, topic: str | None = None) -> LogEvent:
    return LogEvent(
        kind="published", kafka_topic=keys.MESSAGES_TOPIC, partition=record.partition,
        offset=record.offset, at=record.timestamp, message_id=message_id, topic=topic,
    )  # fmt: skip


class SearchResult(Struct, kw_only=True):
    """The events that a search found, and what it has read."""

    events: list[LogEvent] = field(default_factory=list)
    searched: list[Searched] = field(default_factory=list)

    @property
    def published(self) -> LogEvent | None:
        """The last publish among the events."""
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
    """Search the partitions `numbers` for the records about a message.

    `since_ms` is the time of its publish, if it is known. The module's docstring describes the passes.
    """
    topics = (keys.MESSAGES_TOPIC, keys.DEAD_LETTERS_TOPIC)
    every = await log.bounds(topics, numbers)
    bounds = every[: len(numbers)]
    read = _ReadCount(progress, min(records_max, sum(each.end - each.start for each in bounds)))
    found = SearchResult()
    if since_ms is not None and len(bounds) == 1:
        found = await _forwards(log, wanted, bounds[0], since_ms, records_max, read)
    if found.published is None:
        found = await _backwards(log, wanted, bounds, records_max, read)
        published = found.published
        if published is not None:
            (place,) = (each for each in bounds if each.partition == published.partition)
            read = _ReadCount(progress, min(records_max, place.end - published.offset))
            found = await _forwards(log, wanted, place, published.at, records_max, read)
    number = found.events[0].partition if found.events else numbers[0]
    if found.events or len(numbers) == 1:
        (dead_letters,) = (each for each in every[len(numbers) :] if each.partition == number)
        await _search_dead_letters(log, wanted, dead_letters, records_max, found)
    return found


class _ReadCount:
    """Counts the records that were read, and reports the progress."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self.done = progress, total, 0

    def add(self, records: int) -> None:
        self.done += records
        self._progress(min(self.done, self._total), self._total)


async def _forwards(
    log: LogReader,
    wanted: WantedMessage,
    bounds: Searched,
    at_ms: int,
    records_max: int,
    read: _ReadCount,
) -> SearchResult:
    """Search forwards from a publish.

    An ack may precede its publish in the log. The agents accept that as long as the seen ids reach, so the search
    begins that long before the publish.
    """
    first = await log.first_since(bounds, at_ms - DEDUP_WINDOW_MS)
    stop = min(bounds.end, first + records_max)
    found = SearchResult(searched=[structs.replace(bounds, first=first, stop=stop)])
    async for run in log.read(bounds, first, stop):
        found.events += [event for record in run for event in wanted.events(record)]
        read.add(len(run))
    return found


async def _backwards(
    log: LogReader,
    wanted: WantedMessage,
    bounds: Sequence[Searched],
    records_max: int,
    read: _ReadCount,
) -> SearchResult:
    """Search backwards from the end, one chunk of each partition in turn, until a chunk has the publish.

    All records about a message are in one partition. Once one has an event, the others are not read further.
    """
    found, searched, read.done = SearchResult(), list(bounds), 0
    while read.done < records_max:
        unfinished = False
        for at, each in enumerate(searched):
            elsewhere = found.events and found.events[0].partition != each.partition
            if each.first <= each.start or elsewhere or read.done >= records_max:
                continue
            unfinished = True
            first = max(each.start, each.first - min(CHUNK_RECORDS, records_max - read.done))
            chunk = [
                event
                async for run in log.read(each, first, each.first)
                for record in run
                for event in wanted.events(record)
            ]
            found.events[:0] = chunk
            read.add(each.first - first)
            searched[at] = structs.replace(each, first=first)
            if wanted.copy_of is not None or any(event.kind == "published" for event in chunk):
                return SearchResult(events=found.events, searched=searched)
        if not unfinished:
            break
    found.searched = searched
    return found


async def _search_dead_letters(
    log: LogReader, wanted: WantedMessage, bounds: Searched, records_max: int, found: SearchResult
) -> None:
    """Add the dead-letter records about a message, from its publish on."""
    first = bounds.start
    if found.published is not None:
        first = await log.first_since(bounds, found.published.at - DEDUP_WINDOW_MS)
    first = max(first, bounds.end - records_max)
    found.searched.append(structs.replace(bounds, first=first))
    async for run in log.read(bounds, first, bounds.end):
        found.events += [event for record in run for event in wanted.dead_letters(record)]
