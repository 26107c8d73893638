"""Seeded pubsub partitions under faults. `python -m tests.simulation --agent pubsub` runs many more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.pubsub_faults import judge_seed
from tests.simulation.test_pubsub_properties import LIMITS

SEEDS, CHUNK = 120, 30


@pytest.fixture(autouse=True, scope="module")
def _small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIMITS.items():
            patch.setattr(name, value)
        yield


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_after_any_faults_every_subscriber_continues_at_its_read_offset(first: int) -> None:
    for seed in range(first, first + CHUNK):
        # Shown if it fails.
        print(f"seed {seed}")
        judge_seed(seed)


def test_every_fault_occurs_in_a_few_seeds() -> None:
    happened = sum((judge_seed(seed) for seed in range(CHUNK)), Counter[str]())
    assert happened.keys() >= {
        "killed: before", "killed: after", "killed: read", "down: before", "down: after", "down: read",
        "down: load", "taken over", "stray owner", "emptied",
    }  # fmt: skip
