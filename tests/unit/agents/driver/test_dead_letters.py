"""A dead letter carries its record's own bytes, and says where it came from and why."""

from __future__ import annotations

from millpond.agents.driver.dead_letters import REASON_LENGTH_MAX, dead_letter_record
from millpond.agents.effects import DeadLetter
from millpond.agents.ports import Record
from millpond.schemas.keys import Partition

PARTITION = Partition("millpond", "queue", 7)


def test_a_dead_letter_has_the_records_bytes_and_says_where_it_came_from_and_why() -> None:
    record = Record(12, 1_000, b"\xffkey", b"\x00value")
    letter = dead_letter_record(PARTITION, DeadLetter(12, "no good"), record)
    assert letter.topic == "mqtt.dead-letters"
    assert (letter.key, letter.value, letter.partition) == (b"\xffkey", b"\x00value", None)
    assert letter.headers == (
        ("source-topic", b"mqtt.messages"),
        ("source-partition", b"7"),
        ("source-offset", b"12"),
        ("agent", b"queue"),
        ("reason", b"no good"),
    )


def test_a_record_without_key_and_value_stays_so() -> None:
    letter = dead_letter_record(PARTITION, DeadLetter(12, "no good"), Record(12, 1_000, None, None))
    assert (letter.key, letter.value) == (None, None)
    assert dict(letter.headers)["reason"] == b"no good"


def test_a_dead_letter_of_a_record_that_is_gone_says_so() -> None:
    letter = dead_letter_record(PARTITION, DeadLetter(12, "no good"), None)
    assert (letter.key, letter.value) == (None, None)
    assert dict(letter.headers)["reason"] == b"no good (its bytes are no longer in the log)"


def test_a_reason_is_any_text_within_bounds() -> None:
    letter = dead_letter_record(PARTITION, DeadLetter(12, "\ud800" + "é" * 5_000), None)
    reason = dict(letter.headers)["reason"]
    assert reason.startswith("?é".encode())
    assert len(reason) <= REASON_LENGTH_MAX * 4
