"""Topic names and filters, against the examples of the standard, a regex model, and all topics of a small world."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millpond.schemas.topics import (
    covers,
    filter_error,
    intersects,
    matches,
    split_share,
    standard_filter,
    topic_name_error,
)

# One level more than any generated filter has, and one word that no filter names.
# So if two filters differ at all, some topic here matches only one of them.
TOPICS = [
    "/".join(levels)
    for depth in range(1, 5)
    for levels in product(("a", "b", "", "$x", "other"), repeat=depth)
    if levels != ("",)
]


@st.composite
def filters(draw: st.DrawFn) -> str:
    levels = draw(st.lists(st.sampled_from(("a", "b", "", "$x", "+", "+")), max_size=3))
    if not levels or levels == [""] or draw(st.booleans()):
        levels.append("#")
    return "/".join(levels)


def model(topic_filter: str) -> re.Pattern[str]:
    """Translate a filter into a regular expression, independently of `matches`."""
    pattern = re.escape(topic_filter).replace(r"\+", "[^/]*")
    if pattern == r"\#":
        pattern = ".*"
    elif pattern.endswith(r"/\#"):
        pattern = pattern.removesuffix(r"/\#") + "(/.*)?"
    return re.compile(r"(?!\$)" + pattern if topic_filter[0] in "+#" else pattern, re.DOTALL)


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("", "empty"),
        ("a/+", "wildcard"),
        ("a#", "wildcard"),
        ("a\0", "null"),
        ("é" * 32_768, "65535"),
    ],
)
def test_an_invalid_topic_name_has_a_reason(topic: str, reason: str) -> None:
    assert reason in str(topic_name_error(topic))


@pytest.mark.parametrize("topic", ["a", "/", "$SYS/x", "a b:{c}", "🦆", "x" * 65_535])
def test_a_valid_topic_name_has_no_error(topic: str) -> None:
    assert topic_name_error(topic) is None


@pytest.mark.parametrize(
    "valid",
    [
        *("#", "+", "/", "//", "a", "a/b", "a/+/b", "+/+", "a/#", "/#", "+/#", "$SYS/#", "é 🦆:{}"),
        *(
            "$share/g/a",
            "$share/g/#",
            "$share/g//",
            "$share/$x/a/+",
            "$share",
            "$shared/a",
            "$queue/a/#",
            "x" * 65_535,
        ),
    ],
)
def test_a_valid_filter_has_no_error(valid: str) -> None:
    assert filter_error(valid) is None


@pytest.mark.parametrize(
    ("invalid", "reason"),
    [
        ("", "empty"),
        ("a+", "'a+'"),
        ("a/b#", "'b#'"),
        ("a/++", "'++'"),
        ("#/a", "only at the end"),
        ("a/#/b", "only at the end"),
        ("a\0b", "null"),
        ("a\ud800", "UTF-8"),
        ("x" * 65_536, "65535"),
        ("é" * 32_768, "65535"),
        ("$share/", "group"),
        ("$share//a", "group"),
        ("$share/+/a", "group"),
        ("$share/g#/a", "group"),
        ("$share/g", "empty"),
        ("$share/g/", "empty"),
        ("$share/g/a+", "'a+'"),
        ("$queue/", "empty"),
        ("$queue/a/#/b", "only at the end"),
    ],
)
def test_an_invalid_filter_has_a_reason(invalid: str, reason: str) -> None:
    assert reason in str(filter_error(invalid))


@pytest.mark.parametrize(
    ("topic_filter", "parts"),
    [
        ("a/b", (None, "a/b")),
        ("$share/g/a/b", ("g", "a/b")),
        ("$share/g", ("g", "")),
        ("$share", (None, "$share")),
        ("$queue/a/b", ("$queue", "a/b")),
        ("$share/$queue/a", ("$queue", "a")),
        ("$queue", (None, "$queue")),
        ("$queues/a", (None, "$queues/a")),
    ],
)
def test_a_shared_subscription_is_split_into_group_and_filter(
    topic_filter: str, parts: tuple[str | None, str]
) -> None:
    assert split_share(topic_filter) == parts


@pytest.mark.parametrize(
    ("written", "standard"),
    [
        ("a/#", "a/#"),
        ("$share/g/a", "$share/g/a"),
        ("$queue/a/+", "$share/$queue/a/+"),
        ("$share/$queue/a", "$share/$queue/a"),
    ],
)
def test_a_subscription_has_one_spelling(written: str, standard: str) -> None:
    assert standard_filter(written) == standard


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/monitor/clients", False),
        ("+/monitor/clients", "$SYS/monitor/clients", False),
        ("$SYS/#", "$SYS/monitor/clients", True),
        ("$SYS/monitor/+", "$SYS/monitor/clients", True),
        ("a/+", "a/$x", True),
        ("ACCOUNTS", "Accounts", False),
    ],
)
def test_matches_follows_the_examples_of_the_standard(
    topic_filter: str, topic: str, expected: bool
) -> None:
    assert matches(topic_filter, topic) is expected


@given(filters())
def test_matches_agrees_with_a_regular_expression(topic_filter: str) -> None:
    pattern = model(topic_filter)
    for topic in TOPICS:
        assert matches(topic_filter, topic) is bool(pattern.fullmatch(topic)), topic


@given(filters(), filters())
@example("#", "$x/#")
@example("+/a", "$x/a")
@example("a/#", "a")
@example("a/b", "a")
@example("/#", "+")
@example("/#", "#")
def test_filters_intersect_if_and_only_if_some_topic_matches_both(one: str, other: str) -> None:
    witnesses = [topic for topic in TOPICS if matches(one, topic) and matches(other, topic)]
    assert intersects(one, other) is bool(witnesses)
    assert intersects(other, one) is bool(witnesses)


@given(filters(), filters())
@example("#", "#")
@example("+/#", "#")
@example("a/+/#", "a/#")
@example("#", "$x/#")
@example("+", "#")
@example("/+/#", "/#")
@example("/#", "/#")
def test_a_filter_covers_another_if_and_only_if_it_matches_all_its_topics(
    wide: str, narrow: str
) -> None:
    uncovered = [topic for topic in TOPICS if matches(narrow, topic) and not matches(wide, topic)]
    assert covers(wide, narrow) is not bool(uncovered), uncovered[:3]
