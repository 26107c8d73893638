"""The questions that a bridge asks the rules. A bridge decides nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from millpond.schemas.rules import Rules
from millpond.schemas.rules.rule import Hook

TOPICS_CACHED_MAX: Final = 10_000  # for each question; the least recently used goes first
RETAINING: Final = ("on_message_retain", "on_retain_delete")


class BridgeRules:
    """The answers of the rules, cached by topic. The rules of a bridge process never change."""

    wants: Callable[[Hook, str], bool]
    """True if a rule, or the topic's delivery agent, needs the event of this hook."""
    has_delivery_agent: Callable[[str], bool]
    """True if queue or pubsub owns the topic. The broker must not route its messages."""
    may_retain: Callable[[str], bool]
    """True if a rule stores or clears the topic's retained message."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        cached = lru_cache(TOPICS_CACHED_MAX)
        self.wants = cached(self._wants)
        self.has_delivery_agent = cached(self._has_delivery_agent)
        self.may_retain = cached(self._may_retain)

    def _wants(self, hook: Hook, topic: str) -> bool:
        owned = hook == "message.acked" and self.has_delivery_agent(topic)
        return owned or bool(self._rules.matching(hook, topic))

    def _has_delivery_agent(self, topic: str) -> bool:
        return self._rules.owner(topic) != "messages"

    def _may_retain(self, topic: str) -> bool:
        rules = self._rules.matching("message.publish", topic)
        return any(rule.action in RETAINING for rule in rules)

    def looks_up_retained(self, topic_filter: str) -> bool:
        """True if a rule delivers stored retained messages to a new subscription of this filter."""
        rules = self._rules.matching("session.subscribed", topic_filter)
        return any(rule.action == "on_retain_lookup" for rule in rules)
