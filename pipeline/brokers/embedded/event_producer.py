"""The events of the embedded broker: each gets its time once, and Kafka gets them in the order of the calls."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from millpond.pipeline.brokers.bridge_rules import BridgeRules
from millpond.pipeline.brokers.embedded.message_id import MessageIds
from millpond.pipeline.brokers.embedded.outgoing import OutgoingMessage
from millpond.pipeline.clock import now_ms
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.telemetry.histogram import SHORT_S, Histogram
from millpond.pipeline.telemetry.tracing import BridgeTracing, Headers
from millpond.schemas import codec, keys
from millpond.schemas.events import (
    TEXT_BYTES_MAX,
    ClientConnected,
    ClientDisconnected,
    DeliveriesSent,
    DeliveryFailed,
    Event,
    MembersActive,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    NodeStarted,
    NodeStopped,
    NodeSyncCompleted,
    NodeSyncStarted,
    SessionCreated,
    SessionDiscarded,
    SessionResumed,
    SessionSubscribed,
    SessionTakenOver,
    SessionTerminated,
    SessionUnsubscribed,
)
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

# [MQTT5-3.1.2-11.2]; also the expiry of an MQTT 3.1.1 session without clean session.
NEVER_EXPIRES_S: Final = 0xFFFF_FFFF

ClientEvent = (
    type[ClientDisconnected] | type[SessionCreated] | type[SessionResumed]
    | type[SessionSubscribed] | type[SessionUnsubscribed] | type[SessionTerminated]
    | type[SessionDiscarded] | type[SessionTakenOver] | type[ClientConnected]
)  # fmt: skip
ReportEvent = MessageAcked | DeliveriesSent | DeliveryFailed | MembersActive
NodeEvent = type[NodeStarted] | type[NodeStopped] | type[NodeSyncStarted] | type[NodeSyncCompleted]


class EventProducer:
    """Produces events. One call at a time is in the producer, so no event overtakes another."""

    def __init__(
        self,
        producer: Producer,
        rules: Rules,
        node: str,
        partitions: int,
        tracing: BridgeTracing | None = None,
    ) -> None:
        """`partitions` is the number of partitions of each Kafka topic: node events go to each of them."""
        self._tracing = tracing
        self.node = node
        self.answers = BridgeRules(rules)
        self._producer, self._partitions = producer, partitions
        self._ids = MessageIds(node, os.getpid())
        self._entering = asyncio.Lock()
        # A payload is never shorter in JSON, so a larger packet cannot become a record. Besides its payload a PUBLISH
        # has the length of the topic (2 bytes), the topic, and the packet id (2 bytes).
        self.packet_bytes_max = producer.message_bytes_max + 2 + TEXT_BYTES_MAX + 2
        self._waiting: set[asyncio.Task[None]] = set()
        self.unacknowledged: set[asyncio.Future[Any]] = set()
        self.entered: Counter[str] = Counter()  # events produced, by type
        self.lost: Counter[str] = Counter()  # events that Kafka refused, by type
        self.kept_s = Histogram(
            SHORT_S
        )  # from an event's place in the order until Kafka acknowledges it

    # -- publishes

    async def publish(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool,
        client_id: str,
        username: str | None,
    ) -> tuple[MessagePublished, asyncio.Future[Any]]:
        """Produce a publish. The future is done when Kafka has acknowledged it.

        Raises:
            MessageSizeTooLargeError: the event is larger than one Kafka record may be.
        """
        text, encoding = codec.payload_text(payload)
        at = now_ms()
        event = MessagePublished(
            at=at, node=self.node, message_id=self._ids.next(), topic=topic, qos=qos,
            retain=retain, client_id=client_id, username=username, payload=text,
            payload_encoding=encoding, published_at=at,
        )  # fmt: skip
        span = None if self._tracing is None else self._tracing.publish(event)
        headers = () if span is None else span.headers
        acknowledged = await self._enter(keys.MESSAGES_TOPIC, event, headers=headers)
        if span is not None:
            acknowledged.add_done_callback(span.answered)
        return event, acknowledged

    async def delivered(self, message: OutgoingMessage, client_id: str, qos: int) -> None:
        """Produce `message.delivered`, if a rule needs it: the broker is about to hand a message to a client."""
        if self.answers.wants("message.delivered", message.topic):
            event = MessageDelivered(
                at=now_ms(), node=self.node, message_id=message.message_id, topic=message.topic,
                client_id=client_id, from_client_id=message.from_client_id, qos=qos,
            )  # fmt: skip
            await self._enter(keys.MESSAGES_TOPIC, event)

    def acknowledgement(
        self, message: OutgoingMessage, client_id: str, qos: int, *, leased: bool
    ) -> MessageAcked | None:
        """Make the event of a client's acknowledgement. None if the copy has no lease and no rule needs the event."""
        if not leased and not self.answers.wants("message.acked", message.topic):
            return None
        return MessageAcked(
            at=now_ms(), node=self.node, message_id=message.message_id, topic=message.topic,
            client_id=client_id, from_client_id=message.from_client_id, qos=qos,
        )  # fmt: skip

    # -- clients, sessions, nodes

    async def client(self, kind: ClientEvent, client_id: str, **fields: Any) -> asyncio.Future[Any]:
        """Produce an event of a client or its session. The future is done when Kafka has acknowledged it."""
        event: Event = kind(at=now_ms(), node=self.node, client_id=client_id, **fields)
        return await self._enter(keys.CLIENTS_TOPIC, event)

    async def node_event(self, kind: NodeEvent, **fields: Any) -> None:
        """Produce an event of the broker node to every partition: each holds some of its clients."""
        event = kind(at=now_ms(), node=self.node, **fields)
        for number in range(self._partitions):
            await self._enter(keys.CLIENTS_TOPIC, event, number)

    # -- into Kafka

    async def enter(self, event: ReportEvent, partition: int | None = None) -> asyncio.Future[Any]:
        """Produce a report. The future is done when Kafka has acknowledged it. See `EventSink`."""
        return await self._enter(keys.MESSAGES_TOPIC, event, partition, retried=True)

    async def enter_alone(self, event: ReportEvent, partition: int | None = None) -> None:
        """Produce a report that was refused, in a batch of its own. See `EventSink`."""
        key = keys.record_key(event).encode()
        await self._producer.send_alone(keys.MESSAGES_TOPIC, key, codec.encode(event), partition)

    async def _enter(
        self,
        topic: str,
        event: Event,
        partition: int | None = None,
        headers: Headers = (),
        *,
        retried: bool = False,
    ) -> asyncio.Future[Any]:
        """Produce an event. `retried`: the caller sends it again if Kafka refuses it, so it is not lost."""
        key, kind = keys.record_key(event).encode(), str(event.__struct_config__.tag)
        began = time.perf_counter()
        async with self._entering:
            acknowledged = await self._producer.send(
                topic, key, codec.encode(event), partition, headers
            )
        self.unacknowledged.add(acknowledged)
        self.entered[kind] += 1
        acknowledged.add_done_callback(partial(self._done, kind, began, retried))
        return acknowledged

    async def drain(self) -> None:
        """Wait until Kafka has acknowledged every event produced so far, or has refused it."""
        if self.unacknowledged:
            await asyncio.wait(set(self.unacknowledged))

    def when_kept(self, call: Callable[[], None]) -> None:
        """Call when Kafka has acknowledged every event produced so far, or has refused it."""
        waiting = asyncio.create_task(self.drain())
        self._waiting.add(waiting)
        waiting.add_done_callback(partial(self._kept, call))

    def _kept(self, call: Callable[[], None], waited: asyncio.Task[None]) -> None:
        self._waiting.discard(waited)
        if not waited.cancelled():
            call()

    def _done(
        self, kind: str, began: float, retried: bool, acknowledged: asyncio.Future[Any]
    ) -> None:
        self.unacknowledged.discard(acknowledged)
        if acknowledged.cancelled():
            return
        if acknowledged.exception() is None:
            self.kept_s.add(time.perf_counter() - began)
        elif retried:
            logger.warning(
                "Kafka refused a report, it is sent again: %s: %r", kind, acknowledged.exception()
            )
        else:
            self.lost[kind] += 1
            logger.error(
                "Kafka refused an event, it is lost: %s: %r", kind, acknowledged.exception()
            )
