"""The rules in force, as far as they concern the sessions agent."""

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
from millpond.schemas.rules.rule import PRESENCE_LIFETIME_S
from millpond.schemas.topics import intersects, split_share

# Topic filters of which the answer of `can_be_delivered` is remembered; a full memory is cleared.
FILTERS_REMEMBERED_MAX: Final = 10_000

HookedEvent: TypeAlias = (
    ClientConnected | ClientDisconnected | SessionCreated | SessionSubscribed | SessionUnsubscribed
)


class SessionRules:
    """Answers to this agent's questions about one set of rules, computed when they are asked for."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._can_be_delivered: dict[str, bool] = {}
        self._of_hook: dict[Hook, tuple[Rule, ...]] = {}  # for hooks without a topic
        actions = {rule.action for rule in rules.rules}
        self.keeps_presence = bool(actions & {"on_client_connected", "on_client_disconnected"})
        self.client_lifetime_ms = self._client_lifetime_ms()

    def _client_lifetime_ms(self) -> int | None:
        """How long a client is remembered that is offline and has no session. None: for ever."""
        if not self.keeps_presence:
            return PRESENCE_LIFETIME_S * 1000
        for rule in self.rules.rules:
            if rule.action == "on_client_disconnected" and rule.expired_time is not None:
                return rule.expired_time * 1000
        return None

    def can_be_delivered(self, topic_filter: str) -> bool:
        """True if a delivery rule can match a topic that the client's filter matches."""
        answer = self._can_be_delivered.get(topic_filter)
        if answer is None:
            if len(self._can_be_delivered) >= FILTERS_REMEMBERED_MAX:
                self._can_be_delivered.clear()
            plain = split_share(topic_filter)[1]
            answer = self._can_be_delivered[topic_filter] = any(
                intersects(rule.topic_filter, plain) for rule in self.rules.delivery_rules()
            )
        return answer

    def _matching(self, hook: Hook, event: HookedEvent) -> tuple[Rule, ...]:
        if isinstance(event, SessionSubscribed | SessionUnsubscribed):
            return self.rules.matching(hook, event.topic_filter)
        if hook not in self._of_hook:
            self._of_hook[hook] = self.rules.matching(hook, None)
        return self._of_hook[hook]

    def run_hook(
        self, hook: Hook, offset: int, event: HookedEvent, *, is_new: bool = True
    ) -> list[Effect | Output]:
        """Return what the rules of a hook ask for: user commands and look-ups.

        `is_new` is false for a SUBSCRIBE to a filter that the session holds already.
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
            and _wants_retained(event, is_new=is_new)
        ):
            done.append(LookUpRetained(offset, event.client_id, event.topic_filter, event.qos))
        return done


def _wants_retained(event: SessionSubscribed, *, is_new: bool) -> bool:
    """True if the SUBSCRIBE asks for retained messages. A shared subscription gets none (MQTT 5.0, 4.8.2)."""
    shared = split_share(event.topic_filter)[0] is not None
    # Retain handling (MQTT 5.0, 3.8.3.1): 0 is always, 1 only with a new subscription, 2 never.
    return not shared and event.retain_handling < (2 if is_new else 1)
