"""How long an EMQX that fails is left alone, and how often that is said."""

from __future__ import annotations

from millpond.pipeline.brokers.emqx.rest.backoff import (
    DELAY_S_MAX,
    DELAY_S_MIN,
    SAY_INTERVAL_S,
    Backoff,
)


def test_it_waits_longer_each_time_and_never_longer_than_the_longest() -> None:
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


def test_chance_spreads_the_attempts() -> None:
    backoff = Backoff()
    backoff.failed("no", 0.0, chance=0.0)
    assert backoff.wait_s(0.0) == DELAY_S_MIN / 2


def test_the_same_is_said_again_only_after_a_while_and_another_thing_at_once() -> None:
    backoff = Backoff()
    assert backoff.failed("no", 0.0, 0.0)
    assert not backoff.failed("no", 1.0, 0.0)
    assert backoff.failed("never", 2.0, 0.0)
    assert backoff.failed("never", 2.0 + SAY_INTERVAL_S, 0.0)


def test_when_it_is_over_that_is_news_once() -> None:
    backoff = Backoff()
    assert not backoff.over()
    backoff.failed("no", 0.0, 0.0)
    assert backoff.over()
    assert not backoff.over()
    assert not backoff
    assert backoff.wait_s(0.0) == 0
    assert backoff.failed("no", 1.0, 0.0)
