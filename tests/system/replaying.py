"""What is replayed from the log is what live has: a check at the end of any test with real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from redis import Redis

DATABASE = 15  # of the same server, which no test uses for anything else
TIMEOUT_S = 120.0


def replay(
    config: Path, redis_url: str, *arguments: str, agent: str = "all", hash_seed: int = 0
) -> subprocess.CompletedProcess[str]:
    """`millpond replay` into another database of the server, which is empty before and after."""
    server = redis_url.partition("://")[2].partition("/")[0]
    into = f"redis://{server}/{DATABASE}"
    with Redis.from_url(into) as target:
        target.flushdb()
        ended = subprocess.run(
            [
                sys.executable, "-m", "pipeline.cli", "replay", agent, "--config", str(config),
                "--into", into, *arguments,
            ],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        )  # fmt: skip
        target.flushdb()
    return ended


def differences(
    config: Path, redis_url: str, *, agent: str = "all", hash_seed: int = 0
) -> list[Any]:
    """Where a replay differs from what live has, which goes on meanwhile."""
    ended = replay(
        config, redis_url, "--diff", redis_url, "--json", agent=agent, hash_seed=hash_seed
    )
    assert ended.returncode in (0, 1), ended.stderr
    assert ended.stdout, ended.stderr
    told = json.loads(ended.stdout)
    print(f"replayed {told['records']} records, compared {told['diff']['keys']} keys", ended.stderr)
    found: list[Any] = told["diff"]["differences"]
    assert told["diff"]["equal"] == (not found) == (ended.returncode == 0)
    return found
