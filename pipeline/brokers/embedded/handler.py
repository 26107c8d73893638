"""One connection of the embedded broker: what a client asks for is acknowledged only after Kafka has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from aiokafka.errors import KafkaError
from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.errors import MQTTError
from amqtt.mqtt.constants import QOS_1, QOS_2
from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.pingreq import PingReqPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket
from amqtt.mqtt.pubcomp import PubcompPacket
from amqtt.mqtt.pubrec import PubrecPacket
from amqtt.mqtt.pubrel import PubrelPacket
from amqtt.mqtt.suback import SubackPacket
from amqtt.mqtt.unsuback import UnsubackPacket
from amqtt.session import Session

from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.reports import ReportEntry
from millpond.pipeline.brokers.embedded.event_producer import EventProducer
from millpond.pipeline.brokers.embedded.outgoing import (
    Outgoing,
    OutgoingChange,
    OutgoingCopy,
    OutgoingMessage,
)
from millpond.pipeline.brokers.embedded.sender import ConnectionSender
from millpond.pipeline.brokers.embedded.topics import is_refused_topic
from millpond.pipeline.brokers.embedded.wire import (
    ConnectionWriter,
    PublishPacket,
    SubscribePacket,
    UnsubscribePacket,
    read_packet,
)
from millpond.schemas.events import MessagePublished

logger = logging.getLogger(__name__)

# How much of one client may wait for Kafka. Beyond either, its socket is not read: it is held back by TCP.
WAITING_PACKETS_MAX: Final = 1_000  # PUBLISHes, SUBSCRIBEs and UNSUBSCRIBEs
WAITING_BYTES_MAX: Final = 16 * 1024 * 1024
# How much of what is routed may wait for one client. One that is slower is cut off: there is no limit otherwise to what
# it makes the broker keep. A message counts for its payload and what it costs to keep one.
SENDING_BYTES_MAX: Final = 64 * 1024 * 1024
OPEN: Final = ""  # the reason why a connection ended that has not


class Payload(bytes):
    """A payload that remembers the event it came in with: amqtt passes payloads on, and nothing else."""

    event: MessagePublished

    @classmethod
    def of(cls, data: bytes, event: MessagePublished) -> Payload:
        """The payload of an event."""
        payload = cls(data)
        payload.event = event
        return payload


def routed_copy(payload: Payload, qos: int, *, retain: bool) -> OutgoingCopy:
    """A message for a subscriber, at the lower QoS ([MQTT-3.8.4-6])."""
    event = payload.event
    message = OutgoingMessage(event.message_id, event.topic, event.client_id)
    return OutgoingCopy(message, payload, min(qos, event.qos), retain)


def outgoing_of(session: Session) -> Outgoing:
    """What a session has to get: it outlives a connection where the session does."""
    outgoing: Outgoing = session.attributes.setdefault("outgoing", Outgoing())
    return outgoing


def changing_of(session: Session) -> asyncio.Lock:
    """Held by whatever changes a session's subscriptions, until their events have their order. It is handed on in the order in
    which it was asked for.
    """
    changing: asyncio.Lock = session.attributes.setdefault("changing", asyncio.Lock())
    return changing


Kept = Sequence[asyncio.Future[Any]]  # done when Kafka has the events


class Granted(NamedTuple):
    """What became of a SUBSCRIBE."""

    codes: list[int]  # of each filter: its QoS, or 0x80
    kept: Kept


class ConnectionBroker(Protocol):
    """What a connection asks of its broker."""

    async def route(self, session: Session, payload: Payload, retain: bool) -> None:
        """Hand a message that Kafka has to the subscribers."""

    async def subscribe(
        self, session: Session, topic_filters: Iterable[tuple[str, int]]
    ) -> Granted:
        """Subscribe a session. The caller holds `changing_of` it; the events have their order when this returns."""

    async def unsubscribe(self, session: Session, topic_filters: Iterable[str]) -> Kept:
        """End subscriptions, in the same way."""

    def send_retained(self, session: Session, topic_filters: Iterable[tuple[str, int]]) -> None:
        """Hand a session what the broker retains for its new subscriptions."""


class Gate:
    """Lets a client's reader on while not too much of it waits for Kafka."""

    def __init__(self) -> None:
        """Open."""
        self._packets = self._bytes = 0
        self.open = asyncio.Event()
        self.open.set()

    def enter(self, size: int) -> None:
        """One packet more waits."""
        self._count(1, size)

    def leave(self, size: int) -> None:
        """One packet less waits."""
        self._count(-1, -size)

    def _count(self, packets: int, size: int) -> None:
        self._packets += packets
        self._bytes += size
        if self._packets < WAITING_PACKETS_MAX and self._bytes < WAITING_BYTES_MAX:
            self.open.set()
        else:
            self.open.clear()


class ConnectionHandler(BrokerProtocolHandler):
    """One client's connection. Its packets take effect in the order in which they came, and all of them before its end.

    What waits for Kafka goes on in a task of ours: the reader reads on, and Kafka may have it already when the client goes.
    """

    def __init__(
        self,
        plugins_manager: Any,
        event_producer: EventProducer,
        deliveries: Deliveries,
        broker: ConnectionBroker,
    ) -> None:
        """`attach` follows."""
        super().__init__(plugins_manager)
        self._event_producer, self._deliveries, self._broker = event_producer, deliveries, broker
        self.outgoing = Outgoing()  # the session's, once there is one
        self._sending: asyncio.Task[None] | None = None
        self._gate = Gate()
        self._turn: asyncio.Future[None] | None = None  # done when the last publish was passed on
        self._waiting: set[asyncio.Task[None]] = set()
        self.announced = asyncio.Event()  # the log has the connection, or there will be none
        self.client_id = self.connection_id = ""
        self.connected_at_ms = 0
        # From just before its connect is told to just before its disconnect is.
        self.connected = False
        self.reason = OPEN  # why the connection ended
        self.ended = asyncio.Event()

    def attach(self, session: Session, reader: ReaderAdapter, writer: WriterAdapter) -> None:
        super().attach(session, reader, ConnectionWriter(writer))
        self.client_id = session.client_id or ""
        peer = f"{session.remote_address}:{session.remote_port}"
        self.connection_id = f"{self._event_producer.node}/{peer}"

    async def start(self) -> None:
        """See amqtt, which would wait for ever for a client that was gone before this is done."""
        await super().start()
        if self.reason != OPEN:
            await self.handle_connection_closed()

    # -- in

    async def _reader_loop(self) -> None:
        """Instead of amqtt's, which goes on reading in the middle of a packet that it could not make out."""
        assert self._reader_ready is not None, "start() makes it"
        self._reader_ready.set()
        reason = "closed"
        try:
            while self.reason == OPEN and await self._take_packet():
                pass
        except TimeoutError:
            reason = "keepalive_timeout"  # [MQTT-3.1.2-24]
        except MQTTError as error:
            logger.warning("%s: connection closed: %s", self.client_id, error)
            reason = "protocol_error"
        except (asyncio.CancelledError, OSError):
            pass
        self._over(reason)
        await self.handle_connection_closed()
        self._reader_stopped.set()
        await self.stop()

    async def _take_packet(self) -> bool:
        """Read one packet and do what it asks for; whether there was one."""
        assert self.reader is not None, "attach() comes first"
        assert self.session is not None, "attach() comes first"
        await self._gate.open.wait()
        async with asyncio.timeout(self.session.keep_alive * 1.5 or None):
            packet = await read_packet(self.reader, self._event_producer.packet_bytes_max)
        match packet:
            case None:
                return False
            case PublishPacket():
                self._take_publish(packet)
            case PubackPacket():
                await self.handle_puback(packet)
            case PubrecPacket():
                await self.handle_pubrec(packet)
            case PubcompPacket():
                await self.handle_pubcomp(packet)
            case PubrelPacket():
                await self.handle_pubrel(packet)
            case SubscribePacket() | UnsubscribePacket():
                self._gate.enter(packet.size)
                self._start(self._change(packet))
            case PingReqPacket():
                await self.handle_pingreq(packet)
            case DisconnectPacket():
                await self.handle_disconnect(packet)
            case _:
                raise MQTTError(f"a client sends no {type(packet).__name__} here")
        return True

    def _take_publish(self, publish: PublishPacket) -> None:
        """Kafka first; then routing and PUBACK or PUBREC, in the order in which the publishes came.

        Raises:
            MQTTError: nobody may publish to this topic.
        """
        if is_refused_topic(publish.topic):
            raise MQTTError(f"a publish to {publish.topic!r}")
        turn = asyncio.get_running_loop().create_future()
        if publish.qos == QOS_2:
            received = self._receiving.setdefault(publish.packet_id, turn)
            if (
                received is not turn
            ):  # [MQTT-4.3.3-2]: until PUBREL, the same id is the same message
                self._start(self._answer_again(publish, received))
                return
        before, self._turn = self._turn, turn
        self._gate.enter(len(publish.payload))
        self._start(self._publish(publish, before, turn))

    def _start(self, task: Coroutine[Any, Any, None]) -> None:
        started = asyncio.create_task(task)
        self._waiting.add(started)
        started.add_done_callback(self._waiting.discard)

    async def _publish(
        self,
        publish: PublishPacket,
        before: asyncio.Future[None] | None,
        turn: asyncio.Future[None],
    ) -> None:
        session = self.session
        assert session is not None, "a publish comes over an attached connection"
        topic, payload, qos, retain, packet_id = publish
        try:
            event, acknowledged = await self._event_producer.publish(
                topic, payload, qos, retain, self.client_id, session.username
            )
            await acknowledged
            if before is not None:
                await before
            await self._broker.route(session, Payload.of(payload, event), retain)
        except KafkaError as error:
            # There is no negative PUBACK in MQTT 3.1.1; whoever is cut off knows that it must try again.
            logger.warning("%s: a publish to %r is refused: %r", self.client_id, topic, error)
            if qos == QOS_2:
                self._receiving.pop(packet_id, None)
            await self.drop("publish_refused")
            return
        finally:
            self._gate.leave(len(payload))
            turn.set_result(None)
        if qos == QOS_1:
            await self._send(PubackPacket.build(packet_id))
        elif qos == QOS_2:
            await self._send(PubrecPacket.build(packet_id))

    async def _answer_again(self, publish: PublishPacket, received: asyncio.Future[None]) -> None:
        """A QoS 2 publish that came before, perhaps over another connection: Kafka first here, too."""
        await received
        if publish.packet_id in self._receiving:
            await self._send(PubrecPacket.build(publish.packet_id))
        else:
            await self.drop("publish_refused")

    async def handle_pubrel(self, pubrel: PubrelPacket) -> None:
        """[MQTT-4.3.3-2]: PUBREL ends the packet id's message and is answered in any case."""
        self._receiving.pop(pubrel.packet_id, None)
        await self._send(PubcompPacket.build(pubrel.packet_id))

    @property
    def _receiving(self) -> dict[int, asyncio.Future[None]]:
        """QoS 2 packet ids between PUBLISH and PUBREL, done when Kafka has the message: part of the session, not of
        the connection.
        """
        assert self.session is not None, "attach() comes first"
        receiving: dict[int, asyncio.Future[None]] = self.session.attributes.setdefault(
            "receiving", {}
        )
        return receiving

    # -- subscriptions

    async def _change(self, packet: SubscribePacket | UnsubscribePacket) -> None:
        """In its turn; the answer follows when Kafka has the events."""
        session = self.session
        assert session is not None, "a packet comes over an attached connection"
        try:
            async with changing_of(session):
                await self.announced.wait()
                if not self.connected:
                    return
                if isinstance(packet, SubscribePacket):
                    codes, kept = await self._broker.subscribe(session, packet.topic_filters)
                else:
                    codes, kept = [], await self._broker.unsubscribe(session, packet.topic_filters)
            await asyncio.gather(*kept)
        except KafkaError as error:
            # A client that is cut off knows that it must try again.
            logger.warning("%s: a change of subscriptions is refused: %r", self.client_id, error)
            await self.drop("subscription_refused")
            return
        finally:
            self._gate.leave(packet.size)
        if isinstance(packet, SubscribePacket):
            await self._send(SubackPacket.build(packet.packet_id, codes))
            if self.reason == OPEN:
                granted = zip(packet.topic_filters, codes, strict=True)
                self._broker.send_retained(session, [(name, code) for (name, _), code in granted])
        else:
            await self._send(UnsubackPacket.build(packet.packet_id))

    async def until_changed(self) -> None:
        """Wait until each SUBSCRIBE and UNSUBSCRIBE that was read has taken effect."""
        assert self.session is not None, "attach() comes first"
        async with changing_of(self.session):
            pass

    # -- out

    def put(self, copy: OutgoingCopy) -> None:
        """A routed message takes its place in the session's flow, which is ours; amqtt's has none that lasts."""
        waiting_bytes = self.outgoing.routed.waiting_bytes
        if waiting_bytes + copy.size > SENDING_BYTES_MAX and self.reason == OPEN:
            logger.warning("%s reads too slowly: connection closed", self.client_id)
            self._start(self.drop("too_slow"))
        if self.reason == OPEN:
            self.outgoing.put(copy)
        else:
            self.outgoing.keep(copy)  # a session that goes on gets it later

    async def _retry_deliveries(self) -> None:
        """Nothing is in amqtt's own flow: see `start_sending`."""

    def start_sending(self, sender: ConnectionSender) -> None:
        """From here on the session's copies go over this connection."""
        self._sending = asyncio.create_task(self._send_copies(sender))

    async def _send_copies(self, sender: ConnectionSender) -> None:
        assert self.writer is not None, "attach() comes first"
        try:
            await sender.run(self.writer, self._write_lock, lambda: self.reason == OPEN)
        except OSError:
            self._over("closed")
            await self.handle_connection_closed()
        except Exception:
            logger.exception("%s: nothing more can be sent over this connection", self.client_id)
            await self.drop("bridge_error")

    async def stop_sending(self) -> None:
        """Nothing more is sent over this connection."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait((self._sending,))

    async def withdraw(self) -> list[OutgoingChange]:
        """The connection ended: its copies whose turn has not come have failed. The changes that waited among them.

        What became of its copies is told before the end of the connection is: else their leases would end untold.
        """
        changes = []
        for item in self.outgoing.withdraw():
            if isinstance(item, OutgoingChange):
                changes.append(item)
            elif item.pending is not None:
                self._deliveries.fail(item.pending, "no_client")
        await self._deliveries.reports.flush()
        return changes

    async def handle_puback(self, puback: PubackPacket) -> None:
        """A copy is acknowledged, however late."""
        self._acknowledged(self.outgoing.puback(puback.packet_id), puback.packet_id)

    async def handle_pubrec(self, pubrec: PubrecPacket) -> None:
        """The same at QoS 2; it is answered in its turn."""
        self._acknowledged(self.outgoing.pubrec(pubrec.packet_id), pubrec.packet_id)

    def _acknowledged(self, copy: OutgoingCopy | None, packet_id: int) -> None:
        """Its room is free when Kafka is told."""
        if copy is None:
            logger.debug("%s acknowledges packet %d, which is not open", self.client_id, packet_id)
            return
        lease = None if copy.pending is None else copy.pending.lease
        self._deliveries.active_members.acked(self.client_id, lease)
        event = self._event_producer.acknowledgement(
            copy.message, self.client_id, copy.qos, leased=lease is not None
        )
        if event is None:
            self.outgoing.entered(copy)
        else:
            entered = partial(self.outgoing.entered, copy)
            self._deliveries.reports.add(ReportEntry(event, None, on_entered=entered))

    async def handle_pubcomp(self, pubcomp: PubcompPacket) -> None:
        """The end of a packet id at QoS 2."""
        self.outgoing.pubcomp(pubcomp.packet_id)

    async def _send(
        self,
        packet: PubackPacket | PubrecPacket | PubcompPacket | SubackPacket | UnsubackPacket,
    ) -> None:
        if not self.ended.is_set():
            await self._send_packet(packet)

    # -- the end

    async def handle_disconnect(self, disconnect: DisconnectPacket | None) -> None:
        if disconnect is not None:
            self._over("normal")
            if self.session is not None:
                self.session.will_flag = False  # [MQTT-3.14.4-3]
        await super().handle_disconnect(disconnect)

    async def drop(self, reason: str) -> None:
        """Close the connection from this side."""
        self._over(reason)
        await self.handle_connection_closed()
        if self.writer is not None:
            await self.writer.close()

    def _over(self, reason: str) -> None:
        """The first reason is the one that counts."""
        if self.reason == OPEN:
            self.reason = reason
