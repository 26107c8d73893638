"""uvloop for long-running processes, and a correction that aiokafka needs on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import uvloop
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError

_send_on_asyncio = AIOKafkaConnection.send


def use_uvloop() -> None:
    """Make every new event loop of this process a uvloop, and correct aiokafka's `send`."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    AIOKafkaConnection.send = _send


def _send(connection: Any, request: Any, *arguments: Any, **options: Any) -> Awaitable[Any]:
    """Send a request. Replaces `AIOKafkaConnection.send`.

    When a connection breaks, there is a moment before aiokafka notices. A write in that moment raises RuntimeError on
    uvloop; asyncio silently accepts the bytes. The RuntimeError would end aiokafka's task that refreshes metadata.
    Every later request for metadata would then wait forever: a consumer group would not find its coordinator.

    Raises:
        KafkaConnectionError: The connection is broken. It is closed, and aiokafka connects again.
    """
    try:
        answer: Awaitable[Any] = _send_on_asyncio(connection, request, *arguments, **options)
    except RuntimeError as error:
        connection.close(reason=CloseReason.CONNECTION_BROKEN)
        where = f"{connection.host}:{connection.port}"
        raise KafkaConnectionError(f"Connection at {where} broken: {error}") from error
    return answer
