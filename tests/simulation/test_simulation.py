"""A few hundred seeded worlds; `python -m tests.simulation` (make soak) goes through many more."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.world import World

SEEDS, CHUNK = 240, 24


@pytest.fixture(scope="module")
def happened() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_whatever_happens_everything_is_applied_once_and_comes_right_in_the_end(
    first: int, happened: Counter[str]
) -> None:
    for seed in range(first, first + CHUNK):
        print(
            f"seed {seed}"
        )  # shown if it fails; python -m tests.simulation --first SEED --seeds 1
        world = World(seed)
        world.live()
        happened.update(world.happened)


def test_every_fault_has_happened(happened: Counter[str]) -> None:
    assert happened.keys() >= {
        "crash", "pause", "release", "new owner", "store down", "store emptied", "failover", "retention",
        "lost before it was applied", "given up, yet on the wire", "reply lost",
        "a dead letter was sent again", "fenced", "records lost",
    }  # fmt: skip
