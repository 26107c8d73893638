"""What a bridge asks of the rules; it decides nothing else."""

from __future__ import annotations

from typing import Final

from schemas.rule import Hook
from schemas.rules import Rules

TOPICS_REMEMBERED_MAX: Final = (
    10_000  # whose hooks were looked up; past that the memory starts anew
)
RETAINING: Final = ("on_message_retain", "on_retain_delete")


class RuleAnswers:
    """The answers for each topic, remembered."""

    def __init__(self, rules: Rules) -> None:
        """The rules are those of the bridge's whole life."""
        self._rules = rules
        self._wanted: dict[tuple[Hook, str], bool] = {}
        self._owned: dict[str, bool] = {}
        self._retained: dict[str, bool] = {}

    def wants(self, hook: Hook, topic: str) -> bool:
        """Whether a rule, or the topic's delivery agent, needs this event."""
        known = self._wanted.get((hook, topic))
        if known is None:
            if len(self._wanted) >= TOPICS_REMEMBERED_MAX:
                self._wanted.clear()
            owned = hook == "message.acked" and self.has_delivery_agent(topic)
            known = self._wanted[hook, topic] = owned or bool(self._rules.matching(hook, topic))
        return known

    def has_delivery_agent(self, topic: str) -> bool:
        """Whether an agent has the topic's messages delivered: then the broker does not route them."""
        known = self._owned.get(topic)
        if known is None:
            if len(self._owned) >= TOPICS_REMEMBERED_MAX:
                self._owned.clear()
            known = self._owned[topic] = self._rules.owner(topic) != "messages"
        return known

    def may_retain(self, topic: str) -> bool:
        """Whether a rule keeps the topic's retained message, or clears it."""
        known = self._retained.get(topic)
        if known is None:
            if len(self._retained) >= TOPICS_REMEMBERED_MAX:
                self._retained.clear()
            rules = self._rules.matching("message.publish", topic)
            known = self._retained[topic] = any(rule.action in RETAINING for rule in rules)
        return known

    def looks_up_retained(self, topic_filter: str) -> bool:
        """Whether a rule has the stored retained messages delivered to new subscriptions of this filter."""
        rules = self._rules.matching("session.subscribed", topic_filter)
        return any(rule.action == "on_retain_lookup" for rule in rules)
