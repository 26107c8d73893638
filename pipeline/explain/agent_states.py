"""The states of the delivery agents in one partition, read page by page and unpacked by the agents' own functions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from typing import Final, NamedTuple

from millpond.agents.delivery.members import Member, Members, Reach
from millpond.agents.pubsub.state import (
    reader_key,
    subscriber_named,
    subscriber_of,
    unpack_reader,
    unpack_subscriber,
)
from millpond.agents.reads import ReadStates
from millpond.agents.topics.plans import TopicPlans
from millpond.pipeline.explain.message_states import SubscriberView
from millpond.pipeline.operate.state_pages import pages
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition

OWNERS: Final[tuple[AgentName, ...]] = ("messages", "queue", "pubsub")  # agents that own topics
NO_CLIENTS: Final[Mapping[str, str]] = {}


class MemberOf(NamedTuple):
    """A member as one topic sees it. In pubsub, `subscribers` are those that it belongs to by its matching filters."""

    member: Member
    reach: Reach
    subscribers: tuple[str, ...]


async def members_of(
    reader: StoreReader, partition: Partition, topics: list[str], plans: TopicPlans
) -> AsyncIterator[tuple[str, MemberOf]]:
    """Read the online members of these topics of the partition. Each comes with its topic, once for each topic."""
    async for page in pages(reader, partition, "members"):
        members = Members(plans.ignores_wildcards)
        members.supply_all(page)
        for topic in topics:
            subscribers: dict[str, dict[str, None]] = {}
            for topic_filter, name, _ in members.holding(topic):
                subscribers.setdefault(name, {})[subscriber_of(name, topic_filter)] = None
            for reach in members.reaching(topic):
                yield topic, MemberOf(members[reach.name], reach, tuple(subscribers[reach.name]))


def clients_by_subscriber(members: Iterable[MemberOf]) -> dict[str, dict[str, str]]:
    """Map each subscriber to its online members: name to client id."""
    online: dict[str, dict[str, str]] = {}
    for each in members:
        for subscriber in each.subscribers:
            online.setdefault(subscriber, {})[each.reach.name] = each.member.client_id
    return online


async def subscribers_of(
    reader: StoreReader,
    partition: Partition,
    topic: str,
    online: Mapping[str, Mapping[str, str]],
    client: str | None = None,
    dead_for: Collection[str] = (),
) -> AsyncIterator[list[SubscriberView]]:
    """Read the subscribers of a pubsub topic, page by page, each once.

    `online` comes from `clients_by_subscriber`. `client` selects one subscriber. Those in `dead_for` are read even if
    they no longer want the topic.
    """
    seen: dict[str, None] = {}
    async for packed in _subscriber_pages(reader, partition, client, dead_for):
        known = {name: unpack_subscriber(packed[name]) for name in packed if name not in seen}
        names = [
            name
            for name, each in known.items()
            if name in dead_for or each.wants(topic) is not None
        ]
        seen.update(dict.fromkeys(names))
        keys = tuple(reader_key(name, topic) for name in names)
        (windows,) = await reader.read(partition, [ReadStates(keys, "windows")])
        yield [
            SubscriberView(
                subscriber=name,
                known=known[name],
                reader=unpack_reader(windows[key]),
                online=len(online.get(name, NO_CLIENTS)),
                clients=frozenset(online.get(name, NO_CLIENTS).values()),
            )
            for name, key in zip(names, keys, strict=True)
        ]


async def _subscriber_pages(
    reader: StoreReader, partition: Partition, client: str | None, dead_for: Collection[str]
) -> AsyncIterator[Mapping[str, bytes | None]]:
    if client is not None:
        read = ReadStates((subscriber_named(client),), "subscribers")
        (packed,) = await reader.read(partition, [read])
        yield packed
        return
    async for page in pages(reader, partition, "subscribers"):
        yield page
    if dead_for:  # the table may no longer have them
        (packed,) = await reader.read(partition, [ReadStates(tuple(dead_for), "subscribers")])
        yield packed
