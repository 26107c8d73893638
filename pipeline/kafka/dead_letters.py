"""Dead letters that a bridge makes, and the stand-in for a record that is too large for Kafka.

A record that cannot be read is finished when Kafka has its dead letter, and not before. A dead letter can be too large
itself: it has the bytes of the record, and headers beside them. Then one of marks alone takes its place. The source topic
still has the bytes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from millpond.agents.driver.dead_letters import REASON_LENGTH_MAX, headers_of
from millpond.agents.ports import OutgoingRecord
from millpond.pipeline.kafka.persistent_sender import PersistentSender
from millpond.schemas import keys

logger = logging.getLogger(__name__)

# A key up to this size is kept in a dead letter of marks alone: it finds the partition. Every topic and client id of MQTT fits.
KEY_BYTES_MAX: Final = 65_535
# Shown with 0 from the start. Prometheus cannot see an increase of a series that did not exist.
REASONS: Final = ("unreadable", "too_large", "not_served")


def marks_alone(record: OutgoingRecord, error: Exception) -> OutgoingRecord:
    """Return what stands for a record that is too large for Kafka: its headers, and why it is not there."""
    key = record.key if len(record.key or b"") <= KEY_BYTES_MAX else None
    reason = f"for {record.topic}, but too large: {error}".encode()
    headers = (*record.headers, ("not-produced", reason))
    return OutgoingRecord(keys.DEAD_LETTERS_TOPIC, key, b"", headers)


class DeadLetters:
    """The dead letters of one bridge. One per process."""

    def __init__(
        self, sender: PersistentSender, reader: str, source_topic: str | None = None
    ) -> None:
        """`reader` is the name of the bridge in the headers.

        `source_topic` is the topic of all records, by Millpond's name. None: each record names its own, a user's.
        """
        self._sender, self.reader, self._source_topic = sender, reader, source_topic
        self.counts = Counter(dict.fromkeys(REASONS, 0))  # by kind

    async def send(self, source: Any, kind: str, reason: str, done: Callable[[], None]) -> None:
        """Copy a record of Kafka to the dead letters, with the reason. Call `done` when Kafka has the dead letter."""
        self.counts[kind] += 1
        topic = self._source_topic or source.topic
        headers = headers_of(
            topic, source.partition, source.offset, self.reader, reason[:REASON_LENGTH_MAX]
        )
        record = OutgoingRecord(keys.DEAD_LETTERS_TOPIC, source.key, source.value, headers)
        await self._sender.send(record, done, partial(self._send_marks, record, done))

    async def _send_marks(
        self, record: OutgoingRecord, done: Callable[[], None], error: Exception
    ) -> None:
        stand_in = marks_alone(record, error)
        await self._sender.send(stand_in, done, partial(self._give_up, stand_in, done))

    async def _give_up(
        self, record: OutgoingRecord, done: Callable[[], None], error: Exception
    ) -> None:
        """Kafka's limit is below a few kB. Without this line the record would stop its partition for ever."""
        logger.error(
            "Kafka takes no dead letter, not even one without a value: %s; it would have said: %r",
            error, dict(record.headers),
        )  # fmt: skip
        done()
