"""A rule set: rules in the user's order, and their pools. It answers which rules apply, and which agent runs them.

- A **delivery rule** gives the topics of its filter to queue or pubsub. Messages owns all other topics.
- The **owner** of a topic runs all rules of `message.*` hooks for it. Sessions runs the rules of the other hooks.
- A **companion** (`rule.COMPANIONS`) belongs to the agent of its delivery rule.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from millpond.schemas.errors import ConfigError, DecodeError
from millpond.schemas.events import AgentName
from millpond.schemas.rules.pool import REDIS_PORT, Pool
from millpond.schemas.rules.rule import (
    COMPANIONS,
    DELIVERY_AGENTS,
    PRESENCE_LIFETIME_S,
    Action,
    Hook,
    Rule,
    rule_error,
)
from millpond.schemas.topics import covers, intersects, matches, split_share


class Rules(Struct, frozen=True):
    """Rules in the user's order, and pools. A rule set from the log has no pools."""

    rules: tuple[Rule, ...] = ()
    pools: tuple[Pool, ...] = ()

    def owner(self, topic: str) -> AgentName:
        """Return the owner of an MQTT topic: the one agent that runs all its rules."""
        rule = self.delivery_rule(topic)
        return "messages" if rule is None or rule.delivery_agent is None else rule.delivery_agent

    def delivery_rule(self, topic: str) -> Rule | None:
        """Return the delivery rule of an MQTT topic, if it has one. `check_together` lets no topic have two."""
        for rule in self.rules:
            if rule.delivery_agent is not None and matches(rule.topic_filter, topic):
                return rule
        return None

    def delivery_rules_of(self, agent: AgentName) -> tuple[Rule, ...]:
        """Return the delivery rules of one agent."""
        return tuple(rule for rule in self.rules if rule.delivery_agent == agent)

    def delivery_rules(self) -> tuple[Rule, ...]:
        """Return the delivery rules of all agents."""
        return tuple(rule for rule in self.rules if rule.delivery_agent is not None)

    def matching(self, hook: Hook, topic: str | None) -> tuple[Rule, ...]:
        """Return the rules of a hook that apply, in the user's order.

        Args:
            hook: The hook.
            topic: The topic of a `message.*` hook. The client's filter of a `session.*` hook: a rule then applies if
                some topic matches both filters. None for a hook without a topic.
        """
        return tuple(rule for rule in self.rules if rule.hook == hook and _applies(rule, topic))

    def wants(self, hook: Hook) -> bool:
        """True if a rule needs the events of a hook. Delivery rules need all but message.delivered."""
        delivers = hook != "message.delivered" and bool(self.delivery_rules())
        return delivers or any(rule.hook == hook for rule in self.rules)

    def of_agent(self, agent: AgentName) -> tuple[Rule, ...]:
        """Return the rules that an agent runs for at least one topic."""
        return tuple(rule for rule in self.rules if agent in self._agents(rule))

    def _agents(self, rule: Rule) -> tuple[AgentName, ...]:
        delivery = None if rule.action is None else COMPANIONS.get(rule.action, rule.action)
        if delivery in DELIVERY_AGENTS:
            return (DELIVERY_AGENTS[delivery],)
        if not rule.hook.startswith("message."):
            return ("sessions",)
        owners: list[AgentName] = []
        for owned in self.delivery_rules():
            if intersects(owned.topic_filter, rule.topic_filter):
                owners.extend(filter(None, [owned.delivery_agent]))
            if covers(owned.topic_filter, rule.topic_filter):
                return tuple(owners)
        return (*owners, "messages")

    def pool(self, agent: AgentName) -> Pool:
        """Return the pool of an agent's rules, which is the same for all of them. Without rules, the first pool.

        Raises:
            ConfigError: The rule set has no such pool.
        """
        names = [rule.pool for rule in self.of_agent(agent)] or [pool.name for pool in self.pools]
        for pool in self.pools:
            if pool.name == names[0]:
                return pool
        raise ConfigError(f"the agent {agent} has no pool: define one")

    def canonical(self) -> str:
        """Return the rules as JSON: in order, with every setting, without pools and places."""
        rules = [msgspec.structs.asdict(rule) for rule in self.rules]
        for rule in rules:
            del rule["file"], rule["line"]
        return msgspec.json.encode(rules).decode()

    @classmethod
    def from_canonical(cls, text: str) -> Rules:
        """Decode the rules of a `rules.changed` record.

        Raises:
            DecodeError: The text is not a rule set in canonical form, or a rule in it is invalid.
        """
        try:
            rules = _decoder.decode(text)
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"the rules cannot be read: {error}") from error
        for number, rule in enumerate(rules, start=1):
            fault = rule_error(rule)
            if fault is not None:
                raise DecodeError(f"rule {number} is invalid: {fault[1]}")
        return cls(rules)


_decoder: Final = msgspec.json.Decoder(tuple[Rule, ...])


def _applies(rule: Rule, topic: str | None) -> bool:
    if topic is None:
        return True
    if rule.hook.startswith("session."):
        return intersects(rule.topic_filter, split_share(topic)[1])
    return matches(rule.topic_filter, topic)


def default_rules() -> Rules:
    """Return the documented rules, with the Redis of this machine as pool."""
    pool = Pool(name="pool1", servers=(("127.0.0.1", REDIS_PORT),))
    return Rules(documented_rules(pool.name), (pool,))


def documented_rules(pool: str) -> tuple[Rule, ...]:
    """Return the rules of the documented `emqx_backend_redis.conf`, one for each of its lines.

    Only presence has a lifetime here, as in every file in TOML.
    """
    hour = 3600
    lines: tuple[tuple[Hook, str | None, Action | None, int | None], ...] = (
        ("client.connected", None, "on_client_connected", None),
        ("client.connected", None, "on_subscribe_lookup", None),
        ("client.disconnected", None, "on_client_disconnected", PRESENCE_LIFETIME_S),
        ("session.subscribed", "queue/#", "on_message_fetch_for_queue", None),
        ("session.subscribed", "pubsub/#", "on_message_fetch_for_pubsub", None),
        ("session.subscribed", None, "on_retain_lookup", None),
        ("session.unsubscribed", "#", None, None),
        ("message.publish", "#", "on_message_publish", hour),
        ("message.publish", "#", "on_message_retain", hour),
        ("message.publish", "#", "on_retain_delete", None),
        ("message.acked", "queue/#", "on_message_acked_for_queue", None),
        ("message.acked", "pubsub/#", "on_message_acked_for_pubsub", None),
    )
    forget = (("DEL", "mqtt:acked:${clientid}:${topic}"),)
    return tuple(
        Rule(
            hook=hook,
            topic=topic,
            action=action,
            commands=() if action else forget,
            pool=pool,
            expired_time=expired_time,
        )
        for hook, topic, action, expired_time in lines
    )
