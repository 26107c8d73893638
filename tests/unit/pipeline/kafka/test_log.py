"""What the log does with each outcome of a produced record, and in which order it hands records to the producer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka.errors import MessageSizeTooLargeError, TopicAuthorizationFailedError

from millpond.agents.ports import OutgoingRecord
from millpond.pipeline.kafka.log import KafkaLog
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.errors import LogRefused
from millpond.schemas.events import DeliveryFailed

LARGE = 500  # bytes of a value


class Producer:
    """Takes records, and acknowledges none by itself. Records for topics in `full` wait for room."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes | None]] = []
        self.acknowledgements: list[asyncio.Future[None]] = []
        self.full: dict[str, asyncio.Event] = {}

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> asyncio.Future[None]:
        if len(value or b"") >= LARGE:
            raise MessageSizeTooLargeError("too large")
        if topic in self.full:
            await self.full[topic].wait()
        self.taken.append((topic, value))
        self.acknowledgements.append(asyncio.get_running_loop().create_future())
        return self.acknowledgements[-1]


@pytest.fixture
async def producer() -> Producer:
    return Producer()


@pytest.fixture
async def counted() -> list[str]:
    """The reasons of counted dead letters."""
    return []


@pytest.fixture
async def log(producer: Producer, counted: list[str]) -> KafkaLog:
    unused: Any = producer
    return KafkaLog(unused, KafkaSettings(), "group", 10, counted.append)


async def until_idle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def command(payload: str) -> OutgoingRecord:
    deliver = Deliver(
        client_id="c", lease="queue/3/7", valid_for_s=10, attempt=1, message_id="m", topic="t", qos=1,
        retain=False, payload=payload, payload_encoding="utf-8",
    )  # fmt: skip
    return OutgoingRecord(keys.DELIVERIES_TOPIC, b"c", codec.encode(deliver))


async def test_a_record_that_waits_for_room_delays_only_its_own_partition(
    log: KafkaLog, producer: Producer
) -> None:
    # Given a record of one partition that waits for room
    producer.full["full"] = asyncio.Event()
    one, other = log.of_partition(), log.of_partition()
    waiting = [
        asyncio.ensure_future(one.produce([OutgoingRecord("full", b"k", b"1")])),
        asyncio.ensure_future(one.produce([OutgoingRecord("roomy", b"k", b"2")])),
    ]
    # When another partition produces
    waiting.append(asyncio.ensure_future(other.produce([OutgoingRecord("roomy", b"k", b"3")])))
    await until_idle()
    # Then its record does not wait, and the first partition keeps its order
    assert producer.taken == [("roomy", b"3")]
    producer.full["full"].set()
    await until_idle()
    assert producer.taken == [("roomy", b"3"), ("full", b"1"), ("roomy", b"2")]
    for acknowledged in producer.acknowledgements:
        acknowledged.set_result(None)
    await asyncio.gather(*waiting)


async def test_a_refused_record_raises_an_error_that_names_its_topic_after_all_others_are_done(
    log: KafkaLog, producer: Producer
) -> None:
    producing = asyncio.ensure_future(
        log.produce([OutgoingRecord("denied", b"k", b"1"), OutgoingRecord("good", b"k", b"2")])
    )
    await until_idle()
    denied, good = producer.acknowledgements
    denied.set_exception(TopicAuthorizationFailedError("denied"))
    await until_idle()
    assert not producing.done()
    good.set_result(None)
    with pytest.raises(LogRefused, match="Kafka refused a record for denied"):
        await producing


async def test_a_command_that_is_too_large_is_done_when_kafka_has_its_report_and_its_dead_letter(
    log: KafkaLog, producer: Producer, counted: list[str]
) -> None:
    producing = asyncio.ensure_future(log.produce([command("x" * LARGE)]))
    await until_idle()
    (topic, report), (second, letter) = producer.taken
    assert (topic, second, letter) == (keys.MESSAGES_TOPIC, keys.DEAD_LETTERS_TOPIC, b"")
    failed = codec.decode(report)
    assert isinstance(failed, DeliveryFailed)
    assert (failed.reason, failed.lease) == ("too_large", "queue/3/7")
    assert counted == ["too_large"]
    of_report, of_letter = producer.acknowledgements
    of_letter.set_result(None)
    await until_idle()
    assert not producing.done(), "the report is not in Kafka yet"
    of_report.set_exception(TopicAuthorizationFailedError("denied"))
    with pytest.raises(LogRefused, match=keys.MESSAGES_TOPIC):
        await producing


async def test_a_dead_letter_that_is_too_large_is_not_counted_a_second_time(
    log: KafkaLog, producer: Producer, counted: list[str]
) -> None:
    letter = OutgoingRecord(keys.DEAD_LETTERS_TOPIC, b"k", b"x" * LARGE)
    producing = asyncio.ensure_future(log.produce([letter]))
    await until_idle()
    assert producer.taken == [(keys.DEAD_LETTERS_TOPIC, b"")]
    assert counted == []
    producing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await producing
