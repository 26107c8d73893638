"""One rule: its hook, topics, action and settings, and what makes it wrong."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias, get_args

from msgspec import Meta, Struct

from millpond.schemas.errors import ConfigError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import RESERVED_TOPIC_PREFIX
from millpond.schemas.rules.user_commands import command_error
from millpond.schemas.topics import SHARE_PREFIX, filter_error, intersects

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

# The hooks that an action goes with; `on_subscribe_lookup` moved to session.created in EMQ X 4.
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

# The rules that make a filter a queue's or pubsub's, and who runs them.
DELIVERY_AGENTS: Final[dict[Action, AgentName]] = {
    "on_message_fetch_for_queue": "queue",
    "on_message_fetch_for_keep_latest": "queue",
    "on_message_fetch_for_pubsub": "pubsub",
}
# What an old file says beside a delivery rule, and the delivery rule that it belongs to.
COMPANIONS: Final[dict[Action, Action]] = {
    "on_message_acked_for_queue": "on_message_fetch_for_queue",
    "on_message_acked_for_pubsub": "on_message_fetch_for_pubsub",
    "on_message_acked_for_keep_latest": "on_message_fetch_for_keep_latest",
    "on_message_store_keep_latest": "on_message_fetch_for_keep_latest",
}

# Defaults and bounds of a rule's settings.
EXPIRED_TIME_S_MAX: Final = 3_155_760_000  # 100 years; leave `expired_time` out to keep for ever
MAX_INFLIGHT: Final = 32  # what EMQX lets a client have un-acked by default
MAX_INFLIGHT_MAX: Final = 65_535  # [MQTT-2.2.1]: as many packet identifiers as there are
ACK_TIMEOUT_S: Final = 30  # a consumer that works half a minute on a message is slow
ACK_TIMEOUT_S_MAX: Final = 43_200  # 12 hours, as long as hosted queues hide a message
MAX_DELIVERIES: Final = 5  # what fails five times fails always
MAX_DELIVERIES_MAX: Final = 1_000  # without a bound one bad message is delivered for ever
OFFSET_RETENTION_S: Final = (
    2_592_000  # 30 days: a subscriber that has not come back by then is gone
)
MAX_LENGTH_MAX: Final = 100_000_000  # of one topic; its bodies are then about 50 GB of Redis


class Rule(Struct, frozen=True, kw_only=True):
    """What happens at a hook, for topics that match a filter (None: all): an action or commands.

    `expired_time` and `ack_timeout_s` are seconds, `max_length` messages of a topic; None means
    no limit. `offset_retention_s` is how long the read offset of a subscriber is kept whose session has ended.
    `max_inflight` counts un-acked messages of one member in one partition. `file` and
    `line` are where the user wrote the rule; they are not part of its canonical form.
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
    file: str | None = None
    line: int | None = None

    @property
    def topic_filter(self) -> str:
        """The filter in force."""
        return "#" if self.topic is None else self.topic

    @property
    def delivery_agent(self) -> AgentName | None:
        """Who delivers, if this is the rule that makes its filter a queue's or pubsub's."""
        return None if self.action is None else DELIVERY_AGENTS.get(self.action)

    @property
    def what(self) -> str:
        """The action, or the first of the commands."""
        return self.action or " ".join(self.commands[0])

    def fault(self, reason: str) -> ConfigError:
        """The error that says what is wrong with this rule, and where the user wrote it."""
        return ConfigError(reason, file=self.file, line=self.line)

    def __str__(self) -> str:
        return self.what if self.topic is None else f"{self.what} for {self.topic!r}"


def rule_error(rule: Rule) -> tuple[str, str] | None:
    """The key of a rule that is wrong and why, or None. Looks at this rule alone."""
    if (rule.action is None) == (not rule.commands):
        return "action", "a rule has either an action or commands"
    if rule.action is not None and rule.hook not in ACTION_HOOKS[rule.action]:
        hooks = " or ".join(ACTION_HOOKS[rule.action])
        return "action", f"{rule.action} goes with {hooks}, not with {rule.hook}"
    for fields in rule.commands:
        reason = command_error(rule.hook, fields)
        if reason is not None:
            return "commands", reason
    reason = _topic_error(rule)
    return None if reason is None else ("topic", reason)


def _topic_error(rule: Rule) -> str | None:
    if rule.topic is None:
        needs = rule.action in DELIVERY_AGENTS or rule.action in COMPANIONS
        return f"{rule.action} needs a topic filter" if needs else None
    if rule.hook in ("client.connected", "client.disconnected", "session.created"):
        return f"{rule.hook} has no topic: remove it"
    if rule.topic.startswith(SHARE_PREFIX):
        return "a rule's topic is a plain filter: it applies to shared subscriptions as it is"
    reason = filter_error(rule.topic)
    if reason is not None:
        return f"{reason}: {rule.topic!r}"
    for reserved in ("$SYS/", RESERVED_TOPIC_PREFIX):
        if intersects(rule.topic, f"{reserved}#"):
            return f"topics below {reserved} are never stored: {rule.topic!r}"
    return None
