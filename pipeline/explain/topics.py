"""The topics that have something in Redis, the deepest first.

The list comes from the agents' own tables and indexes; the keyspace is never scanned. A first pass over a partition
reads only what gives depths. Ready messages, leases and subscribers are read later, and only for the rows that may be
listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from functools import lru_cache
from itertools import starmap
from typing import Final

from msgspec import Struct, field, structs

from millpond.agents.pubsub.state import reader_key, unpack_log, unpack_reader, unpack_subscriber
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.reads import ReadIndex, ReadNames, ReadStates
from millpond.agents.topics.due_times import INDEX, due_member, split_due
from millpond.agents.topics.plans import TopicPlans
from millpond.pipeline.explain.agent_states import OWNERS, members_of
from millpond.pipeline.explain.message_states import SubscriberView
from millpond.pipeline.explain.topic import ready_for
from millpond.pipeline.operate.dead_letters import dead_letters_of
from millpond.pipeline.operate.state_pages import pages
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.inspection import CountIndex, ScanDue
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.events import AgentName
from millpond.schemas.keys import RETAINED_INDEX, Partition
from millpond.schemas.rules import Rules
from millpond.schemas.topics import matches

LISTED_MAX: Final = 50  # without --limit
NAMES_READ: Final = 500  # retained topics in one read
FILTERS_REMEMBERED: Final = 10_000  # with the topics that each matches


class TopicRow(Struct, frozen=True, kw_only=True):
    """A topic in the list.

    `ready` and `leased` are None if no agent delivers its messages. For pubsub they are sums over all subscribers.
    `subscribers` counts the online members of a queue, and all subscribers of a pubsub topic. `oldest` is the time (ms)
    of the oldest stored message.
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
    """The deepest topics. `topics` and `messages` count all; `notes` say which topics the list may lack."""

    rows: list[TopicRow]
    topics: int
    messages: int
    notes: list[str]


async def deepest(settings: Settings, rules: Rules, limit: int = LISTED_MAX) -> TopicList:
    """List the topics with the most messages, the deepest first.

    Raises:
        StoreDown, StoreRefused: Redis does not answer, or refuses.
    """
    top, topics, messages, foreign = Top(limit), 0, 0, dict[str, str]()
    for agent in OWNERS:
        async with StoreReader(rules.pool(agent)) as reader:
            for number in range(settings.kafka.partitions):
                partition = Partition(settings.app, agent, number)
                of_partition = Top(limit)
                async for row in _rows(reader, partition, rules):
                    topics += 1
                    messages += row.messages
                    of_partition.add(row)
                # A row outside the partition's own top cannot be in the top of all.
                for row in await _details(reader, partition, rules, of_partition.rows()):
                    top.add(row)
            foreign |= reader.foreign_keys
    notes = [*_notes(rules), *foreign.values()]
    return TopicList(rows=top.rows(), topics=topics, messages=messages, notes=notes)


def _notes(rules: Rules) -> list[str]:
    """Topics whose messages never expire are in no table, so the list lacks them."""
    without_expiry = [
        rule
        for rule in rules.of_agent("messages")
        if rule.action == "on_message_publish" and rule.expired_time is None
    ]
    return [
        f"the rule {rule.topic!r} has no expired_time: topics that no other rule stores are listed only if they"
        " retain a message; `millpond topics TOPIC` shows any topic"
        for rule in without_expiry
    ]


class Top:
    """Keeps the deepest rows, at most `limit`, each topic once. Memory stays below twice the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: dict[tuple[str, str], TopicRow] = {}
        self._floor = (-1, -1)  # rows that are not deeper have no place

    def add(self, row: TopicRow) -> None:
        """Add a row; one of the same topic replaces the earlier one."""
        if _depth(row) <= self._floor:
            return
        self._rows[row.agent, row.topic] = row
        if len(self._rows) >= 2 * self._limit:
            kept = self.rows()
            self._rows = {(each.agent, each.topic): each for each in kept}
            self._floor = _depth(kept[-1])

    def rows(self) -> list[TopicRow]:
        """The rows, the deepest first."""
        in_order = sorted(
            self._rows.values(), key=lambda row: (-row.messages, -row.dead, row.topic, row.agent)
        )
        return in_order[: self._limit]


def _depth(row: TopicRow) -> tuple[int, int]:
    return row.messages, row.dead


# -- all topics of a partition -----------------------------------------------------------------------------------------


async def _rows(reader: StoreReader, partition: Partition, rules: Rules) -> AsyncIterator[TopicRow]:
    """Every topic with stored, dead or retained messages."""
    dead = await _dead(reader, partition)
    only_dead = dict.fromkeys(dead)
    sources = {"messages": _stored, "queue": _queues, "pubsub": _logs}
    for source in (sources[partition.agent], _retained):
        async for row in source(reader, partition, rules):
            only_dead.pop(row.topic, None)
            yield structs.replace(row, dead=dead[row.topic])
    for topic in only_dead:
        yield structs.replace(_row(partition, topic), dead=dead[topic])


def _row(partition: Partition, topic: str, messages: int = 0) -> TopicRow:
    return TopicRow(
        topic=topic, agent=partition.agent, partition=partition.number, messages=messages
    )


async def _dead(reader: StoreReader, partition: Partition) -> Counter[str]:
    counted: Counter[str] = Counter()
    if partition.agent != "messages":
        async for dead in dead_letters_of(reader, partition):
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
    """Topics without a delivery rule. The due set has an entry for each index whose messages expire."""
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
    """Topics that retain a message and that the other sources do not list."""
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


# -- details of the listed topics --------------------------------------------------------------------------------------


async def _details(
    reader: StoreReader, partition: Partition, rules: Rules, rows: list[TopicRow]
) -> list[TopicRow]:
    """Complete rows with what takes more reads."""
    if not rows:
        return []
    topics = [row.topic for row in rows]
    oldest = await reader.read(partition, [ReadIndex(topic, 1) for topic in topics])
    (kept,) = await reader.read(partition, [ReadStates(tuple(topics))])
    readers = {topic: _Readers() for topic in topics}
    if partition.agent == "queue":
        async for topic, member in members_of(reader, partition, topics, TopicPlans(rules)):
            readers[topic].names[member.reach.name] = None
    if partition.agent == "pubsub":
        await _add_subscribers(reader, partition, rules, readers)
    return [
        structs.replace(
            row,
            oldest=entries[0][1] // 1000 if entries else None,
            retained=kept[row.topic] is not None,
            subscribers=len(readers[row.topic].names),
            ready=readers[row.topic].ready if partition.agent == "pubsub" else row.ready,
            leased=readers[row.topic].leased if partition.agent == "pubsub" else row.leased,
        )
        for row, entries in zip(rows, oldest, strict=True)
    ]


class _Readers(Struct):
    """The readers of a topic by name, and their ready and leased messages together."""

    names: dict[str, None] = field(default_factory=dict)
    ready: int = 0
    leased: int = 0


async def _add_subscribers(
    reader: StoreReader, partition: Partition, rules: Rules, readers: dict[str, _Readers]
) -> None:
    """Add the subscribers of pubsub topics, online or not."""
    plans = TopicPlans(rules)
    (packed,) = await reader.read(partition, [ReadStates(tuple(readers), "logs")])
    logs = {topic: unpack_log(packed[topic]) for topic in readers}
    matching = lru_cache(FILTERS_REMEMBERED)(
        lambda topic_filter: [topic for topic in readers if matches(topic_filter, topic)]
    )
    async for page in pages(reader, partition, "subscribers"):
        known = {name: unpack_subscriber(state) for name, state in page.items()}
        pairs = dict.fromkeys(
            (name, topic)
            for name, each in known.items()
            for topic_filter in each.known
            for topic in matching(topic_filter)
            if name not in readers[topic].names
        )
        keys = tuple(starmap(reader_key, pairs))
        (windows,) = await reader.read(partition, [ReadStates(keys, "windows")])
        views = [
            (
                topic,
                SubscriberView(
                    subscriber=name, known=known[name], reader=unpack_reader(windows[key])
                ),
            )
            for (name, topic), key in zip(pairs, keys, strict=True)
        ]
        ready = await ready_for(reader, partition, views, logs, plans)
        for (topic, view), number in zip(views, ready, strict=True):
            found = readers[topic]
            found.names[view.subscriber] = None
            found.ready += number
            found.leased += len(view.reader.leases)
