"""The control channel: applications ask through Redis Pub/Sub to subscribe or unsubscribe a client at once.

1. Redis delivers an order to every connected worker of the sessions agent, and does not store it.
2. The worker that owns the client's partition produces an event. The agent acts on that event alone.
3. An invalid order names no client. The worker that owns partition 0 makes a dead letter of it.

A listener must not be deaf without a sign. A server that hangs and a proxy that lost its server keep the connection open, and
a primary that was replaced still answers. So a silent connection gets a PING, and the place of the channel is checked every
few seconds. After a failure the server is located again, with back-off, and each change of state is logged once.

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
from msgspec import Meta, Struct
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError

from millpond.pipeline.clock import now_ms
from millpond.pipeline.kafka.partitioning import partition_of
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.stores.redis.connection import Access, Address
from millpond.pipeline.stores.redis.location import access_of, locate
from millpond.pipeline.stores.retries import Retries
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError, MillpondError, StoreDown
from millpond.schemas.events import ClientId, ControlSubscribe, ControlUnsubscribe, Topic
from millpond.schemas.rules.pool import Pool
from millpond.schemas.topics import filter_error

logger = logging.getLogger(__name__)

# An order is lost while no worker listens, so this is short. A Redis that forbids the channel is asked as often.
RETRY_INTERVAL_MAX_S: Final = 5.0
# A connection that is silent for so long gets a PING, and is given up if it is silent for as long again. So a server that
# hangs, or a proxy without its server, is noticed within 10 s. An idle connection costs a PING in 5 s.
SILENCE_MAX_S: Final = 5.0
# The dead letter of an invalid order holds no more of it. A valid order has two texts of up to 65,535 bytes.
ORDER_BYTES_MAX: Final = 256 * 1024


class ControlOrder(Struct, frozen=True):
    """The JSON that applications publish. `qos` may be text, as EMQ X's own backends accepted it."""

    type: Literal["subscribe", "unsubscribe"]
    topic: Topic
    clientid: Annotated[ClientId, Meta(min_length=1)]
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


class ControlChannel:
    """Reads the control channel. While Redis or Kafka is down it tries again, with back-off."""

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
        self._retries = Retries(RETRY_INTERVAL_MAX_S)
        # Why the channel is not heard, as logged; None while it is heard.
        self._reason: str | None = None

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            try:
                await self._listen()
            except (RedisError, OSError, MillpondError, KafkaError) as error:
                self._note_failure(error)
            self._retries.failed()
            await self._retries.pause()

    async def _listen(self) -> None:
        """Listen at the server of the pool, until it is silent, or until the pool has another one.

        Raises:
            RedisError, OSError, MillpondError, KafkaError: listening is not possible, or not any more.
        """
        access = access_of(self._pool)
        where = await locate(self._pool, access)
        redis: Redis = Redis(
            host=where.host, port=where.port, username=access.username, password=access.password,
            ssl=self._pool.tls, ssl_ca_certs=self._pool.ca_file,
            socket_connect_timeout=access.connect_timeout_s, socket_timeout=SILENCE_MAX_S,
            # The client would connect again by itself, to the same server.
            retry=Retry(NoBackoff(), 0),
        )  # fmt: skip
        try:
            async with redis.pubsub() as channel:
                await channel.subscribe(self._pool.channel)
                await self._hear(channel, where, access)
        finally:
            await redis.aclose()

    async def _hear(self, channel: PubSub, where: Address, access: Access) -> None:
        clock = asyncio.get_running_loop().time
        checked_at, waiting = clock(), True  # for the reply to SUBSCRIBE
        while True:
            message = await channel.get_message(timeout=SILENCE_MAX_S)
            if message is not None:
                self._note_success(waiting)
                waiting = False
                if message["type"] == "message":
                    await self._handle(message["data"])
            elif waiting:
                raise StoreDown(f"{where} does not answer within {SILENCE_MAX_S:g} s")
            else:
                waiting = True
                await channel.ping()
            if clock() - checked_at >= SILENCE_MAX_S:
                await self._check_place(where, access)
                checked_at = clock()

    async def _check_place(self, where: Address, access: Access) -> None:
        """Check that applications publish where this listens: a primary may hang, or be cut off, and be replaced.

        Raises:
            StoreDown: the pool has another server now.
        """
        try:
            now = await locate(self._pool, access, where)
        except StoreDown:
            # No other server is known, and this one answers.
            return
        if now != where:
            raise StoreDown(f"{now} has taken the place of {where}")

    def _note_success(self, answered: bool) -> None:
        """Log that the channel is heard again. Only a reply to a PING ends the back-off: a server may hang up at once."""
        if self._reason is not None:
            self._reason = None
            logger.info("control channel %s: listening again", self._pool.channel)
        if answered:
            self._retries.succeeded()

    def _note_failure(self, error: Exception) -> None:
        """Log a reason, if it is not that of the last try."""
        reason = str(error)
        if isinstance(error, NoPermissionError):
            user = self._pool.username or "default"
            reason = (
                f"{error}; grant it with ACL SETUSER {user} +subscribe +ping &{self._pool.channel}"
            )
        if reason != self._reason:
            self._reason = reason
            logger.warning(
                "control channel %s: %s; orders of applications are lost until it is heard again;"
                " trying again",
                self._pool.channel,
                reason,
            )

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
