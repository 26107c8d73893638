"""How long an EMQX that fails is left alone, and how often that is said."""

from __future__ import annotations

from millpond.pipeline.brokers.emqx.rest.backoff import (
    DELAY_S_MAX,
    DELAY_S_MIN,
    SAY_INTERVAL_S,
    Trouble,
)


def test_it_waits_longer_each_time_and_never_longer_than_the_longest() -> None:
    trouble = Trouble()
    waits = []
    for _ in range(12):
        trouble.failed("no", 0.0, chance=1.0)
        waits.append(trouble.wait_s(0.0))
    assert waits[0] == DELAY_S_MIN
    assert waits == sorted(waits)
    assert waits[-1] == DELAY_S_MAX
    assert trouble
    assert trouble.wait_s(DELAY_S_MAX) == 0


def test_chance_spreads_the_attempts() -> None:
    trouble = Trouble()
    trouble.failed("no", 0.0, chance=0.0)
    assert trouble.wait_s(0.0) == DELAY_S_MIN / 2


def test_the_same_is_said_again_only_after_a_while_and_another_thing_at_once() -> None:
    trouble = Trouble()
    assert trouble.failed("no", 0.0, 0.0)
    assert not trouble.failed("no", 1.0, 0.0)
    assert trouble.failed("never", 2.0, 0.0)
    assert trouble.failed("never", 2.0 + SAY_INTERVAL_S, 0.0)


def test_when_it_is_over_that_is_news_once() -> None:
    trouble = Trouble()
    assert not trouble.over()
    trouble.failed("no", 0.0, 0.0)
    assert trouble.over()
    assert not trouble.over()
    assert not trouble
    assert trouble.wait_s(0.0) == 0
    assert trouble.failed("no", 1.0, 0.0)
