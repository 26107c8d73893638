"""`millpond replay` for tests, and a check for the end of tests with real workers: a replay equals the live state."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from redis.asyncio import Redis

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.cli.replay_commands import described
from millpond.pipeline.replay.run import Replay, ReplayRequest
from millpond.pipeline.settings import load, pool_at
from millpond.schemas.events import AgentName

DATABASE = 15  # no test uses this database of its server for anything else
TIMEOUT_S = 120.0


def other_database(redis_url: str) -> str:
    """Return the database for replays on the server of this URL."""
    server = redis_url.partition("://")[2].partition("/")[0]
    return f"redis://{server}/{DATABASE}"


def replay(
    config: Path, into: str, *arguments: str, agent: str = "all", hash_seed: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `millpond replay`."""
    return subprocess.run(
        [
            sys.executable, "-m", "millpond", "replay", agent, "--config", str(config),
            "--into", into, *arguments,
        ],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )  # fmt: skip


async def check_replay(
    config: Path, redis_url: str, agents: Sequence[AgentName] = AGENT_NAMES
) -> None:
    """Check that a replay of the log gives the content of Redis. Workers may run meanwhile."""
    settings, rules = load(config)
    into = other_database(redis_url)
    pool = rules.pool(agents[0])
    started = time.monotonic()
    async with Redis.from_url(into) as target:
        await target.flushdb()
        request = ReplayRequest(agents, pool_at(pool, into), live=pool_at(pool, redis_url))
        outcome = await Replay(settings, rules, request).run()
        await target.flushdb()
    compared = outcome.compared
    assert compared is not None
    print(
        f"replayed {outcome.records} records and compared {compared.keys} keys"
        f" in {time.monotonic() - started:.1f} s"
    )
    differences = [described(each) for each in compared.differences]
    assert not differences, differences
