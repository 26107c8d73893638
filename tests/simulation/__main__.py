"""Run many seeds, until one fails: `python -m tests.simulation --seeds N [--first SEED] [--agent pubsub]`.

`--agent borders` folds logs of both delivery agents in many ways.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable

import pytest

from millpond.agents.topics import dedup
from millpond.schemas.errors import BrokenInvariant
from tests.simulation import borders
from tests.simulation.pubsub_faults import judge_seed
from tests.simulation.small_limits import small_limits
from tests.simulation.test_pubsub_properties import LIMITS
from tests.simulation.test_queue_simulation import Simulated
from tests.simulation.world import World

PROGRESS_SEEDS = 500


def main() -> None:
    """Run the seeds of each agent. Print the seed that fails, and how often each fault occurred."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--agent", choices=["messages", "queue", "pubsub", "borders"])
    arguments = parser.parse_args()
    worlds = {"messages": messages, "queue": queue, "pubsub": pubsub, "borders": folds}
    for agent, run_seed in worlds.items():
        if arguments.agent in (None, agent):
            soak(agent, run_seed, arguments.first, arguments.seeds)


def messages(seed: int) -> Counter[str]:
    """Run a world of the messages agent."""
    world = World(seed)
    world.play()
    return world.happened


def queue(seed: int) -> Counter[str]:
    """Run a partition of the queue agent, with the limits of its tests."""
    with pytest.MonkeyPatch.context() as patch:
        small_limits(patch)
        patch.setattr(dedup, "DEDUP_WINDOW_MS", 1_000_000)
        world = Simulated(seed)
        world.play()
    return world.happened


def pubsub(seed: int) -> Counter[str]:
    """Run a partition of the pubsub agent, with the limits of its tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIMITS.items():
            patch.setattr(name, value)
        return judge_seed(seed)


def folds(seed: int) -> Counter[str]:
    """A log of a delivery agent, folded in many ways; if they differ, the smallest log that shows it."""
    try:
        return borders.judge_seed(seed)
    except (AssertionError, BrokenInvariant):
        print(borders.smallest(seed))
        raise


def soak(agent: str, run_seed: Callable[[int], Counter[str]], first: int, seeds: int) -> None:
    """Run seeds one after the other."""
    happened: Counter[str] = Counter()
    started = time.monotonic()
    for seed in range(first, first + seeds):
        if seed % PROGRESS_SEEDS == 0:
            print(f"from seed {seed} on ({time.monotonic() - started:.0f} s)", flush=True)
        try:
            happened += run_seed(seed)
        except BaseException:
            print(
                f"seed {seed} failed: python -m tests.simulation --agent {agent} --first {seed} --seeds 1"
            )
            raise
    print(f"{seeds} worlds of {agent} in {time.monotonic() - started:.0f} s: {dict(happened)}")


if __name__ == "__main__":
    main()
