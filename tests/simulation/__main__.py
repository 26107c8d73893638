"""Many seeds, until one fails or all are done: `python -m tests.simulation --seeds N [--first SEED]`."""

from __future__ import annotations

import argparse
import time
from collections import Counter

import pytest

from agents import seen
from tests.simulation.small_limits import small_limits
from tests.simulation.test_queue_simulation import Simulated
from tests.simulation.world import World

PROGRESS_SEEDS = 500


def main() -> None:
    """Print the failing seed, if any, and what happened in all worlds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    worlds: dict[str, type[World | Simulated]] = {"messages": World, "queue": Simulated}
    for agent, kind in worlds.items():
        with pytest.MonkeyPatch.context() as patch:
            if agent == "queue":
                small_limits(patch)
                patch.setattr(seen, "DEDUP_WINDOW_MS", 1_000_000)
            go_through(agent, kind, arguments)


def go_through(agent: str, kind: type[World | Simulated], arguments: argparse.Namespace) -> None:
    """All seeds of one agent."""
    happened: Counter[str] = Counter()
    started = time.monotonic()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        if seed % PROGRESS_SEEDS == 0:
            print(f"{agent}: from seed {seed} on ({time.monotonic() - started:.0f} s)", flush=True)
        world = kind(seed)
        try:
            world.live()
        except BaseException:
            print(
                f"{agent}: seed {seed} failed: python -m tests.simulation --first {seed} --seeds 1"
            )
            raise
        happened += world.happened
    print(
        f"{agent}: {arguments.seeds} worlds in {time.monotonic() - started:.0f} s: {dict(happened)}"
    )


if __name__ == "__main__":
    main()
