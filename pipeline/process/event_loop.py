"""uvloop, for the processes that run for long, and what aiokafka needs to run on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import uvloop
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError

_send_on_asyncio = AIOKafkaConnection.send


def use_uvloop() -> None:
    """All event loops of this process are uvloop's from now on."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    AIOKafkaConnection.send = _send


def _send(connection: Any, request: Any, *arguments: Any, **options: Any) -> Awaitable[Any]:
    """As aiokafka's: a connection that has broken is a `KafkaConnectionError`, and closed.

    Before aiokafka knows that it has, uvloop raises RuntimeError where asyncio takes the bytes. That would end the task
    that keeps a client's metadata, and whoever asks for it would wait for ever: a group without a coordinator.
    """
    try:
        answer: Awaitable[Any] = _send_on_asyncio(connection, request, *arguments, **options)
    except RuntimeError as error:
        connection.close(reason=CloseReason.CONNECTION_BROKEN)
        where = f"{connection.host}:{connection.port}"
        raise KafkaConnectionError(f"Connection at {where} broken: {error}") from error
    return answer
