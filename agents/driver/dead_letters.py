"""A dead letter as Kafka has it: the bytes of the record, and headers that say where it was and what is wrong."""

from __future__ import annotations

from typing import Final

from millpond.agents.effects import DeadLetter
from millpond.agents.ports import OutgoingRecord, Record
from millpond.schemas.keys import DEAD_LETTERS_TOPIC, Partition

# A reason may quote a topic of 65,535 bytes. The first 1,000 characters are enough to understand it.
REASON_LENGTH_MAX: Final = 1_000
GONE: Final = " (its bytes are no longer in the log)"


def dead_letter_record(
    partition: Partition, dead_letter: DeadLetter, record: Record | None
) -> OutgoingRecord:
    """Return what to produce for a dead letter. `record` is None if Kafka's retention has removed it."""
    reason = dead_letter.reason[:REASON_LENGTH_MAX]
    key, value = None, None
    if record is None:
        reason += GONE
    else:
        key, value = record.key, record.value
    headers = headers_of(
        partition.topic, partition.number, dead_letter.offset, partition.agent, reason
    )
    return OutgoingRecord(DEAD_LETTERS_TOPIC, key, value, headers)


def headers_of(
    topic: str, number: int, offset: int, reader: str, reason: str
) -> tuple[tuple[str, bytes], ...]:
    """Return the headers of a dead letter. `reader` is the agent or bridge that gave the record up."""
    return (
        ("source-topic", topic.encode()),
        ("source-partition", b"%d" % number),
        ("source-offset", b"%d" % offset),
        ("agent", reader.encode()),
        ("reason", reason.encode("utf-8", "replace")),
    )
