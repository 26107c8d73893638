"""Topic filters: which are valid, what they match, whether two can meet (MQTT 5.0, section 4.7)."""

from __future__ import annotations

from itertools import zip_longest
from typing import Final

from millpond.schemas.events import TEXT_BYTES_MAX

SHARE_PREFIX: Final = "$share/"
WILDCARDS: Final = ("+", "#")


def filter_error(topic_filter: str) -> str | None:
    """Why nobody can subscribe to a filter, or None. `$share/{group}/{filter}` is valid, too."""
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


def split_share(topic_filter: str) -> tuple[str | None, str]:
    """Group and filter of a shared subscription (MQTT 5.0, 4.8.2); any other has no group."""
    if not topic_filter.startswith(SHARE_PREFIX):
        return None, topic_filter
    group, _, plain = topic_filter[len(SHARE_PREFIX) :].partition("/")
    return group, plain


def has_wildcard(topic_filter: str) -> bool:
    """Whether a filter matches more than the topic that is spelled like it."""
    return any(level in WILDCARDS for level in topic_filter.split("/"))


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a valid filter, without `$share/{group}/`, matches a topic name."""
    pattern, levels = topic_filter.split("/"), topic.split("/")
    if _hidden(pattern, levels):
        return False
    for wanted, level in zip_longest(pattern, levels):
        if wanted == "#":
            return True  # also the parent level: "a/#" matches "a"
        if wanted is None or level is None or wanted not in ("+", level):
            return False
    return True


def intersects(one: str, other: str) -> bool:
    """Whether some topic matches both valid filters, neither with `$share/{group}/`."""
    left, right = _levels(one), _levels(other)
    if _hidden(left, right) or _hidden(right, left):
        return False
    for a, b in zip_longest(left, right):
        if "#" in (a, b):
            return True
        if a is None or b is None or not (a == b or "+" in (a, b)):
            return False
    return True


def covers(wide: str, narrow: str) -> bool:
    """Whether every topic that `narrow` matches is matched by `wide`; both as for `intersects`."""
    pattern, levels = _levels(wide), _levels(narrow)
    if _hidden(pattern, levels):
        return False
    for wanted, level in zip_longest(pattern, levels):
        if wanted == "#":
            return True
        if level == "#" or wanted is None or level is None or wanted not in ("+", level):
            return False
    return True


def _levels(topic_filter: str) -> list[str]:
    """The levels, with the empty topic no longer among those that `#` matches.

    `#` is as good as `+/#`; and `/#` as `/+/#`, since its parent would be the empty topic, which
    nobody can publish to ([MQTT-4.7.3-1]).
    """
    return {"#": "+/#", "/#": "/+/#"}.get(topic_filter, topic_filter).split("/")


def _hidden(pattern: list[str], levels: list[str]) -> bool:
    """[MQTT-4.7.2-1]: a wildcard in the first level does not match a level that begins with `$`."""
    return pattern[0] in WILDCARDS and levels[0].startswith("$")
