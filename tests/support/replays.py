"""What is replayed from the log is what live has: a check at the end of any test with real workers."""

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

DATABASE = 15  # of the same server, which no test uses for anything else
TIMEOUT_S = 120.0


def other_database(redis_url: str) -> str:
    """The database for replays, beside the one of this URL."""
    server = redis_url.partition("://")[2].partition("/")[0]
    return f"redis://{server}/{DATABASE}"


def replay(
    config: Path, into: str, *arguments: str, agent: str = "all", hash_seed: int = 0
) -> subprocess.CompletedProcess[str]:
    """The command `millpond replay`."""
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
    """The log, folded once more, comes to what is in Redis, where live goes on meanwhile."""
    settings, rules = load(config)
    into = other_database(redis_url)
    pool = rules.pool(agents[0])
    started = time.monotonic()
    async with Redis.from_url(into) as target:
        await target.flushdb()
        wish = ReplayRequest(agents, pool_at(pool, into), live=pool_at(pool, redis_url))
        outcome = await Replay(settings, rules, wish).run()
        await target.flushdb()
    compared = outcome.compared
    assert compared is not None
    print(
        f"replayed {outcome.records} records and compared {compared.keys} keys"
        f" in {time.monotonic() - started:.1f} s"
    )
    found = [described(each) for each in compared.differences]
    assert not found, found
