"""Orders on the control channel, and the events that they become."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.errors import TopicAuthorizationFailedError

from millpond.pipeline.worker.control_channel import ControlChannel, order_event
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import ControlSubscribe, ControlUnsubscribe
from millpond.schemas.rules.pool import Pool

FIELDS = {"at": 7, "node": "millpond", "client_id": "c", "topic_filter": "a/+"}


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (
            b'{"type":"subscribe","topic":"a/+","clientid":"c","qos":"2"}',
            ControlSubscribe(**FIELDS, qos=2),  # type: ignore[arg-type]
        ),
        (
            b'{"type":"subscribe","topic":"a/+","clientid":"c","qos":1,"more":[]}',
            ControlSubscribe(**FIELDS, qos=1),  # type: ignore[arg-type]
        ),
        (
            b'{"type":"subscribe","topic":"a/+","clientid":"c"}',
            ControlSubscribe(**FIELDS, qos=0),  # type: ignore[arg-type]
        ),
        (
            b'{"type":"unsubscribe","topic":"a/+","clientid":"c","qos":"0"}',
            ControlUnsubscribe(**FIELDS),  # type: ignore[arg-type]
        ),
    ],
)
def test_an_order_becomes_an_event_of_its_client(
    data: bytes, event: ControlSubscribe | ControlUnsubscribe
) -> None:
    assert order_event(data, 7) == event


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[" * 10_000,
        b'{"type":"publish","topic":"a","clientid":"c"}',
        b'{"type":"subscribe","topic":"a/#/b","clientid":"c"}',
        b'{"type":"subscribe","topic":"","clientid":"c"}',
        b'{"type":"subscribe","topic":"a","clientid":""}',
        b'{"type":"subscribe","topic":"a","clientid":"nul\\u0000"}',
        b'{"type":"subscribe","topic":"nul\\u0000","clientid":"c"}',
        b'{"type":"subscribe","topic":"a","clientid":"c","qos":3}',
        b'{"type":"subscribe","topic":"a","clientid":"c","qos":"3"}',
        b'{"type":"subscribe","topic":"a"}',
    ],
    ids=range(12),
)
def test_an_invalid_order_raises_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        order_event(data, 7)


class Producer:
    """Kafka refuses every record."""

    async def send(self, *_: object) -> asyncio.Future[None]:
        sent = asyncio.get_running_loop().create_future()
        sent.set_exception(TopicAuthorizationFailedError("denied"))
        return sent


@pytest.mark.parametrize(
    ("order", "counted", "topic"),
    [
        (b"no order", ["invalid_order"], "mqtt.dead-letters"),
        (b'{"type":"unsubscribe","topic":"a","clientid":"c"}', [], "mqtt.clients"),
    ],
    ids=["invalid", "valid"],
)
async def test_an_invalid_order_is_counted_and_an_order_that_kafka_refuses_is_logged(
    order: bytes, counted: list[str], topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: list[str] = []
    producer: Any = Producer()
    channel = ControlChannel(
        Pool(name="p", servers=(("h", 1),)), producer, 1, lambda: {0}, reasons.append
    )
    await channel._handle(order)
    await asyncio.sleep(0)
    assert reasons == counted
    assert f"Kafka refused a record for {topic}" in caplog.text
