"""Properties of whole logs of a queue partition, as a player leaves them: however a log is cut into batches and owners,
the content of the store is the same; whatever happens, what is counted is there, and nobody waits in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import seen
from agents.delivery.leasing import REST_MS
from tests import given as given_
from tests.simulation import judge, queue_judge
from tests.simulation.player import KINDS, Kind, Player, Step
from tests.simulation.queue_judge import QUEUE
from tests.simulation.small_limits import SEND_MS, small_limits

SEEDS, CHUNK, SCRIPT_STEPS = 200, 40, 60
ACK_MS, EXPIRY_MS = 2_000, 5_000
TIMES_MS = [0] * 14 + [
    1, ACK_MS - 1, ACK_MS, ACK_MS + 1, EXPIRY_MS - 1, EXPIRY_MS, EXPIRY_MS + 1, REST_MS, SEND_MS,
]  # fmt: skip
WEIGHTS: dict[Kind, int] = {
    "publish": 14, "join": 8, "sent": 10, "ack": 10, "fail": 4, "repeat": 3, "ack by alias": 3, "disconnect": 2,
    "unsubscribe": 2, "end session": 2, "pass time": 4, "requeue": 2,
}  # fmt: skip
ONE_RULE: dict[str, Any] = {"max_inflight": 2, "ack_timeout_s": 2, "max_deliveries": 2}
KEPT = (given_.retain("queue/#"), given_.clear_retained("queue/#"))
TABLES: dict[str, tuple[str, ...]] = {
    "plain": (given_.queue(**ONE_RULE), *KEPT),
    "expiring": (given_.queue(**ONE_RULE, expired_time=5), *KEPT),
    "dropping": (given_.queue(**ONE_RULE, max_length=2), *KEPT),
    "dead on overflow": (given_.queue(**ONE_RULE, max_length=2, overflow="dead_letter"), *KEPT),
    "latest": (
        given_.a_rule(
            hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_keep_latest",
            ack_timeout_s=2, max_deliveries=2, store_qos0=True,
        ),
        *KEPT,
    ),
    "three rules": tuple(
        given_.queue(f"queue/{name}", ack_timeout_s=2, max_deliveries=2, max_inflight=inflight)
        for name, inflight in (("a", 1), ("b", 2), ("c", 3))
    ),
}  # fmt: skip
OTHER_RULES = [given_.rules(*tables) for tables in TABLES.values()]

steps = st.lists(
    st.builds(
        Step,
        st.sampled_from([kind for kind in KINDS for _ in range(WEIGHTS.get(kind, 1))]),
        st.integers(0, 5),
        st.integers(0, 7),
        st.sampled_from(TIMES_MS),
    ),
    max_size=40,
)  # fmt: skip


def a_script(random: Random) -> list[Step]:
    """Longer than what hypothesis makes; some kinds of steps never happen in it."""
    kinds = [
        kind for kind in KINDS if random.random() < 0.85 or kind in ("publish", "join", "sent")
    ]
    weighted = [kind for kind in kinds for _ in range(WEIGHTS.get(kind, 1))]
    return [
        Step(
            random.choice(weighted), random.randrange(6), random.randrange(8), random.choice(TIMES_MS)
        )
        for _ in range(SCRIPT_STEPS)
    ]  # fmt: skip


cuts = st.lists(st.integers(1, 7), min_size=1, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small_limits(patch)
        patch.setattr(seen, "DEDUP_WINDOW_MS", 1_000_000)
        yield


def played(name: str, log: list[Step], *, checked: bool = False) -> Player:
    player = Player(*TABLES[name], other_rules=OTHER_RULES)
    for step in log:
        player.play(step)
        if checked:
            world, rules = player.world, player.world.driver.machine.rules
            state = queue_judge.check(world)
            queue_judge.check_nothing_idle(state, rules, world.now_ms)
            if rules.canonical() == world.rules.canonical():
                queue_judge.check_bounds(state, rules)
    return player


@pytest.mark.parametrize("name", TABLES)
@given(log=steps)
@settings(deadline=None)
def test_after_every_step_all_that_is_counted_is_there_and_nobody_waits_in_vain(
    name: str, log: list[Step]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "DEDUP_WINDOW_MS", 4_000)  # so that repeats may be of any age
        played(name, [step for step in log if step.kind != "other rules"], checked=True)


@pytest.mark.parametrize("name", TABLES)
@given(log=steps, sizes=cuts)
@settings(deadline=None)
def test_batches_and_owners_never_decide(name: str, log: list[Step], sizes: list[int]) -> None:
    check_borders(name, log, sizes)


def check_borders(name: str, log: list[Step], sizes: list[int]) -> None:
    player = played(name, log)
    records, rules = player.records, player.world.rules
    folded = judge.clean_fold(records, rules, partition=QUEUE)
    judge.check_equal(player.world.server, folded, QUEUE)
    for owners in (False, True):
        again = judge.fold_with_restarts(
            records, rules, sizes, owners=owners, again=2, partition=QUEUE
        )
        judge.check_equal(again, folded, QUEUE)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_the_same_of_long_scripts(first: int) -> None:
    for seed in range(first, first + CHUNK):
        print(f"seed {seed}")  # shown if it fails
        random = Random(seed)
        name, log = random.choice(list(TABLES)), a_script(random)
        played(name, [step for step in log if step.kind != "other rules"], checked=True)
        check_borders(name, log, [random.randint(1, 9) for _ in range(5)])
