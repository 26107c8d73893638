"""What the sessions agent knows of clients, read from its store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from millpond.agents.reads import ReadAllStates, ReadStates
from millpond.agents.sessions.state import ClientState, unpack
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.pipeline.worker.control_channel import partition_of
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules


async def client(settings: Settings, rules: Rules, client_id: str) -> dict[str, Any] | None:
    """Everything known of one client; None if it was never heard of."""
    number = partition_of(client_id, settings.kafka.partitions)
    async with StoreReader(rules.pool("sessions")) as reader:
        partition = Partition(settings.app, "sessions", number)
        (found,) = await reader.read(partition, [ReadStates((client_id,))])
    packed = found[client_id]
    return None if packed is None else describe(client_id, unpack(packed))


async def clients(settings: Settings, rules: Rules) -> AsyncIterator[dict[str, Any]]:
    """All clients, a partition after the other; one that comes or goes meanwhile may be missed, or told twice."""
    async with StoreReader(rules.pool("sessions")) as reader:
        for number in range(settings.kafka.partitions):
            partition = Partition(settings.app, "sessions", number)
            cursor = -1
            while cursor:
                answers = await reader.read(partition, [ReadAllStates(max(cursor, 0))])
                ((cursor, states),) = answers
                for client_id, packed in states.items():
                    yield describe(client_id, unpack(packed))


def describe(client_id: str, state: ClientState) -> dict[str, Any]:
    """A client's state in words; times are ms since the epoch."""
    presence, session = state.connections.presence(), state.session
    return {
        "client_id": client_id,
        "online": presence is not None and presence.online,
        "node": None if presence is None else presence.node,
        "online_at": None if presence is None else presence.online_at,
        "offline_at": None if presence is None else presence.offline_at,
        "connections": list(state.connections.live),
        "session": None if session is None else {"id": session.id, "node": session.node},
        "subscriptions": [
            {
                "topic_filter": topic_filter,
                "qos": held.qos,
                "origin": "proxied" if held.proxied else "own",
                "resumed": session is not None and held.since < session.resumed,
            }
            for topic_filter, held in sorted(state.subscriptions.items())
        ],
    }
