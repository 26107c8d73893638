"""A dead produced has its record's bytes, and headers with its place and the reason."""

from __future__ import annotations

from millpond.agents.driver.dead_letters import REASON_LENGTH_MAX, dead_letter_record
from millpond.agents.effects import DeadLetter
from millpond.agents.ports import Record
from millpond.schemas.keys import Partition

PARTITION = Partition("millpond", "queue", 7)


def test_a_dead_letter_has_the_records_bytes_and_headers_with_its_place_and_the_reason() -> None:
    record = Record(12, 1_000, b"\xffkey", b"\x00value")
    produced = dead_letter_record(PARTITION, DeadLetter(12, "no good"), record)
    assert produced.topic == "mqtt.dead-letters"
    assert (produced.key, produced.value, produced.partition) == (b"\xffkey", b"\x00value", None)
    assert produced.headers == (
        ("source-topic", b"mqtt.messages"),
        ("source-partition", b"7"),
        ("source-offset", b"12"),
        ("agent", b"queue"),
        ("reason", b"no good"),
    )


def test_a_record_without_key_and_value_becomes_a_dead_letter_without_them() -> None:
    produced = dead_letter_record(
        PARTITION, DeadLetter(12, "no good"), Record(12, 1_000, None, None)
    )
    assert (produced.key, produced.value) == (None, None)
    assert dict(produced.headers)["reason"] == b"no good"


def test_a_dead_letter_whose_record_was_removed_from_the_log_has_that_in_its_reason() -> None:
    produced = dead_letter_record(PARTITION, DeadLetter(12, "no good"), None)
    assert (produced.key, produced.value) == (None, None)
    assert dict(produced.headers)["reason"] == b"no good (its bytes are no longer in the log)"


def test_a_reason_is_any_text_within_bounds() -> None:
    produced = dead_letter_record(PARTITION, DeadLetter(12, "\ud800" + "é" * 5_000), None)
    reason = dict(produced.headers)["reason"]
    assert reason.startswith("?é".encode())
    assert len(reason) <= REASON_LENGTH_MAX * 4
