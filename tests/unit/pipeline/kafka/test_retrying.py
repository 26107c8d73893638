"""A consumer that starts only after some attempts, or never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError

from millpond.pipeline.kafka import consumer as group_consumer
from millpond.pipeline.kafka import retrying
from millpond.pipeline.kafka.consumer import GroupConsumer
from millpond.pipeline.settings import Settings


class Consumer:
    """Starts once, as aiokafka's does. The start fails, or waits, or succeeds."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start, self.starts, self.stopped = start, 0, False

    def subscribe(self, topics: object, listener: object) -> None:
        pass

    async def start(self) -> None:
        self.starts += 1
        assert self.starts == 1, "started twice"
        await self._start()

    async def stop(self) -> None:
        self.stopped = True


async def fails() -> None:
    raise KafkaConnectionError("no Kafka")


async def succeeds() -> None:
    pass


async def waits() -> None:
    await asyncio.Event().wait()


async def test_after_a_failed_start_a_new_consumer_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrying, "RETRY_INTERVAL_S", 0)
    consumers = [Consumer(fails), Consumer(fails), Consumer(succeeds)]
    left = iter(consumers)
    assert await retrying.started(lambda: next(left)) is consumers[2]
    assert [each.stopped for each in consumers] == [True, True, False]


async def test_a_group_consumer_that_is_cancelled_while_it_starts_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = Consumer(waits)
    monkeypatch.setattr(group_consumer, "AIOKafkaConsumer", lambda **_: consumer)

    async def unused(*_: object) -> None:
        raise AssertionError("no record")

    running = asyncio.ensure_future(GroupConsumer(Settings(), "g", ["t"], unused, unused).run())
    while not consumer.starts:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert consumer.stopped
