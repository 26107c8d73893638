"""Properties of pubsub logs: what is always true, and that neither batches nor owners nor evictions decide.

Bugs planted to try the tests, and what found them: an offset that passes a gap, a loss that is not counted, a member
that comes back and is dropped, "since" from the latest join, "latest" that skips equal milliseconds, a requeued message
taken for one of the log, a freed member that is not told, filters given up for ever, a dead message that is dropped for
others or loses its body when trimmed (rows of `tests/unit/test_pubsub_*.py`); a topic left in the index of topics
(offsets pass …); a join that misses what its batch published before (batches …); leases that trimming leaves as stored
(longer logs); a subscriber known by the latest of its filters (`test_pubsub_simulation.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.simulation import pubsub_judge as judge
from tests.simulation.pubsub_world import KINDS, PUBSUB, RULES, Pubsub, Step, fold
from tests.simulation.pubsub_world import steps as steps_of

SEEDS = 50
LIMITS = {
    "millpond.agents.topics.due_times.SWEEP_DUE_MAX": 2, "millpond.agents.topics.state_cache.STATES_HELD_MAX": 1,
    "millpond.agents.delivery.machine.READ_MIN": 1, "millpond.agents.pubsub.trimming.READ_MIN": 1,
    "millpond.agents.delivery.rounds.PAGE_MAX": 2, "millpond.agents.pubsub.readers.PAGE_MAX": 2,
    "millpond.agents.pubsub.forgetting.PAGE_MAX": 2,
    "millpond.agents.delivery.rounds.ROUNDS_MAX": 2, "millpond.agents.delivery.rounds.FILTERS_MAX": 2,
    "millpond.agents.pubsub.trimming.AHEAD_MAX": 2, "millpond.agents.delivery.machine.AHEAD_TOTAL_MAX": 4,
    "millpond.agents.delivery.leasing.UNCONFIRMED_MAX": 5, "millpond.agents.topics.storage.SWEEP_ENTRIES_MAX": 3,
    "millpond.agents.delivery.members.AWAKE_MAX": 0,
    "millpond.agents.pubsub.machine.OVERFLOW_MAX": 2, "millpond.agents.pubsub.trimming.OVERFLOW_MAX": 2,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIMITS.items():
            patch.setattr(name, value)
        yield


weighted = [kind for kind, weight in KINDS.items() for _ in range(weight)]
steps = st.lists(
    st.builds(Step, st.sampled_from(weighted), st.integers(0, 59), st.integers(0, 59)), max_size=60
)
cuts = st.lists(st.integers(1, 6), min_size=1, max_size=6)
which_rules = st.integers(0, len(RULES) - 1)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(which_rules, steps)
@relaxed
def test_offsets_pass_only_what_is_done_with_and_nobody_waits_idly(
    rules: int, happens: Sequence[Step]
) -> None:
    world = Pubsub(rules)
    world.live(happens)
    world.settle()
    judge.check_nothing_overdue(world.server, world.now_ms)


@given(which_rules, steps, cuts)
@relaxed
def test_batches_and_owners_never_decide(
    rules: int, happens: Sequence[Step], sizes: Sequence[int]
) -> None:
    check_cuts(rules, happens, sizes)


def check_cuts(rules: int, happens: Sequence[Step], sizes: Sequence[int]) -> None:
    world = Pubsub(rules, batched=True)
    world.live(happens)
    world.settle()
    held = world.log.records[PUBSUB.topic, 0]
    content, handed = fold(held, RULES[rules], [1])
    for otherwise in (([10_000], False), (sizes, False), (sizes, True), ([1], True)):
        other, handed_there = fold(held, RULES[rules], otherwise[0], owners=otherwise[1])
        judge.check_equal(other, content)
        assert handed_there == handed


@pytest.mark.parametrize("first", range(0, SEEDS, 25))
def test_neither_do_they_in_longer_logs(first: int) -> None:
    for seed in range(first, first + 25):
        print(f"seed {seed}")
        random = Random(seed)
        check_cuts(random.randrange(len(RULES)), steps_of(random, 100), [3, 1, 5])
