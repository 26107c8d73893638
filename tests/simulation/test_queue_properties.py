"""Properties of queue logs that a player has written: invariants after every step, and folds that do not depend on
batches and owners.

Bugs were planted by hand to test the tests. Each was caught:

| planted | caught by |
|---|---|
| a returned message is placed behind those that returned before | test_what_comes_back_is_handed_out_in_log_order |
| a report is not counted | test_an_overdue_lease_returns_and_is_handed_out_again |
| one delivery too many | test_what_is_delivered_too_often_is_dead_and_comes_back_by_requeue |
| one unacknowledged message too many | test_an_ack_deletes_and_makes_room |
| the member that was served last is served again | test_a_live_publish_goes_to_one_member_at_once_and_members_take_turns |
| leases with a report still count as without one | test_after_every_step_the_invariants_hold_… |
| the request for another round is not stored | test_what_begins_to_wait_during_a_round_is_not_forgotten_by_a_restart |
| the acknowledgement is due from the lease on | test_the_time_for_an_ack_begins_when_the_copy_was_sent |
| a window has no due time | test_after_any_faults_every_message_is_acknowledged_or_dead |
| an acknowledgement of an expired message is counted | test_after_every_step_the_invariants_hold_… |
| late joins, or leaves of another session, take effect | test_old_news_of_a_member_is_ignored |
| a new filter finds no waiting messages | test_a_new_filter_for_what_waits_already_is_served_when_there_is_room |
| a back-off does not end the epoch | test_a_failed_command_returns_and_the_member_rests |
| a plain filter is served again and again | test_plain_filters_of_one_client_take_turns |
| a message that begins to wait in the tick is missed | test_counterexamples_that_were_found_once |
| resuming after a pause skips topics | test_too_much_that_is_unconfirmed_pauses_leasing_until_half_of_it_is |
| reports that arrive early read no messages ahead | test_long_scripts_have_the_same_properties |
| a requeue shares its batch with other events | test_a_requeue_in_the_batch_in_which_the_message_died_loses_nothing |
| a late repeat is stored again | test_a_repeat_of_what_is_stored_or_in_hand_changes_nothing_however_late |
| an overflowed message never becomes a dead letter | test_a_requeue_in_the_batch_in_which_the_message_died_loses_nothing |
| a new message overtakes | test_what_was_stored_is_handed_to_who_comes_in_the_order_it_was_published |
| a dead letter loses its body | test_a_message_that_dies_and_expires_in_one_tick_is_a_dead_letter_… |
| a message that left in a tick is swept again | test_long_scripts_have_the_same_properties |
| any client can acknowledge | test_only_who_has_had_a_message_may_acknowledge_it |
| a message that has left still counts | test_an_ack_deletes_and_makes_room |
| a new queue takes messages that were stored before | test_a_topic_that_becomes_a_queue_leaves_alone_what_lay_there_before |
| a retained message dies with its ack | test_a_retained_message_survives_its_ack_and_its_copy_in_the_queue |
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.agents.delivery.leasing import REST_MS
from millpond.agents.topics import dedup
from tests.simulation import judge, queue_judge
from tests.simulation.player import KINDS, Kind, Player, Step
from tests.simulation.queue_judge import QUEUE
from tests.simulation.small_limits import SEND_MS, small_limits
from tests.support import given as given_

SEEDS, CHUNK, SCRIPT_STEPS = 200, 40, 60
ACK_MS, EXPIRY_MS = 2_000, 5_000
TIMES_MS = [0] * 14 + [
    1, ACK_MS - 1, ACK_MS, ACK_MS + 1, EXPIRY_MS - 1, EXPIRY_MS, EXPIRY_MS + 1, REST_MS, SEND_MS,
]  # fmt: skip
WEIGHTS: dict[Kind, int] = {
    "publish": 14, "join": 8, "sent": 10, "ack": 10, "fail": 4, "fail late": 2, "broker retains": 2, "repeat": 3, "ack by alias": 3, "disconnect": 2,
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
    """Return a script that is longer than those of hypothesis. It lacks some kinds of steps."""
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
        patch.setattr(dedup, "DEDUP_WINDOW_MS", 1_000_000)
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
def test_after_every_step_the_invariants_hold_and_no_message_waits_without_a_reason(
    name: str, log: list[Step]
) -> None:
    check_steps(name, log)


def check_steps(name: str, log: list[Step]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Shorter than the scripts, so that some repeats are no longer among the seen ids.
        patch.setattr(dedup, "DEDUP_WINDOW_MS", 4_000)
        played(name, [step for step in log if step.kind != "other rules"], checked=True)


@pytest.mark.parametrize("name", TABLES)
@given(log=steps, sizes=cuts)
@settings(deadline=None)
def test_the_content_does_not_depend_on_batches_and_owners(
    name: str, log: list[Step], sizes: list[int]
) -> None:
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
def test_long_scripts_have_the_same_properties(first: int) -> None:
    for seed in range(first, first + CHUNK):
        # Shown if it fails.
        print(f"seed {seed}")
        random = Random(seed)
        name, log = random.choice(list(TABLES)), a_script(random)
        check_steps(name, log)
        check_borders(name, log, [random.randint(1, 9) for _ in range(5)])


# Counterexamples: the bug, the rules, the script.
FOUND: dict[str, tuple[str, list[Step]]] = {
    "a round missed a message that began to wait in its tick": ("latest", [
        Step("publish", 1, 0, 7_000), Step("publish", 0, 0, 2_001), Step("join", 0, 2, 0),
        Step("publish", 0, 0, 2_001), Step("fail", 0, 0, 0), Step("sent", 2, 0, 4_999),
    ]),
    "a member without room noticed a pause, if the next message was in memory": ("dead on overflow", [
        Step("publish", 2, 0, 0), Step("publish", 0, 0, 0), Step("join", 0, 0, 0), Step("join", 4, 2, 0),
        Step("publish", 5, 0, 0), Step("publish", 5, 0, 0), Step("publish", 3, 0, 0),
        Step("broker joins", 0, 3, 0),
    ]),
    "a requeue of a leased message lost it": ("dead on overflow", [
        Step("publish", 5, 0, 0), Step("publish", 2, 0, 5_000), Step("join", 0, 2, 0),
        Step("publish", 5, 0, 5_000), Step("requeue", 4, 0, 1),
    ]),
    "a failed command did not announce that its member has room": ("three rules", [
        Step("publish", 4, 0, 0), Step("ack", 5, 0, 0), Step("retain", 5, 0, 0), Step("sent", 0, 0, 4_999),
        Step("fail", 2, 0, 0), Step("ack early", 0, 0, 2_000), Step("publish", 1, 0, 0),
        Step("publish", 1, 0, 0), Step("fail", 4, 0, 0),
    ]),
    "all messages ahead of a publish were in memory, but the window did not know it": ("plain", [
        Step("publish", 0, 0, 0), Step("expiring", 3, 0, 0), Step("qos 0", 0, 0, 0),
        Step("broker joins", 1, 1, 0), Step("repeat", 0, 0, 5_001), Step("disconnect", 0, 0, 1_000),
        Step("publish", 3, 0, 0), Step("join", 4, 0, 0),
    ]),
    "messages behind those that a sweep removed were not read": ("dead on overflow", [
        Step("join", 4, 6, 0), Step("publish", 2, 0, 0), Step("other rules", 1, 0, 0), Step("join", 4, 0, 0),
        Step("qos 0", 5, 0, 5_001), Step("publish", 5, 0, 2_001), Step("publish", 0, 0, 0),
        Step("publish", 2, 0, 4_999), Step("join", 3, 0, 1_000),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("bug", FOUND)
def test_counterexamples_that_were_found_once(bug: str) -> None:
    name, log = FOUND[bug]
    check_steps(name, log)
    for sizes in ([1], [2], [5, 9, 7], [1, 8, 3, 4, 1], [100]):
        check_borders(name, log, sizes)
