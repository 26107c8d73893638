"""The plan of a topic, from the rules in force."""

from __future__ import annotations

import pytest

from millpond.agents.topics import plans
from millpond.agents.topics.plans import RECEIPT_LIFETIME_S, TopicPlans, make_plan
from tests.support import given


def test_the_plan_of_a_topic_without_a_matching_rule_stores_nothing() -> None:
    plan = make_plan(given.rules(given.store("other/#")), "t")
    assert plan.error is None
    assert not (plan.store or plan.retain or plan.clear_retained or plan.touches_retained)
    assert not any(plan.commands.values())
    assert not plan.receipts


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b", "é" * 40_000])
def test_the_plan_of_an_invalid_topic_has_an_error(topic: str) -> None:
    assert make_plan(given.rules(given.store()), topic).error is not None


def test_lifetimes_are_milliseconds_and_none_is_for_ever() -> None:
    plan = make_plan(given.rules(given.store(expired_time=60), given.retain()), "t")
    assert plan.index_lifetime_ms == 60_000
    assert plan.retained_lifetime_ms is None


def test_of_several_rules_with_one_action_the_first_counts() -> None:
    rules = given.rules(given.store("a/#", expired_time=1, store_qos0=True), given.store("#"))
    assert make_plan(rules, "a/b").index_lifetime_ms == 1_000
    assert make_plan(rules, "a/b").store_qos0
    assert make_plan(rules, "b").index_lifetime_ms is None
    assert not make_plan(rules, "b").store_qos0


def test_the_commands_of_all_matching_rules_run_in_order() -> None:
    rules = given.rules(
        given.command("INCR one"),
        given.command("INCR no", topic="other"),
        given.command("INCR two"),
    )
    plan = make_plan(rules, "t")
    assert plan.commands["message.publish"] == (("INCR", "one"), ("INCR", "two"))
    assert plan.commands["message.acked"] == ()


@pytest.mark.parametrize("hook", ["message.delivered", "message.acked"])
def test_a_receipt_lives_as_long_as_its_rule_says_or_a_day(hook: str) -> None:
    limited = make_plan(given.rules(given.receipt(hook, expired_time=60)), "t")
    assert dict(limited.receipts) == {hook: 60_000}
    unlimited = make_plan(given.rules(given.receipt(hook)), "t")
    assert dict(unlimited.receipts) == {hook: RECEIPT_LIFETIME_S * 1000}


def test_a_retaining_or_a_clearing_rule_touches_the_retained_entry() -> None:
    assert make_plan(given.rules(given.retain()), "t").touches_retained
    assert make_plan(given.rules(given.clear_retained()), "t").touches_retained


def test_topics_that_the_same_rules_match_share_a_plan_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans, "PLANS_MAX", 2)
    rules = given.rules(given.store(), given.retain("b/#"))
    topic_plans = TopicPlans(rules)
    for topic in ("a", "a/1", "b/1", "b/2", "a/+", "a"):
        assert topic_plans.of(topic) == make_plan(rules, topic)
        assert len(topic_plans._plans) <= 2
    assert topic_plans.of("a/1") is topic_plans.of("a/2")
    assert topic_plans.of("b/1") is topic_plans.of("b/2")
    assert len(topic_plans._shared) == 3
