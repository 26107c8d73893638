"""What the sessions agent knows of clients, read from its store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agents.ports import ReadAllStates, ReadStates, Store
from agents.sessions.state import ClientState, unpack
from pipeline.control import partition_of
from pipeline.settings import Settings
from pipeline.stores.registry import open_store
from schemas.keys import Partition
from schemas.rules import Rules


@asynccontextmanager
async def _store(settings: Settings, rules: Rules, number: int) -> AsyncIterator[Store[Any]]:
    store = open_store(rules.pool("sessions"), Partition(settings.app, "sessions", number))
    try:
        await store.load()
        yield store
    finally:
        await store.close()


async def client(settings: Settings, rules: Rules, client_id: str) -> dict[str, Any] | None:
    """Everything known of one client; None if it was never heard of."""
    number = partition_of(client_id, settings.kafka.partitions)
    async with _store(settings, rules, number) as store:
        ((packed,),) = [answer.values() for answer in await store.read([ReadStates((client_id,))])]
    return None if packed is None else describe(client_id, unpack(packed))


async def clients(settings: Settings, rules: Rules) -> AsyncIterator[dict[str, Any]]:
    """All clients, a partition after the other."""
    for number in range(settings.kafka.partitions):
        async with _store(settings, rules, number) as store:
            cursor = -1
            while cursor:
                ((cursor, states),) = await store.read([ReadAllStates(max(cursor, 0))])
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
