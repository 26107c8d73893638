"""All topics with something of theirs in Redis, listed from the agents' own indexes and tables: no key is scanned for."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from functools import lru_cache
from itertools import starmap
from typing import Final

from msgspec import Struct, field, structs

from millpond.agents.delivery.dead_messages import unpack as unpack_dead
from millpond.agents.pubsub.state import reader_key, unpack_log, unpack_reader, unpack_subscriber
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.reads import ReadIndex, ReadNames, ReadStates
from millpond.agents.topics.due_times import INDEX, due_member, split_due
from millpond.agents.topics.plans import TopicPlans
from millpond.pipeline.explain.agent_states import members_of, pages
from millpond.pipeline.explain.message_states import Reading
from millpond.pipeline.explain.topic import ready_for
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.inspection import CountIndex, ScanDue
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.events import AgentName
from millpond.schemas.keys import RETAINED_INDEX, Partition
from millpond.schemas.rules import Rules
from millpond.schemas.topics import matches

LISTED_MAX: Final = 50  # unless more are asked for
AGENTS: Final[tuple[AgentName, ...]] = ("messages", "queue", "pubsub")
NAMES_READ: Final = 500
FILTERS_REMEMBERED: Final = 10_000  # and which topics each matches


class TopicRow(Struct, frozen=True, kw_only=True):
    """A topic in the list. `ready` and `leased` are None where nobody delivers; of a pubsub topic they are of all its
    subscribers together. `subscribers` of a queue are those that are online. `oldest` is when (ms) the log had it.
    """

    topic: str
    agent: AgentName
    partition: int
    messages: int
    ready: int | None = None
    leased: int | None = None
    subscribers: int = 0
    oldest: int | None = None
    dead: int = 0
    retained: bool = False


class TopicList(Struct, frozen=True, kw_only=True):
    """The deepest topics, of so many with so many messages; what the list cannot know is in the notes."""

    rows: list[TopicRow]
    topics: int
    messages: int
    notes: list[str]


async def deepest(settings: Settings, rules: Rules, limit: int = LISTED_MAX) -> TopicList:
    """The topics with the most messages, deepest first.

    Raises:
        StoreDown, StoreRefused: Redis is away.
    """
    top, topics, messages = Top(limit), 0, 0
    for agent in AGENTS:
        async with StoreReader(rules.pool(agent)) as reader:
            for number in range(settings.kafka.partitions):
                partition = Partition(settings.app, agent, number)
                mine = Top(limit)
                async for row in _rows(reader, partition, rules):
                    topics += 1
                    messages += row.messages
                    mine.add(row)
                # Only what may be listed is looked at more closely.
                for row in await _details(reader, partition, rules, mine.rows()):
                    top.add(row)
    return TopicList(rows=top.rows(), topics=topics, messages=messages, notes=_notes(rules))


def _notes(rules: Rules) -> list[str]:
    """What cannot be listed: nothing but the index itself knows of messages that are kept for ever."""
    for_ever = [
        rule
        for rule in rules.run_by("messages")
        if rule.action == "on_message_publish" and rule.expired_time is None
    ]
    return [
        f"topics that only the rule {rule.topic!r} without expired_time keeps are not listed, unless they retain a"
        " message: `millpond topics TOPIC` shows one"
        for rule in for_ever
    ]


class Top:
    """The deepest so many rows, each topic once."""

    def __init__(self, limit: int) -> None:
        """Empty."""
        self._limit = limit
        self._rows: dict[tuple[str, str], TopicRow] = {}
        self._floor = (-1, -1)  # what is not deeper has no place

    def add(self, row: TopicRow) -> None:
        """One more, or the same once more."""
        if _depth(row) <= self._floor:
            return
        self._rows[row.agent, row.topic] = row
        if len(self._rows) >= 2 * self._limit:
            kept = self.rows()
            self._rows = {(each.agent, each.topic): each for each in kept}
            self._floor = _depth(kept[-1])

    def rows(self) -> list[TopicRow]:
        """The deepest first."""
        in_order = sorted(
            self._rows.values(), key=lambda row: (-row.messages, -row.dead, row.topic, row.agent)
        )
        return in_order[: self._limit]


def _depth(row: TopicRow) -> tuple[int, int]:
    return row.messages, row.dead


# -- all topics of a partition -----------------------------------------------------------------------------------------


async def _rows(reader: StoreReader, partition: Partition, rules: Rules) -> AsyncIterator[TopicRow]:
    """Every topic that has messages, or dead or retained ones."""
    dead = await _dead(reader, partition)
    left = dict.fromkeys(dead)
    ways = {"messages": _stored, "queue": _queues, "pubsub": _logs}
    for way in (ways[partition.agent], _retained):
        async for row in way(reader, partition, rules):
            left.pop(row.topic, None)
            yield structs.replace(row, dead=dead[row.topic])
    for topic in left:
        yield structs.replace(_row(partition, topic), dead=dead[topic])


def _row(partition: Partition, topic: str, messages: int = 0) -> TopicRow:
    return TopicRow(
        topic=topic, agent=partition.agent, partition=partition.number, messages=messages
    )


async def _dead(reader: StoreReader, partition: Partition) -> Counter[str]:
    counted: Counter[str] = Counter()
    if partition.agent != "messages":
        async for page in pages(reader, partition, "dead"):
            for dead in map(unpack_dead, page.values()):
                if dead is not None and not dead.requeued:
                    counted[dead.topic] += 1
    return counted


async def _queues(
    reader: StoreReader, partition: Partition, rules: Rules
) -> AsyncIterator[TopicRow]:
    async for page in pages(reader, partition, "windows"):
        for topic, packed in page.items():
            window = unpack_queue(packed)
            if not window.empty():
                yield structs.replace(
                    _row(partition, topic, window.length),
                    ready=window.ready, leased=len(window.leases),
                )  # fmt: skip


async def _logs(reader: StoreReader, partition: Partition, rules: Rules) -> AsyncIterator[TopicRow]:
    async for page in pages(reader, partition, "logs"):
        for topic, packed in page.items():
            log = unpack_log(packed)
            if log.length:
                yield _row(partition, topic, log.length)


async def _stored(
    reader: StoreReader, partition: Partition, rules: Rules
) -> AsyncIterator[TopicRow]:
    """Topics that nobody delivers have their index among what falls due."""
    cursor = -1
    while cursor:
        read = ScanDue(max(cursor, 0), due_member(INDEX, ""))
        ((cursor, names),) = await reader.read(partition, [read])
        topics = list(dict.fromkeys(split_due(name)[1] for name in names))
        for topic, messages in await _counted(reader, partition, topics):
            if messages:
                yield _row(partition, topic, messages)


async def _retained(
    reader: StoreReader, partition: Partition, rules: Rules
) -> AsyncIterator[TopicRow]:
    """Topics that retain a message, and are found in no other way."""
    after, plans = "", TopicPlans(rules)
    while True:
        read = ReadNames(None, RETAINED_INDEX, "", after, NAMES_READ)
        (topics,) = await reader.read(partition, [read])
        for topic, messages in await _counted(reader, partition, topics):
            listed = partition.agent != "messages" or plans.of(topic).index_lifetime_ms is not None
            if not (messages and listed):
                yield _row(partition, topic, messages)
        if len(topics) < NAMES_READ:
            return
        after = topics[-1]


async def _counted(
    reader: StoreReader, partition: Partition, topics: list[str]
) -> list[tuple[str, int]]:
    counts = await reader.read(partition, [CountIndex(topic) for topic in topics])
    return list(zip(topics, counts, strict=True))


# -- more of those that are listed -------------------------------------------------------------------------------------


async def _details(
    reader: StoreReader, partition: Partition, rules: Rules, rows: list[TopicRow]
) -> list[TopicRow]:
    """The rows with all that costs more to know."""
    if not rows:
        return []
    topics = [row.topic for row in rows]
    oldest = await reader.read(partition, [ReadIndex(topic, 1) for topic in topics])
    (kept,) = await reader.read(partition, [ReadStates(tuple(topics))])
    read_by = {topic: _Readers() for topic in topics}
    if partition.agent == "queue":
        async for topic, member in members_of(reader, partition, topics):
            read_by[topic].names[member.reach.name] = None
    if partition.agent == "pubsub":
        await _read_by(reader, partition, rules, read_by)
    return [
        structs.replace(
            row,
            oldest=entries[0][1] // 1000 if entries else None,
            retained=kept[row.topic] is not None,
            subscribers=len(read_by[row.topic].names),
            ready=read_by[row.topic].ready if partition.agent == "pubsub" else row.ready,
            leased=read_by[row.topic].leased if partition.agent == "pubsub" else row.leased,
        )
        for row, entries in zip(rows, oldest, strict=True)
    ]


class _Readers(Struct):
    """Who reads a topic, and what there is for all of them together."""

    names: dict[str, None] = field(default_factory=dict)
    ready: int = 0
    leased: int = 0


async def _read_by(
    reader: StoreReader, partition: Partition, rules: Rules, read_by: dict[str, _Readers]
) -> None:
    """The subscribers of pubsub topics, whether they are online or not."""
    plans, (packed,) = (
        TopicPlans(rules),
        await reader.read(partition, [ReadStates(tuple(read_by), "logs")]),
    )
    logs = {topic: unpack_log(packed[topic]) for topic in read_by}
    wanting = lru_cache(FILTERS_REMEMBERED)(
        lambda topic_filter: [topic for topic in read_by if matches(topic_filter, topic)]
    )
    async for page in pages(reader, partition, "subscribers"):
        known = {name: unpack_subscriber(state) for name, state in page.items()}
        pairs = dict.fromkeys(
            (name, topic)
            for name, each in known.items()
            for topic_filter in each.known
            for topic in wanting(topic_filter)
            if name not in read_by[topic].names
        )
        keys = tuple(starmap(reader_key, pairs))
        (windows,) = await reader.read(partition, [ReadStates(keys, "windows")])
        readings = [
            (
                topic,
                Reading(subscriber=name, known=known[name], reader=unpack_reader(windows[key])),
            )
            for (name, topic), key in zip(pairs, keys, strict=True)
        ]
        ready = await ready_for(reader, partition, readings, logs, plans)
        for (topic, reading), number in zip(readings, ready, strict=True):
            found = read_by[topic]
            found.names[reading.subscriber] = None
            found.ready += number
            found.leased += len(reading.reader.leases)
