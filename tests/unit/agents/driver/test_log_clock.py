"""The log's time never runs backwards, never stands still, and meets the timestamps again."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.agents.driver.log_clock import log_time
from millpond.agents.driver.ticks import TICK_INTERVAL_MS, Ticks
from tests.support.delivery import Delivering
from tests.support.given import queue

HOUR_MS = 3_600_000


def times(timestamps: list[int]) -> list[int]:
    """The log's time at each record."""
    found, now, last = [], 0, 0
    for at in timestamps:
        now = log_time(now, last, at)
        last = at
        found.append(now)
    return found


@pytest.mark.parametrize(
    ("timestamps", "expected"),
    [
        ([5, 6, 7], [5, 6, 7]),
        ([100, 90, 91, 92, 94], [100, 100, 100, 101, 102]),  # half the speed, in steps of 1 ms too
        ([100, 90, 110, 111], [100, 100, 110, 111]),  # caught up
        ([100, 50, 40, 60], [100, 100, 100, 110]),  # set back twice
    ],
)
def test_the_logs_time_follows_the_timestamps(timestamps: list[int], expected: list[int]) -> None:
    assert times(timestamps) == expected


@given(st.lists(st.integers(0, 1_000), min_size=2))
def test_the_logs_time_never_runs_backwards_and_is_never_behind(timestamps: list[int]) -> None:
    found = times(timestamps)
    assert all(before <= after for before, after in pairwise(found))
    assert all(now >= at for now, at in zip(found, timestamps, strict=True))


def test_an_hour_ahead_is_caught_up_after_two_hours() -> None:
    after = [HOUR_MS + second * 1_000 for second in range(2 * 3_600 + 1)]
    found = times([2 * HOUR_MS, *after])
    assert found[-1] == after[-1]
    steps = [later - earlier for earlier, later in pairwise(found[1:-1])]
    assert set(steps[:-1]) == {500}  # at the last one they meet


def test_brokers_with_different_clocks_keep_the_faster_ones_time() -> None:
    """The partition's leader moves between two brokers; one clock is 5 s ahead."""
    timestamps = [at + 5_000 * (at // 10_000 % 2) for at in range(0, 200_000, 1_000)]
    assert all(now - at <= 10_000 for now, at in zip(times(timestamps), timestamps, strict=True))


def test_a_lease_still_expires_after_a_clock_that_was_ahead_is_set_right() -> None:
    world = Delivering("queue", queue(ack_timeout_s=3, max_deliveries=2))
    world.join("slow")
    world.at(HOUR_MS)
    world.publish("m")
    assert world.hand_over() == [("slow", "m")]
    # When the clock is set back by an hour, and another consumer comes
    world.now_ms = 10_000
    world.join("other")
    for second in range(1, 9):
        world.tick(10_000 + second * 1_000)
    # Then the copy is handed over after twice the time at most
    assert ("other", "m") in world.taken()


def test_an_owner_whose_clock_was_set_back_sends_ticks() -> None:
    ticks = Ticks()
    assert ticks.send(0, HOUR_MS, HOUR_MS)
    ticks.folded(HOUR_MS)
    assert not ticks.send(HOUR_MS + 1, HOUR_MS + 1, HOUR_MS + TICK_INTERVAL_MS - 1)
    assert ticks.send(HOUR_MS + 1, HOUR_MS + 1, 0)
