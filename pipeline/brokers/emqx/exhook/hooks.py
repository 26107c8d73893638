"""Which hooks EMQX is to call, and for which topics: each call costs the broker's client a wait."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, TypeAlias

from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.schemas.keys import RESERVED_TOPIC_PREFIX
from millpond.schemas.rules import Rules
from millpond.schemas.rules.rule import Hook
from millpond.schemas.topics import covers

Version: TypeAlias = Literal["v1", "v2", "v3"]

# Presence and registry. EMQX takes no topic filters for these. A name that it does not know makes it refuse them all.
TAKEN_OVER: Final[dict[Version, str]] = {
    "v1": "session.takeovered", "v2": "session.takenover", "v3": "session.takenover",
}  # fmt: skip
OF_CLIENTS: Final = (
    "client.connected", "client.disconnected", "session.created", "session.subscribed",
    "session.unsubscribed", "session.resumed", "session.discarded", "session.terminated",
)  # fmt: skip


class Needed(NamedTuple):
    """One hook. `topics` are filters; empty for a hook that has no topic."""

    name: str
    topics: tuple[str, ...] = ()


def needed_hooks(rules: Rules, mountpoint: Mountpoint | None, version: Version) -> list[Needed]:
    """All hooks to register. Never `client.authenticate` or `client.authorize`: EMQX refuses clients then."""
    hooks = [Needed(name) for name in (*OF_CLIENTS, TAKEN_OVER[version])]
    of_messages = (
        ("message.publish", _published(rules, mountpoint)),
        ("message.delivered", _mounted_too(_of_hook(rules, "message.delivered"), mountpoint)),
        ("message.acked", _acked(rules, mountpoint)),
    )
    # Without filters the broker would call for every topic.
    hooks += [Needed(name, topics) for name, topics in of_messages if topics]
    return hooks


def _published(rules: Rules, mountpoint: Mountpoint | None) -> tuple[str, ...]:
    """What is stored or delivered; copies on their way back; and what a mounted client publishes, to be un-mounted."""
    topics = [*_of_hook(rules, "message.publish"), *_of_delivery(rules)]
    if mountpoint is not None:
        topics.append(f"{mountpoint.prefix}#")
    return _fewest([*topics, f"{RESERVED_TOPIC_PREFIX}#"])


def _acked(rules: Rules, mountpoint: Mountpoint | None) -> tuple[str, ...]:
    """Copies of stored retained messages, too, take room in a client's window until they are acknowledged."""
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
    """Those that no other one covers, each once, in order."""
    distinct = list(dict.fromkeys(topics))
    return tuple(
        topic
        for topic in distinct
        if not any(covers(other, topic) for other in distinct if other != topic)
    )
