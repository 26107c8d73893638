"""What the rules in force ask of the sessions agent."""

from __future__ import annotations

from typing import Final, TypeAlias

from millpond.agents.effects import Effect, LookUpRetained, LookUpSubscriptions, Output
from millpond.agents.topics.user_commands import run_commands
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    SessionCreated,
    SessionSubscribed,
    SessionUnsubscribed,
)
from millpond.schemas.rules import Hook, Rule, Rules
from millpond.schemas.topics import intersects, split_share

FILTERS_REMEMBERED_MAX: Final = 10_000  # whether a delivery rule can match them

HookedEvent: TypeAlias = (
    ClientConnected | ClientDisconnected | SessionCreated | SessionSubscribed | SessionUnsubscribed
)


class SessionRules:
    """The rules, as this agent asks them."""

    def __init__(self, rules: Rules) -> None:
        """Nothing is worked out before it is asked for."""
        self.rules = rules
        self._delivered: dict[str, bool] = {}
        self._of_hook: dict[Hook, tuple[Rule, ...]] = {}  # of the hooks without a topic
        actions = {rule.action for rule in rules.rules}
        self.keeps_presence = bool(actions & {"on_client_connected", "on_client_disconnected"})

    def delivered(self, topic_filter: str) -> bool:
        """Whether a delivery rule can match some topic of a client's filter."""
        known = self._delivered.get(topic_filter)
        if known is None:
            if len(self._delivered) >= FILTERS_REMEMBERED_MAX:
                self._delivered.clear()
            plain = split_share(topic_filter)[1]
            known = self._delivered[topic_filter] = any(
                intersects(rule.topic_filter, plain) for rule in self.rules.delivery_rules()
            )
        return known

    def _matching(self, hook: Hook, event: HookedEvent) -> tuple[Rule, ...]:
        if isinstance(event, SessionSubscribed | SessionUnsubscribed):
            return self.rules.matching(hook, event.topic_filter)
        if hook not in self._of_hook:
            self._of_hook[hook] = self.rules.matching(hook, None)
        return self._of_hook[hook]

    def hooked(
        self, hook: Hook, offset: int, event: HookedEvent, *, news: bool = True
    ) -> list[Effect | Output]:
        """What the rules of a hook ask for: the user's commands, and looking things up.

        `news` is false for a SUBSCRIBE to what is subscribed already.
        """
        done: list[Effect | Output] = []
        actions: set[str | None] = set()
        for rule in self._matching(hook, event):
            actions.add(rule.action)
            done += run_commands(rule.commands, offset, event)
        if "on_subscribe_lookup" in actions:
            done.append(LookUpSubscriptions(offset, event.client_id))
        if (
            "on_retain_lookup" in actions
            and isinstance(event, SessionSubscribed)
            and _wants_retained(event, news=news)
        ):
            done.append(LookUpRetained(offset, event.client_id, event.topic_filter, event.qos))
        return done


def _wants_retained(event: SessionSubscribed, *, news: bool) -> bool:
    """Whether a subscriber is to get retained messages (MQTT 5.0, 3.3.1.3 and 4.8.2: not if it is shared)."""
    shared = split_share(event.topic_filter)[0] is not None
    return not shared and event.retain_handling < (2 if news else 1)
