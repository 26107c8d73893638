"""One rule: its hook, topic filter, action and settings, and what makes it invalid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal, TypeAlias, get_args

from msgspec import Meta, Struct

from millpond.schemas.errors import ConfigError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import RESERVED_TOPIC_PREFIX
from millpond.schemas.rules.user_commands import command_error
from millpond.schemas.topics import filter_error, intersects, split_share

# fmt: off
Hook: TypeAlias = Literal[
    "client.connected", "client.disconnected", "session.created", "session.subscribed",
    "session.unsubscribed", "message.publish", "message.delivered", "message.acked",
]
Action: TypeAlias = Literal[
    "on_client_connected", "on_client_disconnected", "on_subscribe_lookup", "on_retain_lookup",
    "on_message_fetch_for_queue", "on_message_fetch_for_pubsub", "on_message_fetch_for_keep_latest",
    "on_message_publish", "on_message_retain", "on_retain_delete", "on_message_store_keep_latest",
    "on_message_acked_for_queue", "on_message_acked_for_pubsub", "on_message_acked_for_keep_latest",
    "on_message_receipt",
]
# fmt: on
HOOKS: Final[tuple[Hook, ...]] = get_args(Hook)
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)

# The hooks that an action is valid with. `on_subscribe_lookup` moved to session.created in EMQ X 4.
ACTION_HOOKS: Final[dict[Action, tuple[Hook, ...]]] = {
    "on_client_connected": ("client.connected",),
    "on_client_disconnected": ("client.disconnected",),
    "on_subscribe_lookup": ("client.connected", "session.created"),
    "on_retain_lookup": ("session.subscribed",),
    "on_message_fetch_for_queue": ("session.subscribed",),
    "on_message_fetch_for_pubsub": ("session.subscribed",),
    "on_message_fetch_for_keep_latest": ("session.subscribed",),
    "on_message_publish": ("message.publish",),
    "on_message_retain": ("message.publish",),
    "on_retain_delete": ("message.publish",),
    "on_message_store_keep_latest": ("message.publish",),
    "on_message_acked_for_queue": ("message.acked",),
    "on_message_acked_for_pubsub": ("message.acked",),
    "on_message_acked_for_keep_latest": ("message.acked",),
    "on_message_receipt": ("message.delivered", "message.acked"),
}

# The actions of delivery rules, and the agent that owns the topics of each.
DELIVERY_AGENTS: Final[dict[Action, AgentName]] = {
    "on_message_fetch_for_queue": "queue",
    "on_message_fetch_for_keep_latest": "queue",
    "on_message_fetch_for_pubsub": "pubsub",
}
# The actions that an old file has beside a delivery rule, and the action of that delivery rule.
COMPANIONS: Final[dict[Action, Action]] = {
    "on_message_acked_for_queue": "on_message_fetch_for_queue",
    "on_message_acked_for_pubsub": "on_message_fetch_for_pubsub",
    "on_message_acked_for_keep_latest": "on_message_fetch_for_keep_latest",
    "on_message_store_keep_latest": "on_message_fetch_for_keep_latest",
}

# Defaults and limits of a rule's settings.
EXPIRED_TIME_S_MAX: Final = 3_155_760_000  # 100 years; none at all means for ever
PRESENCE_LIFETIME_S: Final = (
    86_400  # a day: long enough to see who was here, short enough for ids made up by the minute
)
MAX_INFLIGHT: Final = 32  # EMQX's default for unacknowledged messages of one client
MAX_INFLIGHT_MAX: Final = 65_535  # [MQTT-2.2.1]: the number of packet identifiers
ACK_TIMEOUT_S: Final = 30  # a consumer that needs more than half a minute for a message is slow
ACK_TIMEOUT_S_MAX: Final = 43_200  # 12 hours: hosted queues allow as much
MAX_DELIVERIES: Final = 5  # a message that fails five times is likely to fail always
MAX_DELIVERIES_MAX: Final = 1_000  # without a limit, one bad message would be delivered for ever
# 30 days: a subscriber that has not returned by then is not expected to return.
OFFSET_RETENTION_S: Final = 2_592_000
MAX_LENGTH_MAX: Final = 100_000_000  # of one topic: about 50 GB of bodies in Redis


class Rule(Struct, frozen=True, kw_only=True):
    """One rule. Most settings have an effect with some actions only (`build.SETTING_ACTIONS`).

    topic: The topic filter. None: all topics, or a hook without a topic.
    action, commands: Exactly one of them. A command is split into its fields.
    pool: The name of the pool.
    expired_time: How long messages, retained messages or receipts live, in s. None: for ever; a receipt one day.
        Of `on_client_disconnected`: how long a client is remembered that is offline and has no session.
    max_inflight: Unacknowledged messages of one member in one partition, at most.
    ack_timeout_s: How long a client may take to acknowledge, in s.
    max_deliveries: After so many deliveries without an acknowledgement, a message becomes a dead letter.
    max_length: Stored messages of one topic, at most. None: no limit.
    overflow: What a queue does with its oldest message when it is too long.
    start: Where a new subscriber of a pubsub topic begins.
    store_qos0: True if QoS 0 publishes are stored as well.
    offset_retention_s: How long a read offset outlives the session of its subscriber, in s.
    wildcards: Whether a client's filter with a wildcard gets messages of this rule's topics. A shared one always does.
    file, line: Where the user wrote the rule. They are not part of its canonical form.

    The names of the other fields are: they are stored in Kafka and Redis.
    """

    hook: Hook
    topic: str | None = None
    action: Action | None = None
    commands: tuple[Annotated[tuple[str, ...], Meta(min_length=1)], ...] = ()
    pool: str
    expired_time: Annotated[int, Meta(ge=1, le=EXPIRED_TIME_S_MAX)] | None = None
    max_inflight: Annotated[int, Meta(ge=1, le=MAX_INFLIGHT_MAX)] = MAX_INFLIGHT
    ack_timeout_s: Annotated[int, Meta(ge=1, le=ACK_TIMEOUT_S_MAX)] = ACK_TIMEOUT_S
    max_deliveries: Annotated[int, Meta(ge=1, le=MAX_DELIVERIES_MAX)] = MAX_DELIVERIES
    max_length: Annotated[int, Meta(ge=1, le=MAX_LENGTH_MAX)] | None = None
    overflow: Literal["drop_oldest", "dead_letter"] = "drop_oldest"
    start: Literal["earliest", "latest"] = "earliest"
    store_qos0: bool = False
    offset_retention_s: Annotated[int, Meta(ge=60, le=EXPIRED_TIME_S_MAX)] = OFFSET_RETENTION_S
    wildcards: Literal["serve", "ignore"] = "serve"
    file: str | None = None
    line: int | None = None

    @property
    def topic_filter(self) -> str:
        """The topic filter, `#` if the rule has none."""
        return "#" if self.topic is None else self.topic

    @property
    def delivery_agent(self) -> AgentName | None:
        """The agent that owns the topics of this rule, if it is a delivery rule."""
        return None if self.action is None else DELIVERY_AGENTS.get(self.action)

    @property
    def summary(self) -> str:
        """The action, or the first command."""
        return self.action or " ".join(self.commands[0])

    def fault(self, reason: str) -> ConfigError:
        """Make the error about this rule, with the place where the user wrote it."""
        return ConfigError(reason, file=self.file, line=self.line)

    def __str__(self) -> str:
        return self.summary if self.topic is None else f"{self.summary} for {self.topic!r}"


def rule_error(rule: Rule) -> tuple[str, str] | None:
    """Return the key that makes this rule invalid, and the reason. None if the rule by itself is valid."""
    return next(rule_errors(rule), None)


def rule_errors(rule: Rule) -> Iterator[tuple[str, str]]:
    """Find each key that makes this rule invalid, and the reason."""
    if (rule.action is None) == (not rule.commands):
        yield "action", "a rule needs either an action or commands"
    elif rule.action is not None and rule.hook not in ACTION_HOOKS[rule.action]:
        hooks = " or ".join(ACTION_HOOKS[rule.action])
        yield "action", f"{rule.action} is valid with {hooks}, not with {rule.hook}"
    for fields in rule.commands:
        reason = command_error(rule.hook, fields)
        if reason is not None:
            yield "commands", reason
    reason = _topic_error(rule)
    if reason is not None:
        yield "topic", reason


def _topic_error(rule: Rule) -> str | None:
    if rule.topic is None:
        needs = rule.action in DELIVERY_AGENTS or rule.action in COMPANIONS
        return f"{rule.action} needs a topic filter" if needs else None
    if rule.hook in ("client.connected", "client.disconnected", "session.created"):
        return f"{rule.hook} has no topic: remove it"
    if split_share(rule.topic)[0] is not None:
        return "a rule's topic is a plain filter without $share or $queue: it applies to shared subscriptions, too"
    reason = filter_error(rule.topic)
    if reason is not None:
        return f"{reason}: {rule.topic!r}"
    for reserved in ("$SYS/", RESERVED_TOPIC_PREFIX):
        if intersects(rule.topic, f"{reserved}#"):
            return f"topics below {reserved} are never stored: {rule.topic!r}"
    return None
