"""The control channel: applications publish in Redis what a client is to be subscribed to, at once.

Redis delivers a message to every worker of the agent and keeps it for none. The worker that owns the client's
partition records it as an event, and only that event is acted on. The owner of partition 0 gives up on what nobody
can read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
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
ORDER_BYTES_MAX: Final = (
    256 * 1024
)  # more of what is no order is not carried along: two texts of 65,535 bytes fit


class ControlMessage(Struct, frozen=True):
    """What applications publish; `qos` may be text, as the broker backends' users wrote it."""

    type: Literal["subscribe", "unsubscribe"]
    topic: Topic
    clientid: Annotated[Text, Meta(min_length=1)]
    qos: int | Literal["0", "1", "2"] = 0


_decode: Final = msgspec.json.Decoder(ControlMessage).decode


def order_event(data: bytes, now_ms: int) -> ControlSubscribe | ControlUnsubscribe:
    """The event of a message on the channel.

    Raises:
        DecodeError: it is no order.
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
    """The partition of a client's records, as every Kafka client chooses it."""
    return int((murmur2(client_id.encode()) & 0x7FFF_FFFF) % partition_count)


class ControlChannel:
    """Listens for as long as it runs; a Redis that is away is waited for."""

    def __init__(
        self,
        pool: Pool,
        producer: Producer,
        partition_count: int,
        owned: Callable[[], Container[int]],
    ) -> None:
        """`owned` says which partitions are this worker's now."""
        self._pool, self._producer = pool, producer
        self._partition_count, self._owned = partition_count, owned

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._listen()
            except (RedisError, OSError, MillpondError, KafkaError) as error:
                logger.warning("%s: %s; listening again soon", self._pool.channel, error)
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
                        await self._record(message["data"])
        finally:
            await redis.aclose()

    async def _record(self, data: bytes) -> None:
        try:
            event = order_event(data, now_ms())
        except DecodeError as error:
            if 0 in self._owned():
                await self._give_up(data, str(error))
            return
        if partition_of(event.client_id, self._partition_count) in self._owned():
            key = keys.record_key(event).encode()
            await self._producer.send(keys.CLIENTS_TOPIC, key, codec.encode(event))

    async def _give_up(self, data: bytes, reason: str) -> None:
        headers = (
            ("source-channel", self._pool.channel.encode()),
            ("agent", b"sessions"),
            ("reason", reason.encode("utf-8", "replace")),
        )
        await self._producer.send(
            keys.DEAD_LETTERS_TOPIC, None, data[:ORDER_BYTES_MAX], None, headers
        )
