"""Many seeds, until one fails or all are done: `python -m tests.simulation --seeds N [--first SEED]`."""

from __future__ import annotations

import argparse
import time
from collections import Counter

from tests.simulation.world import World

PROGRESS_SEEDS = 500


def main() -> None:
    """Print the failing seed, if any, and what happened in all worlds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    happened: Counter[str] = Counter()
    started = time.monotonic()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        if seed % PROGRESS_SEEDS == 0:
            print(f"from seed {seed} on ({time.monotonic() - started:.0f} s)", flush=True)
        world = World(seed)
        try:
            world.live()
        except BaseException:
            print(f"seed {seed} failed: python -m tests.simulation --first {seed} --seeds 1")
            raise
        happened += world.happened
    print(f"{arguments.seeds} worlds in {time.monotonic() - started:.0f} s: {dict(happened)}")


if __name__ == "__main__":
    main()
