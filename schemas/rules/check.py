"""The checks of all rules together. `rule.py` checks each rule by itself."""

from __future__ import annotations

from collections.abc import Iterator

from millpond.schemas.errors import ConfigError
from millpond.schemas.keys import SOURCE_TOPIC
from millpond.schemas.rules.rule import COMPANIONS
from millpond.schemas.rules.ruleset import Rules
from millpond.schemas.topics import intersects


def faults_together(rules: Rules, *, complete: bool = True) -> Iterator[ConfigError]:
    """Check that each topic has one owner, each agent one pool, and each companion its delivery rule.

    A fault names both rules, at the line of the later one. `complete` is False if the file has delivery rules that
    could not be read: then no companion is blamed for the lack of one.
    """
    if complete:
        yield from _companions(rules)
    yield from _owners(rules)
    yield from _pools(rules)


def _companions(rules: Rules) -> Iterator[ConfigError]:
    for rule in rules.rules:
        delivery = None if rule.action is None else COMPANIONS.get(rule.action)
        if delivery is not None and not any(
            owned.action == delivery and intersects(owned.topic_filter, rule.topic_filter)
            for owned in rules.rules
        ):
            yield rule.fault(
                f"{rule} has no effect without a session.subscribed rule with {delivery} for these "
                "topics: add that rule or remove this one"
            )


def _owners(rules: Rules) -> Iterator[ConfigError]:
    delivery_rules = rules.delivery_rules()
    for number, second in enumerate(delivery_rules):
        for first in delivery_rules[:number]:
            if intersects(first.topic_filter, second.topic_filter):
                yield second.fault(
                    f"{second} and {first} (line {first.line}) can both match one topic, "
                    "but a topic has one owner: change one of the filters"
                )
                break


def _pools(rules: Rules) -> Iterator[ConfigError]:
    for agent in SOURCE_TOPIC:
        same_pool = rules.of_agent(agent)
        for other in same_pool[1:]:
            first = same_pool[0]
            if other.pool != first.pool:
                yield other.fault(
                    f"{other} names the pool {other.pool!r}, but {first} (line {first.line}) names "
                    f"{first.pool!r}: all rules of the agent {agent} need the same pool"
                )
