"""The delivery agents' own states of one partition, read piece by piece and unpacked by the agents' own functions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

from millpond.agents.delivery.members import Member, Members, Reach
from millpond.agents.effects import Table
from millpond.agents.pubsub.state import subscriber_of
from millpond.agents.reads import ReadAllStates
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.keys import Partition


class MemberOf(NamedTuple):
    """A member, how one topic sees it, and the subscribers that it is in pubsub, by the filters that match."""

    member: Member
    reach: Reach
    subscribers: tuple[str, ...]


async def pages(
    reader: StoreReader, partition: Partition, table: Table
) -> AsyncIterator[dict[str, bytes]]:
    """A table, some hundred states at a time; one that changes meanwhile may be missed, or told twice."""
    cursor = -1
    while cursor:
        ((cursor, states),) = await reader.read(partition, [ReadAllStates(max(cursor, 0), table)])
        if states:
            yield states


async def members_of(
    reader: StoreReader, partition: Partition, topics: list[str]
) -> AsyncIterator[tuple[str, MemberOf]]:
    """Who is online for these topics of the partition, each with its topic."""
    async for page in pages(reader, partition, "members"):
        members = Members()
        members.supply_all(page)
        for topic in topics:
            subscribers: dict[str, dict[str, None]] = {}
            for topic_filter, name, _ in members.holding(topic):
                subscribers.setdefault(name, {})[subscriber_of(name, topic_filter)] = None
            for reach in members.reaching(topic):
                yield topic, MemberOf(members[reach.name], reach, tuple(subscribers[reach.name]))
