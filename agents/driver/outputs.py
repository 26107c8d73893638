"""Outputs as Kafka records. What an output refers to is read now, after its transaction, and is never state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from millpond.agents.driver.dead_letters import dead_letter
from millpond.agents.driver.deliveries import BODIES_READ_MAX, DeliveryRecords, to_bridge
from millpond.agents.effects import (
    AnnounceMembership,
    DeadLetter,
    DeadLetterMessage,
    DeliverMessage,
    LookUpRetained,
    LookUpSubscriptions,
    Output,
    SendCommand,
)
from millpond.agents.ports import OutgoingRecord, Record
from millpond.agents.reads import Read, ReadBody, ReadNames, ReadRetained, ReadSubscriptions
from millpond.schemas import codec, keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S, SUBSCRIPTIONS_MAX, Deliver, Subscribe
from millpond.schemas.events import SubscriberJoined, SubscriberLeft
from millpond.schemas.keys import Partition
from millpond.schemas.topics import WILDCARDS, filter_error, has_wildcard, matches

# What one look-up may bring: a client that asks for everything gets this much of it.
RETAINED_MAX: Final = 1_000
# How far a partition's index of retained topics is searched: 100,000 of them.
TOPICS_READ_MAX: Final = 1_000
PAGES_MAX: Final = 100

ReadStore = Callable[[Sequence[Read]], Awaitable[list[Any]]]
Sources = Mapping[int, Record | None]


def needs_source(output: Output) -> bool:
    """Whether an output carries bytes that only the record has which it came from."""
    if isinstance(output, DeliverMessage):
        return not output.stored
    return isinstance(output, DeadLetter | LookUpSubscriptions)


class Outputs:
    """Makes the records of one partition's outputs."""

    def __init__(self, partition: Partition, read: ReadStore) -> None:
        """`partition_count` is set before the first output."""
        self._partition, self._read = partition, read
        self._delivery_records = DeliveryRecords(partition, read)
        self.partition_count = 0  # of every topic

    async def records(
        self, outputs: Sequence[Output], sources: Sources
    ) -> AsyncIterator[OutgoingRecord]:
        """What outputs come to, in order; `sources` are the records that they came from, as far as they are known."""
        of_messages: list[DeliverMessage | DeadLetterMessage] = []  # until something else comes
        for output in outputs:
            if isinstance(output, DeliverMessage | DeadLetterMessage):
                of_messages.append(output)
                continue
            async for record in self._delivery_records.records(of_messages, sources):
                yield record
            of_messages.clear()
            async for record in self._record(output, sources.get(output.offset)):
                yield record
        async for record in self._delivery_records.records(of_messages, sources):
            yield record

    async def _record(self, output: Output, source: Record | None) -> AsyncIterator[OutgoingRecord]:
        match output:
            case DeadLetter():
                yield dead_letter(self._partition, output, source)
            case AnnounceMembership(event=event):
                for record in self._announcements(event):
                    yield record
            case SendCommand(command=command):
                yield to_bridge(command)
            case LookUpSubscriptions():
                for record in await self._subscriptions(output, source):
                    yield record
            case _:
                assert isinstance(output, LookUpRetained), "the rest are of messages"
                async for deliver in self._retained(output):
                    yield to_bridge(deliver)

    def _announcements(self, event: SubscriberJoined | SubscriberLeft) -> list[OutgoingRecord]:
        """To the partition of its topic; with a wildcard to every one, since its topics are in any."""
        key = keys.record_key(event)
        record = OutgoingRecord(keys.MESSAGES_TOPIC, key.encode(), codec.encode(event))
        if not has_wildcard(key):
            return [record]
        return [record._replace(partition=number) for number in range(self.partition_count)]

    async def _subscriptions(
        self, output: LookUpSubscriptions, source: Record | None
    ) -> list[OutgoingRecord]:
        """What the database says now, as one command; what makes no sense there is a dead letter."""
        (table,) = await self._read([ReadSubscriptions(output.client_id)])
        filters, wrong = [], []
        for name, qos in sorted(table.items()):
            topic_filter = name.decode("utf-8", "replace")
            if filter_error(topic_filter) is None and qos in (b"0", b"1", b"2"):
                filters.append((topic_filter, int(qos)))
            else:
                wrong.append(f"{topic_filter!r} → {qos.decode(errors='replace')!r}")
        records = []
        if filters:
            chosen = tuple(filters[:SUBSCRIPTIONS_MAX])
            records.append(to_bridge(Subscribe(client_id=output.client_id, topic_filters=chosen)))
        wrong += [f"{name!r} is one too many" for name, _ in filters[SUBSCRIPTIONS_MAX:]]
        if wrong:
            key = keys.subscriptions(output.client_id)
            letter = DeadLetter(output.offset, f"{key} holds no subscriptions: {', '.join(wrong)}")
            records.append(dead_letter(self._partition, letter, source))
        return records

    async def _retained(self, output: LookUpRetained) -> AsyncIterator[Deliver]:
        topics = await self._retained_topics(output.topic_filter)
        for first in range(0, len(topics), BODIES_READ_MAX):
            some = topics[first : first + BODIES_READ_MAX]
            found = await self._read([ReadRetained(topic) for topic in some])
            ids = [message_id for message_id in found if message_id is not None]
            for body in await self._read([ReadBody(message_id) for message_id in ids]):
                deliver = _delivery(output, body)
                if deliver is not None:
                    yield deliver

    async def _retained_topics(self, topic_filter: str) -> list[str]:
        """Topics that match, by the indexes of the agents that retain; one without a wildcard is itself."""
        if not has_wildcard(topic_filter):
            return [topic_filter]
        levels = topic_filter.split("/")
        plain = levels[: next(at for at, level in enumerate(levels) if level in WILDCARDS)]
        prefix = "".join(f"{level}/" for level in plain)
        found = {"/".join(plain)} if plain else set()  # "a/#" matches "a" too
        pages = [
            ReadNames(partition, keys.RETAINED_INDEX, prefix, "", TOPICS_READ_MAX)
            for partition in self._retaining_partitions()
        ]
        for _ in range(PAGES_MAX):
            answers = await self._read(pages)
            found.update(topic for answer in answers for topic in answer)
            found = {topic for topic in found if matches(topic_filter, topic)}
            pages = [
                page._replace(after=answer[-1])
                for page, answer in zip(pages, answers, strict=True)
                if len(answer) == TOPICS_READ_MAX
            ]
            if not pages or len(found) >= RETAINED_MAX:
                break
        return sorted(found)[:RETAINED_MAX]

    def _retaining_partitions(self) -> Iterable[Partition]:
        for agent, topic in keys.SOURCE_TOPIC.items():
            if topic == keys.MESSAGES_TOPIC:
                for number in range(self.partition_count):
                    yield Partition(self._partition.app, agent, number)


def _delivery(output: LookUpRetained, body: Mapping[str, bytes]) -> Deliver | None:
    """The delivery of a stored message; None if it has just gone, or is somebody else's key."""
    try:
        message_id, topic, qos = body["id"].decode(), body["topic"].decode(), int(body["qos"])
    except (KeyError, ValueError):
        return None
    if qos not in (0, 1, 2) or not matches(output.topic_filter, topic):
        return None
    payload, encoding = codec.payload_text(body.get("payload", b""))
    return Deliver(
        client_id=output.client_id, lease="", valid_for_s=COMMAND_VALID_FOR_S, attempt=1,
        message_id=message_id, topic=topic, qos=min(qos, output.qos),  # [MQTT-3.8.4-6]
        retain=True,  # [MQTT-3.3.1-8]
        payload=payload, payload_encoding=encoding,
    )  # fmt: skip
