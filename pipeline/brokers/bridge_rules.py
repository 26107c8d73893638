"""What a bridge asks of the rules; it decides nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from millpond.schemas.rules import Rules
from millpond.schemas.rules.rule import Hook

TOPICS_REMEMBERED_MAX: Final = 10_000  # the last ones asked for
RETAINING: Final = ("on_message_retain", "on_retain_delete")


class BridgeRules:
    """The answers for each topic, remembered. The rules are those of the bridge's whole life."""

    wants: Callable[[Hook, str], bool]
    """Whether a rule, or the topic's delivery agent, needs this event."""
    has_delivery_agent: Callable[[str], bool]
    """Whether an agent has the topic's messages delivered: then the broker does not route them."""
    may_retain: Callable[[str], bool]
    """Whether a rule keeps the topic's retained message, or clears it."""

    def __init__(self, rules: Rules) -> None:
        """Nothing asked so far."""
        self._rules = rules
        remember = lru_cache(TOPICS_REMEMBERED_MAX)
        self.wants = remember(self._wants)
        self.has_delivery_agent = remember(self._has_delivery_agent)
        self.may_retain = remember(self._may_retain)

    def _wants(self, hook: Hook, topic: str) -> bool:
        owned = hook == "message.acked" and self.has_delivery_agent(topic)
        return owned or bool(self._rules.matching(hook, topic))

    def _has_delivery_agent(self, topic: str) -> bool:
        return self._rules.owner(topic) != "messages"

    def _may_retain(self, topic: str) -> bool:
        rules = self._rules.matching("message.publish", topic)
        return any(rule.action in RETAINING for rule in rules)

    def looks_up_retained(self, topic_filter: str) -> bool:
        """Whether a rule has the stored retained messages delivered to new subscriptions of this filter."""
        rules = self._rules.matching("session.subscribed", topic_filter)
        return any(rule.action == "on_retain_lookup" for rule in rules)
