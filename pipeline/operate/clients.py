"""The clients that the sessions agent knows, read from its store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from millpond.agents.reads import ReadStates
from millpond.agents.sessions.state import ClientState, unpack
from millpond.pipeline.kafka.partitioning import partition_of
from millpond.pipeline.operate.state_pages import pages
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules


async def client(settings: Settings, rules: Rules, client_id: str) -> dict[str, Any] | None:
    """Describe one client; None if the sessions agent does not know it."""
    number = partition_of(client_id, settings.kafka.partitions)
    async with StoreReader(rules.pool("sessions")) as reader:
        partition = Partition(settings.app, "sessions", number)
        (found,) = await reader.read(partition, [ReadStates((client_id,))])
    packed = found[client_id]
    return None if packed is None else _describe(client_id, unpack(packed))


async def clients(settings: Settings, rules: Rules) -> AsyncIterator[dict[str, Any]]:
    """Describe all clients, partition by partition. One that changes meanwhile may be missing or appear twice."""
    async with StoreReader(rules.pool("sessions")) as reader:
        for number in range(settings.kafka.partitions):
            partition = Partition(settings.app, "sessions", number)
            async for page in pages(reader, partition):
                for client_id, packed in page.items():
                    yield _describe(client_id, unpack(packed))


def _describe(client_id: str, state: ClientState) -> dict[str, Any]:
    """A client as a JSON object. Times are ms since the epoch."""
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
                "qos": subscription.qos,
                "origin": "proxied" if subscription.proxied else "own",
                "resumed": session is not None and subscription.since < session.resumed,
            }
            for topic_filter, subscription in sorted(state.subscriptions.items())
        ],
    }
