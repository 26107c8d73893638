"""Calls of Kafka that are repeated until Kafka answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

logger = logging.getLogger(__name__)

RETRY_INTERVAL_S: Final = 0.5

Answer = TypeVar("Answer")


async def persist(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Call until Kafka answers, and return the answer. Logs and retries every error, without limit."""
    while True:
        try:
            return await call()
        except (KafkaError, OSError) as error:
            logger.warning("Kafka: %r; trying again", error)
            await asyncio.sleep(RETRY_INTERVAL_S)


async def started(new_consumer: Callable[[], AIOKafkaConsumer]) -> Any:
    """Return a consumer that has started. Retries like `persist`, each time with a new consumer.

    aiokafka asserts that a consumer starts once, even if that start failed. A consumer whose start fails or is cancelled
    is stopped.
    """

    async def attempt() -> Any:
        consumer = new_consumer()
        try:
            await consumer.start()
        except BaseException:
            await consumer.stop()
            raise
        return consumer

    return await persist(attempt)
