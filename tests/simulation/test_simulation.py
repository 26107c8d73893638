"""A few hundred seeded worlds of the messages agent. `python -m tests.simulation` (make soak) runs many more."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.world import World

SEEDS, CHUNK = 240, 24


@pytest.fixture(scope="module")
def happened() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_after_any_faults_every_record_is_applied_once(first: int, happened: Counter[str]) -> None:
    for seed in range(first, first + CHUNK):
        # Shown if it fails: python -m tests.simulation --first SEED --seeds 1
        print(f"seed {seed}")
        world = World(seed)
        world.play()
        happened.update(world.happened)


def test_every_fault_has_occurred(happened: Counter[str]) -> None:
    assert happened.keys() >= {
        "crash", "pause", "release", "new owner", "store down", "store emptied", "failover", "retention",
        "lost before it was applied", "given up, but in flight", "reply lost",
        "a dead letter was sent again", "fenced", "records lost",
    }  # fmt: skip
