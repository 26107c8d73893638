"""Plans: what the rules in force ask for one topic. A plan is computed once and remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

from msgspec import Struct

from millpond.schemas.rules import Rule, Rules
from millpond.schemas.topics import topic_name_error

# Topics whose plan is remembered; a full memory is cleared. Their names take about 2 MiB. Most topics share a plan.
PLANS_MAX = 10_000
RECEIPT_LIFETIME_S = 86_400  # one day, for a receipt rule without `expired_time`

MessageHook = Literal["message.publish", "message.delivered", "message.acked"]
HOOKS: Final[tuple[MessageHook, ...]] = get_args(MessageHook)


class DeliveryPlan(Struct, frozen=True):
    """How the messages of a topic are delivered, from the topic's delivery rule. `max_length` None is no limit.

    `millpond.schemas.rules.rule.Rule` explains the settings.
    """

    max_inflight: int
    ack_timeout_ms: int
    max_deliveries: int
    max_length: int | None
    dead_on_overflow: bool
    start: Literal["earliest", "latest"]
    offset_retention_ms: int
    ignores_wildcards: bool


class TopicPlan(Struct, frozen=True):
    """The rules of one topic. Lifetimes are in ms; None is for ever. `error` says why the topic is invalid, or None.

    `delivery` is None without a delivery rule: then messages are stored only if a storing rule matches. With a delivery
    rule they are always stored.
    """

    error: str | None
    store: bool
    store_qos0: bool
    index_lifetime_ms: int | None
    retain: bool
    clear_retained: bool
    retained_lifetime_ms: int | None
    commands: Mapping[MessageHook, tuple[tuple[str, ...], ...]]
    receipts: Mapping[MessageHook, int]  # hooks that write a receipt → its lifetime in ms
    delivery: DeliveryPlan | None = None

    @property
    def touches_retained(self) -> bool:
        """True if a publish with the retain flag can change what the topic retains."""
        return self.retain or self.clear_retained


def lifetime_ms(rule: Rule | None) -> int | None:
    """Return the `expired_time` of a rule in ms, or None."""
    return None if rule is None or rule.expired_time is None else rule.expired_time * 1000


def make_plan(rules: Rules, topic: str) -> TopicPlan:
    """Compute the plan of a topic. The first rule of each action counts. The commands of all matching rules run."""
    matching = [rules.matching(hook, topic) for hook in HOOKS]
    return _combine(topic_name_error(topic), rules.delivery_rule(topic), matching)


def _combine(
    error: str | None, delivery: Rule | None, matching: Sequence[Sequence[Rule]]
) -> TopicPlan:
    """Return the plan of all topics that these rules match. `matching` has one sequence for each of `HOOKS`."""
    first: dict[str, Rule] = {}
    for rule in matching[HOOKS.index("message.publish")]:
        if rule.action is not None:
            first.setdefault(rule.action, rule)
    store = first.get("on_message_publish")
    if store is None and delivery is not None:
        store = first.get("on_message_store_keep_latest")
    retain = first.get("on_message_retain")
    keeping = [rule for rule in (delivery, store) if rule is not None]
    lifetimes = [rule for rule in keeping if rule.expired_time is not None]
    commands: dict[MessageHook, tuple[tuple[str, ...], ...]] = {}
    receipts: dict[MessageHook, int] = {}
    for hook, of_hook in zip(HOOKS, matching, strict=True):
        commands[hook] = tuple(command for rule in of_hook for command in rule.commands)
        for rule in of_hook:
            if rule.action == "on_message_receipt":
                receipts.setdefault(hook, lifetime_ms(rule) or RECEIPT_LIFETIME_S * 1000)
    return TopicPlan(
        error=error,
        store=bool(keeping),
        store_qos0=any(rule.store_qos0 for rule in keeping),
        index_lifetime_ms=lifetime_ms(lifetimes[0]) if lifetimes else None,
        retain=retain is not None,
        clear_retained="on_retain_delete" in first,
        retained_lifetime_ms=lifetime_ms(retain),
        commands=commands,
        receipts=receipts,
        delivery=None if delivery is None else _delivery(delivery),
    )


def _delivery(rule: Rule) -> DeliveryPlan:
    """Return the settings of a delivery rule. A queue that keeps the latest message only has the length 1."""
    latest = rule.action == "on_message_fetch_for_keep_latest"
    return DeliveryPlan(
        max_inflight=rule.max_inflight,
        ack_timeout_ms=rule.ack_timeout_s * 1000,
        max_deliveries=rule.max_deliveries,
        max_length=1 if latest else rule.max_length,
        dead_on_overflow=not latest and rule.overflow == "dead_letter",
        start=rule.start,
        offset_retention_ms=rule.offset_retention_s * 1000,
        ignores_wildcards=rule.wildcards == "ignore",
    )


class TopicPlans:
    """The plans of all topics by one set of rules, computed when they are asked for."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._plans: dict[str, TopicPlan] = {}
        self._shared: dict[tuple[object, ...], TopicPlan] = {}  # by the rules that match

    def of(self, topic: str) -> TopicPlan:
        """Return the plan of a topic."""
        plan = self._plans.get(topic)
        if plan is None:
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            plan = self._plans[topic] = self._plan(topic)
        return plan

    def ignores_wildcards(self, topic: str) -> bool:
        """True if the delivery rule of a topic serves no wildcard, except those of groups."""
        delivery = self.of(topic).delivery
        return delivery is not None and delivery.ignores_wildcards

    def _plan(self, topic: str) -> TopicPlan:
        """Return the plan that all topics with the same matching rules share: a million topics need few plans."""
        error = topic_name_error(topic)
        matching = [self._rules.matching(hook, topic) for hook in HOOKS]
        delivery = self._rules.delivery_rule(topic)
        rules_matched = (error, id(delivery), *(tuple(map(id, of_hook)) for of_hook in matching))
        if rules_matched not in self._shared:
            self._shared[rules_matched] = _combine(error, delivery, matching)
        return self._shared[rules_matched]
