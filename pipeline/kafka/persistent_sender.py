"""Sends records until Kafka has each of them. A record that Kafka refuses is sent again, alone and with back-off.

Kafka refuses a whole batch because of one record, so most of the refused ones succeed alone. Only about a record alone does
"too large" mean that it will never be stored. What happens then is for the caller to say.

A refused record is sent later than its successors. Its callers accept any order (`pipeline/brokers/commands/reports.py`
keeps one).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn

from aiokafka.errors import KafkaError

from millpond.agents.ports import OutgoingRecord
from millpond.pipeline.kafka.producer import TOO_LARGE, Producer, has_ended

logger = logging.getLogger(__name__)

RETRY_FIRST_S: Final = (
    1.0  # before a refused record is sent again; doubled with each refusal in a row
)
RETRY_MAX_S: Final = 30.0  # an operator who mends the topic waits no longer for the effect


class _Sent(NamedTuple):
    record: OutgoingRecord
    stored: Callable[[], None]
    too_large: Callable[[Exception], Awaitable[None]]


class PersistentSender:
    """One per process. `run` sends what Kafka refused."""

    def __init__(self, producer: Producer) -> None:
        """The caller starts and stops the producer."""
        self._producer = producer
        # The callers bound it: each of these records belongs to an unfinished one of a group consumer.
        self._refused: asyncio.Queue[_Sent] = asyncio.Queue()

    async def send(
        self,
        record: OutgoingRecord,
        stored: Callable[[], None],
        too_large: Callable[[Exception], Awaitable[None]],
    ) -> None:
        """Buffer a record. Call `stored` when Kafka has it, or `too_large` if it never will.

        Raises:
            KafkaError: the producer has ended.
        """
        sent = _Sent(record, stored, too_large)
        topic, key, value, headers, partition = record
        try:
            acknowledged = await self._producer.send(topic, key, value, partition, headers)
        except TOO_LARGE as error:
            await too_large(error)
        except KafkaError as error:
            if has_ended(error):
                raise
            logger.warning("Kafka refused a record for %s, sending again: %r", topic, error)
            self._refused.put_nowait(sent)
        else:
            acknowledged.add_done_callback(partial(self._answered, sent))

    def _answered(self, sent: _Sent, acknowledged: asyncio.Future[Any]) -> None:
        if acknowledged.cancelled():
            return
        if acknowledged.exception() is None:
            sent.stored()
        else:
            self._refused.put_nowait(sent)

    async def run(self) -> NoReturn:
        """Send the records that Kafka refused, one at a time, until cancelled.

        Raises:
            KafkaError: the producer has ended.
        """
        pause_s = RETRY_FIRST_S
        while True:
            sent = await self._refused.get()
            topic, key, value, headers, partition = sent.record
            try:
                await self._producer.send_alone(topic, key, value, partition, headers)
            except TOO_LARGE as error:
                await sent.too_large(error)
            except KafkaError as error:
                if has_ended(error):
                    raise
                logger.warning(
                    "Kafka refused a record for %s, sending again in %g s: %r", topic, pause_s, error
                )  # fmt: skip
                self._refused.put_nowait(sent)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
                continue
            else:
                sent.stored()
            pause_s = RETRY_FIRST_S
