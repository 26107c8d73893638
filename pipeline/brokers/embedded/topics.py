"""What the embedded broker serves: the topics that clients may publish to, and the filters that they may subscribe to."""

from __future__ import annotations

from typing import Final

from millpond.schemas.topics import filter_error, split_share, topic_name_error

RESERVED: Final = (
    "$"  # [MQTT-4.7.2-1]: topics that begin with it are the broker's own, and this one has none
)


def is_refused_topic(topic: str) -> bool:
    """True if no client may publish to it: it is no topic name, or reserved."""
    return topic_name_error(topic) is not None or topic.startswith(RESERVED)


def filter_refusal(topic_filter: str) -> str | None:
    """Explain why nobody serves a filter here. None if the delivery agents or the broker do.

    The agents deliver the topics of delivery rules, and the broker routes all others. So every filter that can match a topic of
    a client is served, with or without a group.
    """
    error = filter_error(topic_filter)
    if error is None and split_share(topic_filter)[1].startswith(RESERVED):
        error = "this broker has no topics that begin with '$'"
    return error
