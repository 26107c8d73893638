"""MQTT topic names and topic filters: which are valid, and what they match (MQTT 5.0, section 4.7)."""

from __future__ import annotations

from itertools import zip_longest
from typing import Final

from millpond.schemas.events import TEXT_BYTES_MAX

SHARE_PREFIX: Final = "$share/"
# EMQX's other spelling of a shared subscription: `$queue/{filter}` is `$share/$queue/{filter}`.
QUEUE_PREFIX: Final = "$queue/"
QUEUE_GROUP: Final = "$queue"
WILDCARDS: Final = ("+", "#")


# -- valid or not


def topic_name_error(topic: str) -> str | None:
    """Explain why a client cannot publish to `topic`. None if it can."""
    if not topic:
        return "the topic is empty"  # [MQTT-4.7.3-1]
    if "+" in topic or "#" in topic:
        return "the topic holds a wildcard"  # [MQTT-4.7.1-1]
    if "\0" in topic:
        return "the topic holds a null character"  # [MQTT-4.7.3-2]
    # `surrogatepass`: an argument of a command can hold a lone surrogate. It must not raise here.
    if len(topic.encode("utf-8", "surrogatepass")) > TEXT_BYTES_MAX:
        return f"the topic is longer than {TEXT_BYTES_MAX} bytes"  # [MQTT-4.7.3-3]
    return None


def filter_error(topic_filter: str) -> str | None:
    """Explain why no client can subscribe to a filter, with or without a group. None if its form is right."""
    try:
        length = len(topic_filter.encode())
    except UnicodeEncodeError:
        return "the topic filter holds a character that UTF-8 does not have"  # [MQTT-1.5.4-1]
    if length > TEXT_BYTES_MAX:
        return f"the topic filter is longer than {TEXT_BYTES_MAX} bytes"  # [MQTT-4.7.3-3]
    if "\0" in topic_filter:
        return "the topic filter holds a null character"  # [MQTT-4.7.3-2]
    group, plain = split_share(topic_filter)
    if group is not None and (not group or "+" in group or "#" in group):
        # [MQTT-4.8.2-1], [MQTT-4.8.2-2]
        return "the group of a shared subscription is empty or holds a wildcard"
    if not plain:
        return "the topic filter is empty"  # [MQTT-4.7.3-1]
    levels = plain.split("/")
    for level in levels:
        if len(level) > 1 and ("+" in level or "#" in level):
            # [MQTT-4.7.1-1], [MQTT-4.7.1-2]
            return f"a wildcard stands alone in its level, but {level!r} holds more"
    if "#" in levels[:-1]:
        return "'#' stands only at the end of a topic filter"  # [MQTT-4.7.1-1]
    return None


# -- parts of a filter


def split_share(topic_filter: str) -> tuple[str | None, str]:
    """Split `$share/{group}/{filter}`, or `$queue/{filter}`, into group and filter. The group of any other filter is None."""
    if topic_filter.startswith(QUEUE_PREFIX):
        return QUEUE_GROUP, topic_filter[len(QUEUE_PREFIX) :]
    if not topic_filter.startswith(SHARE_PREFIX):
        return None, topic_filter
    group, _, plain = topic_filter[len(SHARE_PREFIX) :].partition("/")
    return group, plain


def shared(group: str | None, topic_filter: str) -> str:
    """Return the filter with its group in front, if it has one, in the spelling of MQTT 5.0 (4.8.2)."""
    return topic_filter if group is None else f"{SHARE_PREFIX}{group}/{topic_filter}"


def standard_filter(topic_filter: str) -> str:
    """Return the filter in the spelling of MQTT 5.0: a subscription has one name, however its client wrote it."""
    return shared(*split_share(topic_filter))


def has_wildcard(topic_filter: str) -> bool:
    """True if a level of the filter is a wildcard, so that the filter can match more than one topic."""
    return any(level in WILDCARDS for level in topic_filter.split("/"))


# -- matching
#
# All filters below are valid, and are given without `$share/{group}/`. Three functions walk level by level:
#
#   matches(filter, topic)     one filter, one topic
#   intersects(one, other)     True if at least one topic matches both
#   covers(wide, narrow)       True if each topic that `narrow` matches also matches `wide`
#
# A "#" decides at once: it matches all the rest. It also matches its parent level ("a/#" matches "a"), so it
# decides even where the other side has no level left. `zip_longest` gives None there.


def matches(topic_filter: str, topic: str) -> bool:
    """True if the filter matches the topic name."""
    pattern, levels = topic_filter.split("/"), topic.split("/")
    if _is_hidden(pattern, levels):
        return False
    for wanted, level in zip_longest(pattern, levels):
        if wanted == "#":
            return True
        if wanted is None or level is None or wanted not in ("+", level):
            return False
    return True


def intersects(one: str, other: str) -> bool:
    """True if some topic matches both filters."""
    left, right = _levels(one), _levels(other)
    if _is_hidden(left, right) or _is_hidden(right, left):
        return False
    for a, b in zip_longest(left, right):
        if "#" in (a, b):
            return True
        if a is None or b is None or not (a == b or "+" in (a, b)):
            return False
    return True


def covers(wide: str, narrow: str) -> bool:
    """True if every topic that matches `narrow` also matches `wide`."""
    pattern, levels = _levels(wide), _levels(narrow)
    if _is_hidden(pattern, levels):
        return False
    for wanted, level in zip_longest(pattern, levels):
        if wanted == "#":
            return True
        # A "#" in `narrow` matches topics of any depth. Only a "#" in `wide` covers those.
        if level == "#" or wanted is None or level is None or wanted not in ("+", level):
            return False
    return True


def _levels(topic_filter: str) -> list[str]:
    """Split a filter into levels, and remove the empty topic from what `#` matches.

    No client can publish to the empty topic ([MQTT-4.7.3-1]). So `#` matches the same topics as `+/#`.
    The parent of `/#` would be the empty topic, so `/#` matches the same topics as `/+/#`.
    Without this, `intersects` and `covers` would count a topic that cannot exist.
    """
    return {"#": "+/#", "/#": "/+/#"}.get(topic_filter, topic_filter).split("/")


def _is_hidden(pattern: list[str], levels: list[str]) -> bool:
    """True if the pattern begins with a wildcard and the other side with `$`: these never match ([MQTT-4.7.2-1])."""
    return pattern[0] in WILDCARDS and levels[0].startswith("$")
