"""The sessions agent: how fast clients come and go, and what a million of their sessions cost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import psutil

from millpond.schemas import keys
from millpond.schemas.events import Event
from millpond.schemas.keys import Partition
from tests.benchmarks import limit, scene
from tests.benchmarks.events import (
    FIRST_MS,
    client_name,
    connects_and_disconnects,
    fill,
    peer,
    registrations,
)
from tests.benchmarks.progress import until_applied
from tests.benchmarks.table import progress
from tests.support import given

CLIENTS: Final = 100_000
SESSIONS: Final = 1_000_000
EVENTS_OF_A_SESSION: Final = 3
START_SHARE: Final = 0.05  # by then the worker is up
APP: Final = "bench-sessions"
RULES: Final = given.a_rule(hook="client.connected", action="on_client_connected") + given.a_rule(
    hook="client.disconnected", action="on_client_disconnected"
)


class Registry(NamedTuple):
    """RSS in MiB with a tenth of the sessions and with all; bytes of Redis for each session."""

    first: float
    last: float
    redis_bytes: float


def presence() -> float:
    """Events per second by one worker: everybody connects, then everybody disconnects."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        _fill(settings.bootstrap_servers[0], connects_and_disconnects(CLIENTS))
        scene.configure(Path(name), APP, settings, scene.address(redis), rules=RULES)
        process = scene.millpond("worker", "worker", "sessions", directory=Path(name))
        try:
            first_at, first = until_applied(
                process, redis, APP, "sessions", int(2 * CLIENTS * START_SHARE)
            )
            last_at, last = until_applied(process, redis, APP, "sessions", 2 * CLIENTS)
        finally:
            process.kill()
        state = redis.hget(keys.presence(client_name(0)), "state")
        assert state == "0", "a client that left is online"
    return (last - first) / (last_at - first_at)


def presence_limit() -> float:
    """Events per second that Redis takes: what the worker writes for each, one kind of command after the other."""
    client_id, node = f"device-{limit.RANDOM}", "emqx@10.0.0.1"
    state = f'[[{{"{peer(0)}":["{node}",{FIRST_MS},1]}},{{}},null,null],[1,"{node}",1,0],{{}},0]'
    partition = Partition(APP, "sessions", 0)
    second = str(FIRST_MS // 1000)
    commands = (
        ["HSET", keys.table(partition, "states"), client_id, state.replace('"', "x")],
        ["ZADD", keys.index(partition, f"seen:{node}"), limit.RANDOM, client_id],
        ["HSET", keys.presence(client_id), "state", "1", "online_at", second, "offline_at", second],
        ["HSET", keys.node(node), client_id, second],
    )
    with TemporaryDirectory() as name, scene.redis(Path(name) / "redis") as redis:
        address = scene.address(redis)
        seconds = sum(CLIENTS / limit.rate(address, CLIENTS, command) for command in commands)
    return CLIENTS / seconds


def registry() -> Registry:
    """A million sessions, each with a connection and a subscription."""
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        progress(f"registry: writing {SESSIONS:,} sessions into Kafka")
        _fill(settings.bootstrap_servers[0], registrations(SESSIONS))
        before = redis.info("memory")["used_memory"]
        scene.configure(Path(name), APP, settings, scene.address(redis), rules=RULES)
        process = scene.millpond("worker", "worker", "sessions", directory=Path(name))
        try:
            worker = psutil.Process(process.pid)
            events = EVENTS_OF_A_SESSION * SESSIONS
            until_applied(process, redis, APP, "sessions", events // 10)
            first = worker.memory_info().rss / 2**20
            until_applied(process, redis, APP, "sessions", events)
            last = worker.memory_info().rss / 2**20
        finally:
            process.kill()
        used = redis.info("memory")["used_memory"] - before
    return Registry(first, last, used / SESSIONS)


def _fill(bootstrap: str, events: Iterable[tuple[int, Event]]) -> None:
    asyncio.run(fill(bootstrap, keys.CLIENTS_TOPIC, events))
