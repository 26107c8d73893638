"""The hooks that the bridge registers at EMQX, with topic filters. Few, because EMQX's client waits for each call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, TypeAlias

from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.schemas.keys import RESERVED_TOPIC_PREFIX
from millpond.schemas.rules import Rules
from millpond.schemas.rules.rule import Hook
from millpond.schemas.topics import covers

Version: TypeAlias = Literal["v1", "v2", "v3"]

# The hooks of clients and sessions have no topic filters. If EMQX does not know one name, it refuses all hooks.
TAKEN_OVER: Final[dict[Version, str]] = {
    "v1": "session.takeovered", "v2": "session.takenover", "v3": "session.takenover",
}  # fmt: skip
OF_CLIENTS: Final = (
    "client.connected", "client.disconnected", "session.created", "session.subscribed",
    "session.unsubscribed", "session.resumed", "session.discarded", "session.terminated",
)  # fmt: skip


class Needed(NamedTuple):
    """One hook. `topics` are topic filters; none for a hook of clients or sessions."""

    name: str
    topics: tuple[str, ...] = ()


def needed_hooks(rules: Rules, mountpoint: Mountpoint | None, version: Version) -> list[Needed]:
    """All hooks to register.

    `client.authenticate` and `client.authorize` are never registered: EMQX would refuse a client when a call fails.
    """
    hooks = [Needed(name) for name in (*OF_CLIENTS, TAKEN_OVER[version])]
    of_messages = (
        ("message.publish", _published(rules, mountpoint)),
        ("message.delivered", _mounted_too(_of_hook(rules, "message.delivered"), mountpoint)),
        ("message.acked", _acked(rules, mountpoint)),
    )
    # A hook without filters is left out: EMQX would call it for every topic.
    hooks += [Needed(name, topics) for name, topics in of_messages if topics]
    return hooks


def _published(rules: Rules, mountpoint: Mountpoint | None) -> tuple[str, ...]:
    """Topics of rules, copies (`$millpond/`), and everything below the mountpoint, because its topics are changed."""
    topics = [*_of_hook(rules, "message.publish"), *_of_delivery(rules)]
    if mountpoint is not None:
        topics.append(f"{mountpoint.prefix}#")
    return _fewest([*topics, f"{RESERVED_TOPIC_PREFIX}#"])


def _acked(rules: Rules, mountpoint: Mountpoint | None) -> tuple[str, ...]:
    """Topics of rules; with a mountpoint also those of retained look-ups.

    Copies of stored retained messages take room in a client's window, too, until they are acknowledged.
    """
    wanted = _mounted_too([*_of_hook(rules, "message.acked"), *_of_delivery(rules)], mountpoint)
    if mountpoint is None:
        return wanted
    looked_up = [
        mountpoint.of_any(rule.topic_filter)
        for rule in rules.rules
        if rule.action == "on_retain_lookup"
    ]
    return _fewest([*wanted, *looked_up])


def _mounted_too(topics: Iterable[str], mountpoint: Mountpoint | None) -> tuple[str, ...]:
    plain = list(topics)
    mounted = [] if mountpoint is None else [mountpoint.of_any(topic) for topic in plain]
    return _fewest([*plain, *mounted])


def _of_hook(rules: Rules, hook: Hook) -> list[str]:
    return [rule.topic_filter for rule in rules.rules if rule.hook == hook]


def _of_delivery(rules: Rules) -> list[str]:
    return [rule.topic_filter for rule in rules.delivery_rules()]


def _fewest(topics: Iterable[str]) -> tuple[str, ...]:
    """The filters that no other filter covers, each once, in order."""
    distinct = list(dict.fromkeys(topics))
    return tuple(
        topic
        for topic in distinct
        if not any(covers(other, topic) for other in distinct if other != topic)
    )
