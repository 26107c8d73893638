"""How far a worker has come, by what the store says."""

from __future__ import annotations

import time
from typing import Final

import msgspec
from redis import Redis

from millpond.agents.ports import Applied
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from tests.benchmarks.events import PARTITIONS
from tests.benchmarks.scene import Process

POLL_S: Final = 0.02
STALL_S: Final = 60.0


def until_applied(
    process: Process, redis: Redis, app: str, agent: AgentName, events: int
) -> tuple[float, int]:
    """When at least so many records are in the store, and how many there are then."""
    names = [keys.applied(Partition(app, agent, number)) for number in range(PARTITIONS)]
    progressed_at, before = time.monotonic(), -1
    while True:
        fences = [msgspec.json.decode(each, type=Applied) for each in redis.mget(names) if each]
        done, now = sum(fence.offset + 1 for fence in fences), time.monotonic()
        if done >= events:
            return now, done
        if done > before:
            progressed_at, before = now, done
        process.check()
        assert now - progressed_at < STALL_S, f"nothing stored for {STALL_S:.0f} s"
        time.sleep(POLL_S)
