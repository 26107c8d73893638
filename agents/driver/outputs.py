"""Outputs as Kafka records.

An output refers to its data. The data is read here, after the transaction: so no journal holds payloads, and what a
look-up finds is never part of an agent's state.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from millpond.agents.driver.dead_letters import dead_letter_record
from millpond.agents.driver.deliveries import BODIES_READ_MAX, DeliveryRecords, to_bridge
from millpond.agents.driver.observer import Observer
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
from millpond.agents.reads import (
    Read,
    ReadBody,
    ReadNames,
    ReadRetained,
    ReadSubscriptions,
    WrongType,
)
from millpond.schemas import codec, keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S, SUBSCRIPTIONS_MAX, Deliver, Subscribe
from millpond.schemas.events import SubscriberJoined, SubscriberLeft
from millpond.schemas.keys import Partition
from millpond.schemas.topics import WILDCARDS, filter_error, has_wildcard, matches, standard_filter

# Retained messages for one look-up. A client that subscribes to "#" gets so many, and no more.
RETAINED_MAX: Final = 1_000
# A look-up searches at most 100 pages of 1,000 topics in each partition's index of retained topics.
TOPICS_READ_MAX: Final = 1_000
PAGES_MAX: Final = 100

ReadStore = Callable[[Sequence[Read]], Awaitable[list[Any]]]
Sources = Mapping[int, Record | None]


def needs_source(output: Output) -> bool:
    """True if making the output's Kafka record needs the record that the output came from."""
    if isinstance(output, DeliverMessage):
        return not output.stored
    return isinstance(output, DeadLetter | LookUpSubscriptions | LookUpRetained)


class Outputs:
    """Makes the Kafka records of one partition's outputs. The driver sets `partition_count` before the first one."""

    def __init__(self, partition: Partition, read: ReadStore, observer: Observer) -> None:
        self._partition, self._read, self._observer = partition, read, observer
        self._delivery_records = DeliveryRecords(partition, read)
        self.partition_count = 0  # of each of Millpond's topics

    async def records(
        self, outputs: Sequence[Output], sources: Sources
    ) -> AsyncIterator[OutgoingRecord]:
        """Yield the Kafka records of the outputs, in order.

        `sources` are the records that outputs came from, by offset: those of the batch, or as the journal needs them.
        """
        # Consecutive outputs with a message are collected: their bodies are read together.
        message_outputs: list[DeliverMessage | DeadLetterMessage] = []
        for output in outputs:
            if isinstance(output, DeliverMessage | DeadLetterMessage):
                message_outputs.append(output)
                continue
            async for record in self._delivery_records.records(message_outputs, sources):
                yield record
            message_outputs.clear()
            async for record in self._record(output, sources.get(output.offset)):
                yield record
        async for record in self._delivery_records.records(message_outputs, sources):
            yield record

    async def _record(self, output: Output, source: Record | None) -> AsyncIterator[OutgoingRecord]:
        match output:
            case DeadLetter():
                yield dead_letter_record(self._partition, output, source)
            case AnnounceMembership(event=event):
                for record in self._announcements(event):
                    yield record
            case SendCommand(command=command):
                yield to_bridge(command)
            case LookUpSubscriptions():
                for record in await self._subscriptions(output, source):
                    yield record
            case _:
                assert isinstance(output, LookUpRetained), "`records` handles the others"
                async for record in self._retained(output, source):
                    yield record

    def _announcements(self, event: SubscriberJoined | SubscriberLeft) -> list[OutgoingRecord]:
        """Return one record for a plain filter, and one for each partition if the filter has a wildcard.

        The topics that match a wildcard can be in any partition.
        """
        key = keys.record_key(event)
        record = OutgoingRecord(keys.MESSAGES_TOPIC, key.encode(), codec.encode(event))
        if not has_wildcard(key):
            return [record]
        return [record._replace(partition=number) for number in range(self.partition_count)]

    async def _subscriptions(
        self, output: LookUpSubscriptions, source: Record | None
    ) -> list[OutgoingRecord]:
        """Return one command with the client's subscriptions in the store, and one dead letter for invalid ones."""
        (table,) = await self._read([ReadSubscriptions(output.client_id)])
        if isinstance(table, WrongType):
            reason = (
                f"{table.key} is no hash of topic filters, so no subscriptions are read for the client: {table.reason};"
                " delete the key, and write it with HSET"
            )
            return [self._look_up_failed("subscriptions", output.offset, reason, source)]
        filters, invalid = [], []
        for name, qos in sorted(table.items()):
            # An invalid byte becomes a lone surrogate, so it makes the filter invalid, and the reason shows it.
            topic_filter = name.decode("utf-8", "surrogateescape")
            error = filter_error(topic_filter)
            if error is None and qos not in (b"0", b"1", b"2"):
                error = "the QoS is not 0, 1 or 2"
            if error is None:
                filters.append((standard_filter(topic_filter), int(qos)))
            else:
                invalid.append(f"{topic_filter!r} → {qos.decode(errors='replace')!r} ({error})")
        records = []
        if filters:
            chosen = tuple(filters[:SUBSCRIPTIONS_MAX])
            records.append(to_bridge(Subscribe(client_id=output.client_id, topic_filters=chosen)))
        invalid += [
            f"{name!r} is beyond the limit of {SUBSCRIPTIONS_MAX}"
            for name, _ in filters[SUBSCRIPTIONS_MAX:]
        ]
        if invalid:
            key = keys.subscriptions(output.client_id)
            reason = f"{key} holds invalid subscriptions: {', '.join(invalid)}"
            records.append(self._look_up_failed("subscriptions", output.offset, reason, source))
        return records

    def _look_up_failed(
        self, kind: str, offset: int, reason: str, source: Record | None
    ) -> OutgoingRecord:
        self._observer.dead_letter(kind)
        return dead_letter_record(self._partition, DeadLetter(offset, reason), source)

    async def _retained(
        self, output: LookUpRetained, source: Record | None
    ) -> AsyncIterator[OutgoingRecord]:
        """Yield a command for each retained message, and one dead letter for all keys of another type."""
        topics = await self._retained_topics(output.topic_filter)
        foreign: list[WrongType] = []
        for first in range(0, len(topics), BODIES_READ_MAX):
            chunk = topics[first : first + BODIES_READ_MAX]
            found = await self._read([ReadRetained(topic) for topic in chunk])
            foreign += [each for each in found if isinstance(each, WrongType)]
            ids = [message_id for message_id in found if isinstance(message_id, str)]
            for body in await self._read([ReadBody(message_id) for message_id in ids]):
                deliver = _delivery(output, body)
                if deliver is not None:
                    yield to_bridge(deliver)
        if foreign:
            named = ", ".join(each.key for each in foreign)
            reason = f"a retained message cannot be read: {foreign[0].reason}; delete {named}"
            yield self._look_up_failed("retained", output.offset, reason, source)

    async def _retained_topics(self, topic_filter: str) -> list[str]:
        """Return the topics that match a filter, sorted, at most `RETAINED_MAX`.

        A filter without a wildcard is the topic itself. A wildcard searches the indexes of all agents that retain.
        """
        if not has_wildcard(topic_filter):
            return [topic_filter]
        levels = topic_filter.split("/")
        # The levels in front of the first wildcard limit the search: index entries are sorted by name.
        plain = levels[: next(at for at, level in enumerate(levels) if level in WILDCARDS)]
        prefix = "".join(f"{level}/" for level in plain)
        # "a/#" matches "a" too (MQTT 3.1.1, 4.7.1.2), and the prefix "a/" does not find it.
        found = {"/".join(plain)} if plain else set()
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
        """Yield the partitions of the agents that own topics."""
        for agent, topic in keys.SOURCE_TOPIC.items():
            if topic == keys.MESSAGES_TOPIC:
                for number in range(self.partition_count):
                    yield Partition(self._partition.app, agent, number)


def _delivery(output: LookUpRetained, body: Mapping[str, bytes]) -> Deliver | None:
    """Return the command that delivers a retained message; None if the body is gone, or the key is not Millpond's."""
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
