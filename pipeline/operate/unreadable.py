"""The records that could not be read or stored, as `mqtt.dead-letters` has them.

They belong to no queue, so no store has them. A dead message has a record there, too, with the header `message-id`:
`dead_letters.py` lists those from the stores.

The newest records are wanted, so each partition is read backwards from its end, in chunks.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Final, NamedTuple

from msgspec import Struct

from millpond.pipeline.kafka.log_reader import LogReader, Searched
from millpond.pipeline.settings import Settings
from millpond.schemas import keys

CHUNK_RECORDS: Final = 200  # of one partition, in one step backwards
# Of all partitions. Dead messages are in the same topic, and there may be many more of them.
SEARCHED_MAX: Final = 20_000
VALUE_BYTES_MAX: Final = 4_096  # that are kept of a value. The source topic has the others


class UnreadableRecord(Struct, frozen=True, kw_only=True):
    """One dead letter of a record. `at` is in ms.

    `source` is where the record was: `topic[partition]` and offset, or a channel; empty if its dead letter does not say so.
    `value` is the beginning of its bytes, in base64. `size` counts all that the dead letter has.
    """

    at: int
    source: str
    reader: str
    reason: str
    key: str | None
    size: int
    value: str
    partition: int
    offset: int


class Unreadable(NamedTuple):
    """The newest records, the newest last. `whole` is False if the topic may have more that were not looked at."""

    records: list[UnreadableRecord]
    whole: bool


async def newest(settings: Settings, limit: int) -> Unreadable:
    """Read the newest dead letters of records, at most `limit`.

    Raises:
        MillpondError: Kafka does not answer, or has no topic of dead letters.
    """
    numbers = range(settings.kafka.partitions)
    share = max(SEARCHED_MAX // len(numbers), CHUNK_RECORDS)
    found: list[UnreadableRecord] = []
    whole = True
    async with LogReader(settings.kafka) as log:
        for bounds in await log.bounds([keys.DEAD_LETTERS_TOPIC], numbers):
            of_partition, first = await _newest_of(log, bounds, limit, share)
            found += of_partition
            whole = whole and first <= bounds.start
    found.sort(key=lambda each: (each.at, each.partition, each.offset))
    return Unreadable(found[-limit:], whole and len(found) <= limit)


async def _newest_of(
    log: LogReader, bounds: Searched, limit: int, searched_max: int
) -> tuple[list[UnreadableRecord], int]:
    """The newest of one partition, and the offset down to which it was read."""
    found: list[UnreadableRecord] = []
    first = bounds.end
    while first > bounds.start and len(found) < limit and bounds.end - first < searched_max:
        stop, first = first, max(bounds.start, first - CHUNK_RECORDS)
        found[:0] = [
            described(record)
            async for run in log.read(bounds, first, stop)
            for record in run
            if not is_message(record)
        ]
    return found, first


def is_message(record: Any) -> bool:
    """True if the record is about a dead message, which the stores keep."""
    return any(name == "message-id" for name, _ in record.headers)


def described(record: Any) -> UnreadableRecord:
    """Describe a record of `mqtt.dead-letters`. Any of its headers may be missing, or be anything."""
    headers = {name: _text(value) for name, value in record.headers}
    value = record.value or b""
    reasons = [headers[name] for name in ("reason", "not-produced") if name in headers]
    source = headers.get("source-channel", "")
    if "source-topic" in headers:
        number, offset = headers.get("source-partition", "?"), headers.get("source-offset", "?")
        source = f"{headers['source-topic']}[{number}] at {offset}"
    return UnreadableRecord(
        at=record.timestamp, source=source, reader=headers.get("agent", ""),
        reason="; ".join(reasons), key=None if record.key is None else _text(record.key),
        size=len(value), value=b64encode(value[:VALUE_BYTES_MAX]).decode(),
        partition=record.partition, offset=record.offset,
    )  # fmt: skip


def _text(value: bytes | None) -> str:
    return (value or b"")[:VALUE_BYTES_MAX].decode("utf-8", "backslashreplace")
