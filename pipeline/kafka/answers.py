"""Kafka as commands ask it: a user waits for the answer, so no request waits longer than a few seconds.

aiokafka alone waits for 40 s, several times over, and then raises an error that names no server. A process that runs for ever
does the opposite: it retries without limit (`retrying.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeAlias, TypeVar

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas.errors import MillpondError

ANSWER_TIMEOUT_S: Final = 5.0  # for one request, and to connect to each bootstrap server
# aiokafka's own. A bootstrap server that hangs leaves time for the next one. A little longer than ours, whose error says more.
REQUEST_TIMEOUT_MS: Final = 5_500
CLOSE_TIMEOUT_S: Final = 1.0  # a command has nothing to lose when it disconnects

Answer = TypeVar("Answer")
Client: TypeAlias = AIOKafkaAdminClient | AIOKafkaConsumer


def command_options(settings: KafkaSettings) -> dict[str, Any]:
    """Return the connection arguments of a command's aiokafka client, secrets included. See `client_options`."""
    return {**settings.client_options(), "request_timeout_ms": REQUEST_TIMEOUT_MS}


async def answer(
    settings: KafkaSettings,
    what: str,
    asked: Awaitable[Answer],
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> Answer:
    """Wait for the answer to a request. `what` completes the sentence "tried to …".

    Raises:
        MillpondError: Kafka does not answer in time, or refuses. The message names its address.
    """
    try:
        return await _within(settings, what, asked, timeout_s)
    except KafkaError as error:
        raise MillpondError(f"Kafka at {_where(settings)}: cannot {what}: {error}") from error


async def started(settings: KafkaSettings, starting: Awaitable[Any]) -> None:
    """Wait until a client has started.

    Raises:
        ConfigError: Kafka refuses the settings of the connection.
        MillpondError: Kafka cannot be reached, or does not answer.
    """
    timeout_s = ANSWER_TIMEOUT_S * len(settings.bootstrap_servers)
    try:
        await _within(settings, "connect", starting, timeout_s)
    except KafkaError as error:
        raise await unreachable(settings) from error


@asynccontextmanager
async def connected(settings: KafkaSettings, *clients: Client) -> AsyncIterator[None]:
    """Start clients, and stop them at the end. See `started` for the errors."""
    try:
        for client in clients:
            await started(settings, client.start())
        yield
    finally:
        for client in reversed(clients):
            closing = client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop()
            with suppress(KafkaError, MillpondError):
                await _within(settings, "disconnect", closing, CLOSE_TIMEOUT_S)


async def _within(
    settings: KafkaSettings, what: str, asked: Awaitable[Answer], timeout_s: float
) -> Answer:
    # Not asyncio.timeout: aiokafka may catch the cancellation of one wait, and continue with the next one.
    task = asyncio.ensure_future(asked)
    task.add_done_callback(_retrieve)
    try:
        await asyncio.wait((task,), timeout=timeout_s)
        if task.done():
            return task.result()
    finally:
        task.cancel()
    raise MillpondError(
        f"Kafka at {_where(settings)} does not answer: tried to {what} for {timeout_s:g} s"
    )


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Mark the error of an abandoned request as seen, or asyncio logs it."""
    if not task.cancelled():
        task.exception()


def _where(settings: KafkaSettings) -> str:
    return ", ".join(settings.bootstrap_servers)
