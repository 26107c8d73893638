"""What the rules in force ask for one topic, worked out once and remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

from msgspec import Struct

from millpond.schemas.rules import Rule, Rules
from millpond.schemas.topics import topic_name_error

# Topics whose plan is remembered, about 2 MiB of names; past that the memory starts anew. Most share a plan.
PLANS_MAX = 10_000
RECEIPT_LIFETIME_S = 86_400  # of a receipt rule that names no `expired_time`: one day

MessageHook = Literal["message.publish", "message.delivered", "message.acked"]
HOOKS: Final[tuple[MessageHook, ...]] = get_args(MessageHook)


class DeliveryPlan(Struct, frozen=True):
    """How the messages of a topic are delivered, by the rule that makes it a queue's or pubsub's. `max_length` None: no
    limit. See `millpond.schemas.rules.rule.Rule`.
    """

    max_inflight: int
    ack_timeout_ms: int
    max_deliveries: int
    max_length: int | None
    dead_on_overflow: bool
    start: Literal["earliest", "latest"]
    offset_retention_ms: int


class TopicPlan(Struct, frozen=True):
    """The rules of one topic. Lifetimes are ms; None means for ever. `delivery` is None where nobody delivers: then
    messages are kept if a rule says so; where somebody does, they always are.
    """

    error: str | None
    store: bool
    store_qos0: bool
    index_lifetime_ms: int | None
    retain: bool
    clear_retained: bool
    retained_lifetime_ms: int | None
    commands: Mapping[MessageHook, tuple[tuple[str, ...], ...]]
    receipts: Mapping[MessageHook, int]  # the hooks that keep a receipt, and its lifetime
    delivery: DeliveryPlan | None = None

    @property
    def touches_retained(self) -> bool:
        """Whether a publish with the retain flag changes what the topic retains."""
        return self.retain or self.clear_retained


def lifetime_ms(rule: Rule | None) -> int | None:
    """How long what a rule keeps is kept."""
    return None if rule is None or rule.expired_time is None else rule.expired_time * 1000


def make_plan(rules: Rules, topic: str) -> TopicPlan:
    """Of several rules with the same action for a topic, the first one counts; commands add up."""
    matching = [rules.matching(hook, topic) for hook in HOOKS]
    return _combine(topic_name_error(topic), rules.delivery_rule(topic), matching)


def _combine(
    error: str | None, delivery: Rule | None, matching: Sequence[Sequence[Rule]]
) -> TopicPlan:
    """The plan of topics that these rules match, one sequence for each of `HOOKS`."""
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
    """A queue that keeps the newest message only is one of the length 1."""
    latest = rule.action == "on_message_fetch_for_keep_latest"
    return DeliveryPlan(
        max_inflight=rule.max_inflight,
        ack_timeout_ms=rule.ack_timeout_s * 1000,
        max_deliveries=rule.max_deliveries,
        max_length=1 if latest else rule.max_length,
        dead_on_overflow=not latest and rule.overflow == "dead_letter",
        start=rule.start,
        offset_retention_ms=rule.offset_retention_s * 1000,
    )


class TopicPlans:
    """The plans of the rules in force."""

    def __init__(self, rules: Rules) -> None:
        """Nothing is worked out before it is asked for."""
        self._rules = rules
        self._plans: dict[str, TopicPlan] = {}
        self._shared: dict[tuple[object, ...], TopicPlan] = {}  # by the rules that match

    def of(self, topic: str) -> TopicPlan:
        """The plan of a topic."""
        plan = self._plans.get(topic)
        if plan is None:
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            plan = self._plans[topic] = self._plan(topic)
        return plan

    def _plan(self, topic: str) -> TopicPlan:
        """A million topics of one kind have one plan: what tells plans apart is which rules match."""
        error = topic_name_error(topic)
        matching = [self._rules.matching(hook, topic) for hook in HOOKS]
        delivery = self._rules.delivery_rule(topic)
        which = (error, id(delivery), *(tuple(map(id, of_hook)) for of_hook in matching))
        if which not in self._shared:
            self._shared[which] = _combine(error, delivery, matching)
        return self._shared[which]
