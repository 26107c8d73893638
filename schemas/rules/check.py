"""The checks of all rules together. `rule.py` checks each rule by itself."""

from __future__ import annotations

from itertools import combinations

from millpond.schemas.keys import SOURCE_TOPIC
from millpond.schemas.rules.rule import COMPANIONS
from millpond.schemas.rules.ruleset import Rules
from millpond.schemas.topics import intersects


def check_together(rules: Rules) -> None:
    """Check that each topic has one owner, each agent one pool, and each companion its delivery rule.

    Raises:
        ConfigError: A check failed. The error names both rules, at the line of the later one.
    """
    _check_companions(rules)
    _check_owners(rules)
    _check_pools(rules)


def _check_companions(rules: Rules) -> None:
    for rule in rules.rules:
        delivery = None if rule.action is None else COMPANIONS.get(rule.action)
        if delivery is not None and not any(
            owned.action == delivery and intersects(owned.topic_filter, rule.topic_filter)
            for owned in rules.rules
        ):
            raise rule.fault(
                f"{rule} has no effect without a session.subscribed rule with {delivery} for these "
                "topics: add that rule or remove this one"
            )


def _check_owners(rules: Rules) -> None:
    for first, second in combinations(rules.delivery_rules(), 2):
        if intersects(first.topic_filter, second.topic_filter):
            raise second.fault(
                f"{second} and {first} (line {first.line}) can both match one topic, "
                "but a topic has one owner: change one of the filters"
            )


def _check_pools(rules: Rules) -> None:
    for agent in SOURCE_TOPIC:
        same_pool = rules.run_by(agent)
        for other in same_pool[1:]:
            first = same_pool[0]
            if other.pool != first.pool:
                raise other.fault(
                    f"{other} names the pool {other.pool!r}, but {first} (line {first.line}) names "
                    f"{first.pool!r}: all rules of the agent {agent} need the same pool"
                )
