"""When an EMQX that fails is retried, and when that is logged."""

from __future__ import annotations

from millpond.pipeline.brokers.emqx.rest.backoff import (
    DELAY_S_MAX,
    DELAY_S_MIN,
    LOG_INTERVAL_S,
    Backoff,
)


def test_the_delay_grows_with_each_failure_up_to_a_limit() -> None:
    backoff = Backoff()
    waits = []
    for _ in range(12):
        backoff.failed("no", 0.0, chance=1.0)
        waits.append(backoff.wait_s(0.0))
    assert waits[0] == DELAY_S_MIN
    assert waits == sorted(waits)
    assert waits[-1] == DELAY_S_MAX
    assert backoff
    assert backoff.wait_s(DELAY_S_MAX) == 0


def test_jitter_halves_the_delay_at_most() -> None:
    backoff = Backoff()
    backoff.failed("no", 0.0, chance=0.0)
    assert backoff.wait_s(0.0) == DELAY_S_MIN / 2


def test_the_same_failure_is_logged_at_intervals_and_a_new_one_at_once() -> None:
    backoff = Backoff()
    assert backoff.failed("no", 0.0, 0.0)
    assert not backoff.failed("no", 1.0, 0.0)
    assert backoff.failed("never", 2.0, 0.0)
    assert backoff.failed("never", 2.0 + LOG_INTERVAL_S, 0.0)


def test_the_first_success_after_a_failure_is_logged_once() -> None:
    backoff = Backoff()
    assert not backoff.succeeded()
    backoff.failed("no", 0.0, 0.0)
    assert backoff.succeeded()
    assert not backoff.succeeded()
    assert not backoff
    assert backoff.wait_s(0.0) == 0
    assert backoff.failed("no", 1.0, 0.0)
