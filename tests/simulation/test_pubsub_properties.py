"""Properties of pubsub logs: invariants after every step, and folds that do not depend on batches, owners or evictions.

Bugs were planted to test the tests. Rows of `tests/unit/agents/pubsub` found these: an offset passes a gap; a loss is not
counted; a member that returns is dropped; "since" is taken from the latest join; "latest" skips messages of the same
millisecond; a requeued message counts as one of the log; a member that has room again is not noticed; a filter is given up
for ever; a dead message is dropped for other subscribers, or loses its body when it is trimmed.

| planted | found by |
|---|---|
| a topic stays in the index of topics | test_offsets_pass_only_finished_messages_and_nothing_waits_without_a_reason |
| a join misses a publish of the same batch | test_the_result_does_not_depend_on_batches_and_owners |
| a trimmed message stays leased as stored | test_the_result_of_longer_logs_does_not_depend_on_them_either |
| a subscriber is known by the latest of its filters | `test_pubsub_simulation.py` |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.simulation import pubsub_judge as judge
from tests.simulation.judge import check_equal
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
def test_offsets_pass_only_finished_messages_and_nothing_waits_without_a_reason(
    rules: int, script: Sequence[Step]
) -> None:
    world = Pubsub(rules)
    world.play(script)
    world.settle()
    judge.check_nothing_overdue(world.server, world.now_ms)


@given(which_rules, steps, cuts)
@relaxed
def test_the_result_does_not_depend_on_batches_and_owners(
    rules: int, script: Sequence[Step], sizes: Sequence[int]
) -> None:
    check_cuts(rules, script, sizes)


def check_cuts(rules: int, script: Sequence[Step], sizes: Sequence[int]) -> None:
    world = Pubsub(rules, batched=True)
    world.play(script)
    world.settle()
    records = world.log.records[PUBSUB.topic, 0]
    content, delivered = fold(records, RULES[rules], [1])
    for other_sizes, owners in (([10_000], False), (sizes, False), (sizes, True), ([1], True)):
        other, other_delivered = fold(records, RULES[rules], other_sizes, owners=owners)
        check_equal(other, content, PUBSUB)
        assert other_delivered == delivered


@pytest.mark.parametrize("first", range(0, SEEDS, 25))
def test_the_result_of_longer_logs_does_not_depend_on_them_either(first: int) -> None:
    for seed in range(first, first + 25):
        print(f"seed {seed}")
        random = Random(seed)
        check_cuts(random.randrange(len(RULES)), steps_of(random, 100), [3, 1, 5])
