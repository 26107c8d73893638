"""Until when a command may be carried out."""

from __future__ import annotations

from typing import Any

import pytest

from millpond.pipeline.brokers.commands.consumer import CommandConsumer
from millpond.pipeline.kafka.consumer import RecordClaim
from millpond.pipeline.kafka.offsets import OffsetTracker
from millpond.pipeline.settings import Settings
from millpond.schemas.commands import Command, Deliver, Unsubscribe

NOTHING: Any = None  # of what a consumer that does not run has no use for
LOG_MS = 100_000
COPY: dict[str, Any] = {
    "client_id": "c", "lease": "queue/0/1", "valid_for_s": 60, "attempt": 1, "message_id": "m1",
    "topic": "t", "qos": 1, "retain": False, "payload": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "until"),
    [
        (Deliver(**COPY), LOG_MS + 60_000),  # as an older worker writes it
        (Deliver(**COPY, valid_until=LOG_MS + 60_000), LOG_MS + 60_000),
        (Deliver(**COPY, valid_until=LOG_MS + 20_000), LOG_MS + 20_000),
        (Deliver(**COPY, valid_until=LOG_MS + 90_000), LOG_MS + 60_000),
        (Deliver(**COPY, valid_until=LOG_MS + 20_000, expires_at=LOG_MS + 9), LOG_MS + 9),
        (Deliver(**COPY, valid_until=LOG_MS - 1), LOG_MS - 1),
        (Unsubscribe(client_id="c", topic_filters=("t",)), LOG_MS + 60_000),
    ],
)
def test_a_command_is_valid_until_the_earliest_of_its_ends(command: Command, until: int) -> None:
    """A command that reached Kafka late was valid for longer than its lease was its client's."""
    consumer = CommandConsumer(Settings(), NOTHING, NOTHING, NOTHING)
    claim = RecordClaim(OffsetTracker(0), 0)
    pending = consumer._pending(command, LOG_MS, claim.finish, claim)
    assert pending.valid_until_ms == until
