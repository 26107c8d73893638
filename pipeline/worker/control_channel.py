"""The control channel: applications ask through Redis Pub/Sub to subscribe or unsubscribe a client at once.

1. Redis delivers an order to every connected worker of the sessions agent, and does not store it.
2. The worker that owns the client's partition produces an event. The agent acts on that event alone.
3. An invalid order names no client. The worker that owns partition 0 makes a dead letter of it.

Redis guarantees no delivery: an order is lost while Redis is down, or while no worker owns the partition.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
from aiokafka.errors import KafkaError
from aiokafka.partitioner import murmur2
from msgspec import Meta, Struct
from redis.asyncio import Redis
from redis.exceptions import RedisError

from millpond.pipeline.clock import now_ms
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.stores.registry import access_of, locate
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError, MillpondError
from millpond.schemas.events import ControlSubscribe, ControlUnsubscribe, Text, Topic
from millpond.schemas.rules.pool import Pool
from millpond.schemas.topics import filter_error

logger = logging.getLogger(__name__)

RETRY_INTERVAL_S: Final = 1.0
# The dead letter of an invalid order holds no more of it. A valid order has two texts of up to 65,535 bytes.
ORDER_BYTES_MAX: Final = 256 * 1024


class ControlOrder(Struct, frozen=True):
    """The JSON that applications publish. `qos` may be text, as EMQ X's own backends accepted it."""

    type: Literal["subscribe", "unsubscribe"]
    topic: Topic
    clientid: Annotated[Text, Meta(min_length=1)]
    qos: int | Literal["0", "1", "2"] = 0


_decode: Final = msgspec.json.Decoder(ControlOrder).decode


def order_event(data: bytes, now_ms: int) -> ControlSubscribe | ControlUnsubscribe:
    """Return the event of an order on the channel.

    Raises:
        DecodeError: The order is invalid.
    """
    try:
        order = _decode(data)
    except (ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    reason = filter_error(order.topic)
    if reason is None and int(order.qos) not in (0, 1, 2):
        reason = f"there is no QoS {order.qos}"
    if reason is not None:
        raise DecodeError(reason)
    fields: dict[str, Any] = {
        "at": now_ms, "node": keys.AGENT_NODE, "client_id": order.clientid, "topic_filter": order.topic,
    }  # fmt: skip
    if order.type == "unsubscribe":
        return ControlUnsubscribe(**fields)
    return ControlSubscribe(**fields, qos=int(order.qos))


def partition_of(client_id: str, partition_count: int) -> int:
    """Return the partition of a client's records, by the rule of Kafka's own clients: murmur2 of the key."""
    return int((murmur2(client_id.encode()) & 0x7FFF_FFFF) % partition_count)


class ControlChannel:
    """Reads the control channel. While Redis or Kafka is down it retries."""

    def __init__(
        self,
        pool: Pool,
        producer: Producer,
        partition_count: int,
        owned: Callable[[], Container[int]],
        on_dead_letter: Callable[[str], None],
    ) -> None:
        """`owned` returns the partitions that this worker owns now. `on_dead_letter` gets the reason of each one."""
        self._pool, self._producer, self._on_dead_letter = pool, producer, on_dead_letter
        self._partition_count, self._owned = partition_count, owned

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            try:
                await self._listen()
            except (RedisError, OSError, MillpondError, KafkaError) as error:
                logger.warning(
                    "control channel %s: %s; connecting again", self._pool.channel, error
                )
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _listen(self) -> None:
        access = access_of(self._pool)
        host, port = await locate(self._pool, access)
        redis: Redis = Redis(
            host=host, port=port, username=access.username, password=access.password,
            ssl=self._pool.tls, ssl_ca_certs=self._pool.ca_file,
        )  # fmt: skip
        try:
            async with redis.pubsub() as channel:
                await channel.subscribe(self._pool.channel)
                async for message in channel.listen():
                    if message["type"] == "message":
                        await self._handle(message["data"])
        finally:
            await redis.aclose()

    async def _handle(self, data: bytes) -> None:
        try:
            event = order_event(data, now_ms())
        except DecodeError as error:
            if 0 in self._owned():
                await self._produce_dead_letter(data, str(error))
            return
        if partition_of(event.client_id, self._partition_count) in self._owned():
            key = keys.record_key(event).encode()
            sent = await self._producer.send(keys.CLIENTS_TOPIC, key, codec.encode(event))
            sent.add_done_callback(partial(self._log_refusal, keys.CLIENTS_TOPIC))

    async def _produce_dead_letter(self, data: bytes, reason: str) -> None:
        headers = (
            ("source-channel", self._pool.channel.encode()),
            ("agent", b"sessions"),
            ("reason", reason.encode("utf-8", "replace")),
        )
        self._on_dead_letter("invalid_order")
        sent = await self._producer.send(
            keys.DEAD_LETTERS_TOPIC, None, data[:ORDER_BYTES_MAX], None, headers
        )
        sent.add_done_callback(partial(self._log_refusal, keys.DEAD_LETTERS_TOPIC))

    def _log_refusal(self, topic: str, sent: asyncio.Future[Any]) -> None:
        """Log that Kafka refused a record. The order is lost: its sender got no promise, and gets no answer."""
        if not sent.cancelled() and (error := sent.exception()) is not None:
            logger.error(
                "control channel %s: Kafka refused a record for %s, so an order is lost: %r",
                self._pool.channel,
                topic,
                error,
            )
