"""A record that was given up on, as it goes to the dead-letter topic: its own bytes, and headers that say why."""

from __future__ import annotations

from typing import Final

from millpond.agents.effects import DeadLetter
from millpond.agents.ports import OutgoingRecord, Record
from millpond.schemas.keys import DEAD_LETTERS_TOPIC, Partition

# A reason may quote a topic of 65,535 bytes; the beginning is enough to understand it.
REASON_LENGTH_MAX: Final = 1_000
GONE: Final = " (its bytes are no longer in the log)"


def dead_letter(partition: Partition, letter: DeadLetter, record: Record | None) -> OutgoingRecord:
    """The dead letter of a record; `record` is None when the log no longer holds it."""
    reason = letter.reason[:REASON_LENGTH_MAX]
    key, value = None, None
    if record is None:
        reason += GONE
    else:
        key, value = record.key, record.value
    headers = headers_of(partition.topic, partition.number, letter.offset, partition.agent, reason)
    return OutgoingRecord(DEAD_LETTERS_TOPIC, key, value, headers)


def headers_of(
    topic: str, number: int, offset: int, reader: str, reason: str
) -> tuple[tuple[str, bytes], ...]:
    """Where a record was, who gave up on it, and why."""
    return (
        ("source-topic", topic.encode()),
        ("source-partition", b"%d" % number),
        ("source-offset", b"%d" % offset),
        ("agent", reader.encode()),
        ("reason", reason.encode("utf-8", "replace")),
    )
