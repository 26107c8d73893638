"""The parts of replay and comparison that need no server."""

from __future__ import annotations

import pytest

from millpond.agents.ports import OutgoingRecord
from millpond.pipeline.compare.owned_keys import without_batch_fields
from millpond.pipeline.replay.log import ReplayLog
from millpond.pipeline.replay.log_extent import LogExtent, describe_loss
from millpond.pipeline.stores.redis.connection import escape_glob
from millpond.schemas import keys
from millpond.schemas.errors import BrokenInvariant


def test_a_replay_cannot_produce_to_kafka() -> None:
    log = ReplayLog({}, keys.MESSAGES_TOPIC, 1)
    with pytest.raises(BrokenInvariant, match="a replay was about to produce to Kafka"):
        log.produce([OutgoingRecord("mqtt.deliveries", b"c", b"{}")])


@pytest.mark.parametrize(
    ("text", "pattern"), [("mqtt:msg:", "mqtt:msg:"), ("a*[b]?\\", "a\\*\\[b\\]\\?\\\\")]
)
def test_a_prefix_is_no_pattern(text: str, pattern: str) -> None:
    assert escape_glob(text) == pattern


def test_a_fence_is_compared_without_the_fields_that_depend_on_batches() -> None:
    fence = {"offset": 1, "sequence": 7, "produced": 6, "score": 3}
    assert without_batch_fields(fence) == {"offset": 1, "score": 3}


def test_a_loss_of_the_log_is_described_with_the_time_from_which_it_is_complete() -> None:
    complete, empty = LogExtent(0, 10, None), LogExtent(5, 5, None)
    assert describe_loss("queue", {0: complete, 1: LogExtent(0, 0, None)}) is None
    cut = {
        0: complete,
        1: LogExtent(30, 40, 1_700_000_000_000),
        2: LogExtent(7, 9, 1_700_000_060_000),
    }
    assert describe_loss("queue", cut) == (
        "mqtt.messages has lost its first 37 records, in 2 of 3 partitions: complete from"
        " 2023-11-14T22:14:20Z on; state that only older records made is missing"
    )
    assert "first 5 records, in 1 of 1 partitions; state" in str(
        describe_loss("sessions", {0: empty})
    )
