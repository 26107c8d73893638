"""Copy topics: made, parsed, and never forged."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic, ReturnedCopy
from millpond.schemas.topics import topic_name_error

RETURNING = CopyTopic("secret")
TOPIC = RETURNING.topic_for("queue/7/18823", "c2", "000660E8E1F804B9F443000004050002", "mp/c2/queue/t")  # fmt: skip


def test_a_copy_topic_has_the_documented_form() -> None:
    rest = "queue%2F7%2F18823/c2/000660E8E1F804B9F443000004050002/mp/c2/queue/t"
    mac = hmac.new(b"secret", rest.encode(), hashlib.sha256).hexdigest()[:16]
    assert f"$millpond/d/{mac}/{rest}" == TOPIC


# Whatever a client id or a message id may hold, and a topic of any number of levels.
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
LEVELS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="+#\0"), max_size=20)


@given(client_id=IDS, message_id=IDS, topic=LEVELS.filter(bool))
def test_parsing_undoes_making(client_id: str, message_id: str, topic: str) -> None:
    for lease in ("queue/7/18823", ""):
        way = RETURNING.topic_for(lease, client_id, message_id, topic)
        assert RETURNING.parse(way) == ReturnedCopy(lease, client_id, message_id, topic)
        assert topic_name_error(way) is None


@pytest.mark.parametrize(
    "topic",
    [
        "$millpond/d/", "$millpond/d//", "$millpond/d/0123456789abcdef", "$millpond/queue", "queue/t", "",
        "$millpond/d/0123456789abcdef/queue%2F7%2F1/c/m/t", "$millpond/d/é/a/b/c/t", "$millpond/d/\0/a/b/c/t",
        "$millpond/d//a/b/c/t", "$millpond/d/////////", "$millpond/d/\ud800/a/b/c/\ud800",
    ],
)  # fmt: skip
def test_other_topics_are_not_copy_topics(topic: str) -> None:
    assert RETURNING.parse(topic) is None


def test_the_mac_covers_every_part() -> None:
    for at, character in enumerate(TOPIC):
        other = "x" if character != "x" else "y"
        assert RETURNING.parse(TOPIC[:at] + other + TOPIC[at + 1 :]) is None, TOPIC[at:]
        assert RETURNING.parse(TOPIC[:at] + TOPIC[at + 1 :]) is None, TOPIC[at:]
    assert RETURNING.parse(TOPIC + "x") is None


def test_another_secret_makes_another_mac() -> None:
    assert CopyTopic("other").parse(TOPIC) is None
    assert CopyTopic("secret").parse(TOPIC) is not None


@given(mac=st.text(alphabet="0123456789abcdef", min_size=16, max_size=16), rest=st.text())
def test_a_guessed_mac_is_rejected(mac: str, rest: str) -> None:
    assert RETURNING.parse(f"$millpond/d/{mac}/{rest}") is None
