"""A retained message that is not newer than what the client got since it subscribed is known as such, within bounds."""

from __future__ import annotations

import pytest

from millpond.pipeline.brokers.embedded.newest_sent import REMEMBERED_MS, TOPICS_MAX, NewestSent

NOW_MS = 1_000


def an_id(at_us: int) -> str:
    return f"{1_700_000_000_000_000 + at_us:016X}{0:016X}"


def subscribed(topic_filter: str = "a/#") -> NewestSent:
    newest = NewestSent()
    newest.subscribed(topic_filter, NOW_MS)
    return newest


def test_what_is_not_newer_than_the_newest_of_its_topic_is_covered() -> None:
    newest = subscribed()
    for at in (5, 3, 4):
        newest.sent("a/1", an_id(at), NOW_MS)
    assert [newest.covers("a/1", an_id(at)) for at in (3, 4, 5, 6)] == [True, True, True, False]
    assert not newest.covers("a/2", an_id(3))


@pytest.mark.parametrize(
    ("topic_filter", "forgotten"),
    [("a/1", ["a/1"]), ("a/+", ["a/1", "a/2"]), ("$share/g/a/2", ["a/2"]), ("other", [])],
)
def test_a_new_subscription_gets_the_retained_messages_of_its_topics_again(
    topic_filter: str, forgotten: list[str]
) -> None:
    newest = subscribed()
    for topic in ("a/1", "a/2"):
        newest.sent(topic, an_id(1), NOW_MS)
    newest.subscribed(topic_filter, NOW_MS)
    assert [each for each in ("a/1", "a/2") if not newest.covers(each, an_id(1))] == forgotten


def test_an_id_that_does_not_tell_its_time_covers_nothing_and_is_not_covered() -> None:
    newest = subscribed()
    newest.sent("a/1", "zzz", NOW_MS)
    assert not newest.covers("a/1", "aaa")
    newest.sent("a/1", an_id(1), NOW_MS)
    assert not newest.covers("a/1", "000")


def test_as_many_topics_are_remembered_as_there_may_be_and_the_latest_stay() -> None:
    newest = subscribed()
    for number in range(TOPICS_MAX):
        newest.sent(f"a/{number}", an_id(number), NOW_MS)
    newest.sent("a/0", an_id(TOPICS_MAX), NOW_MS)
    newest.sent("a/more", an_id(TOPICS_MAX), NOW_MS)
    assert newest.covers("a/0", an_id(0))
    assert newest.covers("a/more", an_id(0))
    assert not newest.covers("a/1", an_id(0))
    assert newest.covers("a/2", an_id(0))


def test_what_was_sent_long_after_the_subscription_is_not_remembered() -> None:
    newest = subscribed()
    newest.sent("a/1", an_id(1), NOW_MS + REMEMBERED_MS)
    assert newest.covers("a/1", an_id(1))
    newest.sent("a/2", an_id(2), NOW_MS + REMEMBERED_MS + 1)
    assert not newest.covers("a/1", an_id(1))
    assert not newest.covers("a/2", an_id(2))
