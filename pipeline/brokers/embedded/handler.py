"""One connection of the embedded broker: a publish is acknowledged only after Kafka has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiokafka.errors import KafkaError
from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.mqtt.constants import QOS_1, QOS_2
from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket
from amqtt.mqtt.pubcomp import PubcompPacket
from amqtt.mqtt.publish import PublishPacket
from amqtt.mqtt.pubrec import PubrecPacket
from amqtt.mqtt.pubrel import PubrelPacket
from amqtt.session import OutgoingApplicationMessage, Session

from pipeline.brokers.embedded.recorder import Recorder
from schemas.codec import topic_name_error
from schemas.events import MessagePublished

logger = logging.getLogger(__name__)

# How much of one client may wait for Kafka. Beyond either, its socket is not read: it is held back by TCP.
WAITING_PUBLISHES_MAX: Final = 1_000
WAITING_BYTES_MAX: Final = 16 * 1024 * 1024


class Payload(bytes):
    """A payload that remembers the event it came in with: amqtt passes payloads on, and nothing else."""

    event: MessagePublished

    @classmethod
    def of(cls, data: bytes, event: MessagePublished) -> Payload:
        """The payload of an event."""
        payload = cls(data)
        payload.event = event
        return payload


Route = Callable[[Session, Payload, bool], Awaitable[None]]


class Gate:
    """Lets a client's reader on while not too much of it waits for Kafka."""

    def __init__(self) -> None:
        """Open."""
        self._publishes = self._bytes = 0
        self.open = asyncio.Event()
        self.open.set()

    def enter(self, size: int) -> None:
        """One publish more waits."""
        self._count(1, size)

    def leave(self, size: int) -> None:
        """One publish less waits."""
        self._count(-1, -size)

    def _count(self, publishes: int, size: int) -> None:
        self._publishes += publishes
        self._bytes += size
        if self._publishes < WAITING_PUBLISHES_MAX and self._bytes < WAITING_BYTES_MAX:
            self.open.set()
        else:
            self.open.clear()


class GatedReader(ReaderAdapter):
    """A reader that waits at the gate before each read."""

    def __init__(self, reader: ReaderAdapter, gate: Gate) -> None:
        """`reader` does the reading."""
        self._reader, self._gate = reader, gate

    async def read(self, n: int = -1) -> bytes:
        """See amqtt."""
        await self._gate.open.wait()
        return await self._reader.read(n)

    def feed_eof(self) -> None:
        """See amqtt."""
        self._reader.feed_eof()


class Handler(BrokerProtocolHandler):
    """One client's connection. amqtt starts a task for each packet, in order, and cancels them when the client goes;
    a publish goes on in a task of ours, since Kafka may have it already.
    """

    def __init__(self, plugins_manager: Any, recorder: Recorder, route: Route) -> None:
        """`attach` follows. `route` hands a message to the subscribers."""
        super().__init__(plugins_manager)
        self._recorder, self._route = recorder, route
        self._gate = Gate()
        self._turn: asyncio.Future[None] | None = None  # done when the last publish was passed on
        self._publishing: set[asyncio.Task[None]] = set()
        self.connected_at_ms = 0
        self.reason = "closed"  # why the connection ended, as far as is known
        self.ended = asyncio.Event()

    def attach(self, session: Session, reader: ReaderAdapter, writer: WriterAdapter) -> None:
        """See amqtt."""
        super().attach(session, GatedReader(reader, self._gate), writer)

    @property
    def client_id(self) -> str:
        """Whose connection it is."""
        return (self.session.client_id if self.session is not None else None) or ""

    @property
    def connection_id(self) -> str:
        """The connection's identity: node and peer address."""
        assert self.session is not None, "attach() comes first"
        peer = f"{self.session.remote_address}:{self.session.remote_port}"
        return f"{self._recorder.node}/{peer}"

    # -- in

    async def handle_publish(self, publish_packet: PublishPacket) -> None:
        """Kafka first; then routing and PUBACK or PUBREC, in the order in which the publishes came."""
        topic, data = publish_packet.topic_name, publish_packet.data
        repeated = publish_packet.qos == QOS_2 and publish_packet.packet_id in self._receiving
        if repeated:
            # [MQTT-4.3.3-2]: until PUBREL, the same packet id is the same message.
            await self._send(PubrecPacket.build(_id(publish_packet)))
            return
        if topic is None or data is None or refused_topic(topic):
            logger.warning("%s published to %r: connection closed", self.client_id, topic)
            await self.drop("protocol_error")
            return
        if publish_packet.qos == QOS_2:
            self._receiving[_id(publish_packet)] = None
        before, self._turn = self._turn, asyncio.get_running_loop().create_future()
        publish = self._publish(publish_packet, topic, data, before, self._turn)
        task = asyncio.create_task(publish)
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish(
        self,
        packet: PublishPacket,
        topic: str,
        data: bytes,
        before: asyncio.Future[None] | None,
        turn: asyncio.Future[None],
    ) -> None:
        session = self.session
        assert session is not None, "a publish comes over an attached connection"
        qos, retain = packet.qos or 0, packet.retain_flag
        self._gate.enter(len(data))
        try:
            event, acknowledged = await self._recorder.publish(
                topic, data, qos, retain, self.client_id, session.username
            )
            await acknowledged
            if before is not None:
                await before
        except KafkaError as error:
            # There is no negative PUBACK in MQTT 3.1.1; whoever is cut off knows that it must try again.
            logger.warning("%s: a publish to %r is refused: %r", self.client_id, topic, error)
            await self.drop("publish_refused")
            return
        finally:
            self._gate.leave(len(data))
            if not turn.done():
                turn.set_result(None)
        await self._route(session, Payload.of(data, event), retain)
        if qos == QOS_1:
            await self._send(PubackPacket.build(_id(packet)))
        elif qos == QOS_2:
            await self._send(PubrecPacket.build(_id(packet)))

    async def handle_pubrel(self, pubrel: PubrelPacket) -> None:
        """[MQTT-4.3.3-2]: PUBREL ends the packet id's message and is answered in any case."""
        self._receiving.pop(pubrel.packet_id, None)
        await self._send(PubcompPacket.build(pubrel.packet_id))

    @property
    def _receiving(self) -> dict[int, None]:
        """QoS 2 packet ids between PUBLISH and PUBREL: part of the session, not of the connection."""
        assert self.session is not None, "attach() comes first"
        receiving: dict[int, None] = self.session.attributes.setdefault("receiving", {})
        return receiving

    # -- out

    async def mqtt_publish(
        self,
        topic: str,
        data: bytes | bytearray,
        qos: int | None,
        retain: bool,
        ack_timeout: int | None = None,
    ) -> OutgoingApplicationMessage:
        """See amqtt; says what was delivered and acknowledged."""
        event = data.event if isinstance(data, Payload) else None
        if event is None:
            return await super().mqtt_publish(topic, data, qos, retain, ack_timeout)
        effective = min(qos or 0, event.qos)  # [MQTT-3.8.4-6]
        await self._recorder.delivered(event, self.client_id, effective)
        message = await super().mqtt_publish(topic, data, effective, retain, ack_timeout)
        if effective:
            await self._recorder.acked(event, self.client_id, effective)
        return message

    async def _send(self, packet: PubackPacket | PubrecPacket | PubcompPacket) -> None:
        if not self.ended.is_set():
            await self._send_packet(packet)

    # -- the end

    async def handle_disconnect(self, disconnect: DisconnectPacket | None) -> None:
        """See amqtt."""
        if disconnect is not None and self.reason == "closed":
            self.reason = "normal"
        await super().handle_disconnect(disconnect)

    def handle_read_timeout(self) -> None:
        """[MQTT-3.1.2-24]: one and a half keep-alives without a packet; amqtt only takes note."""
        if self._gate.open.is_set():
            task = asyncio.ensure_future(self.drop("keepalive_timeout"))
            self._publishing.add(task)
            task.add_done_callback(self._publishing.discard)

    async def drop(self, reason: str) -> None:
        """Close the connection from this side."""
        self.reason = reason
        await super().handle_disconnect(None)
        if self.writer is not None:
            await self.writer.close()


def refused_topic(topic: str) -> bool:
    """What no client may publish to: not a topic name, or reserved ([MQTT-4.7.2-1])."""
    return topic_name_error(topic) is not None or topic.startswith("$")


def _id(packet: PublishPacket) -> int:
    packet_id = packet.packet_id
    assert packet_id is not None, "amqtt reads one for QoS 1 and 2"
    return packet_id
