"""MQTT off and onto the wire: whole packets, none larger than the limit; closing that ends, whoever does not read."""

from __future__ import annotations

import asyncio
import io
from typing import Final, NamedTuple

from amqtt.adapters import (
    BufferReader,
    ReaderAdapter,
    StreamWriterAdapter,
    WebSocketsReader,
    WebSocketsWriter,
    WriterAdapter,
)
from amqtt.codecs_amqtt import read_or_raise
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.mqtt import packet_class
from amqtt.mqtt.packet import (
    CONNECT,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    MQTTFixedHeader,
    MQTTPacket,
)
from websockets.exceptions import ConnectionClosed

PROTOCOL_LEVEL: Final = b"\x04"  # of MQTT 3.1.1, in a CONNECT
WILL_FLAG: Final = 0x04
USERNAME_FLAG: Final = 0x80
FLUSH_TIMEOUT_S: Final = 1.0  # for a peer to take what was written, once its connection is to close


class PublishPacket(NamedTuple):
    """What a PUBLISH says. `packet_id` is 0 at QoS 0 ([MQTT-2.3.1-5]: it has none)."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    packet_id: int


class SubscribePacket(NamedTuple):
    """What a SUBSCRIBE asks for: filters, each with its QoS, which may be wrong."""

    packet_id: int
    topic_filters: tuple[tuple[str, int], ...]
    size: int  # bytes


class UnsubscribePacket(NamedTuple):
    """What an UNSUBSCRIBE asks for."""

    packet_id: int
    topic_filters: tuple[str, ...]
    size: int  # bytes


Packet = (
    PublishPacket | SubscribePacket | UnsubscribePacket | MQTTPacket  # type: ignore[type-arg]  # amqtt's, of any other kind
)


async def read_packet(reader: ReaderAdapter, bytes_max: int) -> Packet | None:
    """The next packet; None if the connection ended, also in the middle of one.

    Raises:
        MQTTError: it is none, or larger than `bytes_max`: what follows it cannot be read either.
    """
    header = await MQTTFixedHeader.from_stream(reader)
    if header is None:
        return None
    if header.remaining_length > bytes_max:
        raise MQTTError(f"a packet of {header.remaining_length} bytes; {bytes_max} are allowed")
    try:
        body = await read_or_raise(reader, header.remaining_length)
    except NoDataError:
        return None
    match header.packet_type:
        case packet_type if packet_type == PUBLISH:
            return _publish(header.flags, body)
        case packet_type if packet_type == SUBSCRIBE:
            return _subscribe(body)
        case packet_type if packet_type == UNSUBSCRIBE:
            return _unsubscribe(body)
    try:
        return await packet_class(header).from_stream(BufferReader(body), fixed_header=header)
    except (AMQTTError, MQTTError, NoDataError, ValueError) as error:
        raise MQTTError(f"a malformed packet of type {header.packet_type}: {error}") from error


def _publish(flags: int, body: bytes) -> PublishPacket:
    qos = flags >> 1 & 3
    if qos > 2:
        raise MQTTError("a PUBLISH at QoS 3")  # [MQTT-3.3.1-4]
    topic, end = _text(body, 0, "a topic")
    packet_id = 0
    if qos:
        packet_id = int.from_bytes(body[end : end + 2], "big")
        end += 2
        if not packet_id:
            raise MQTTError("a PUBLISH without its packet id")  # [MQTT-2.3.1-1]
    return PublishPacket(topic, body[end:], qos, bool(flags & 1), packet_id)


def _subscribe(body: bytes) -> SubscribePacket:
    packet_id, at = _packet_id(body, "a SUBSCRIBE"), 2
    topic_filters = []
    while at < len(body):
        topic_filter, at = _text(body, at, "a topic filter")
        if at == len(body):
            raise MQTTError("a SUBSCRIBE with a topic filter that has no QoS")
        topic_filters.append((topic_filter, body[at]))
        at += 1
    if not topic_filters:
        raise MQTTError("a SUBSCRIBE without a topic filter")  # [MQTT-3.8.3-3]
    return SubscribePacket(packet_id, tuple(topic_filters), len(body))


def _unsubscribe(body: bytes) -> UnsubscribePacket:
    packet_id, at = _packet_id(body, "an UNSUBSCRIBE"), 2
    topic_filters = []
    while at < len(body):
        topic_filter, at = _text(body, at, "a topic filter")
        topic_filters.append(topic_filter)
    if not topic_filters:
        raise MQTTError("an UNSUBSCRIBE without a topic filter")  # [MQTT-3.10.3-2]
    return UnsubscribePacket(packet_id, tuple(topic_filters), len(body))


def _packet_id(body: bytes, kind: str) -> int:
    packet_id = int.from_bytes(body[:2], "big")
    if len(body) < 2 or not packet_id:
        raise MQTTError(f"{kind} without its packet id")  # [MQTT-2.3.1-1]
    return packet_id


def _text(body: bytes, at: int, what: str) -> tuple[str, int]:
    """The text that begins at `at`, behind its length, and where it ends.

    Raises:
        MQTTError: it is cut off, or not UTF-8.
    """
    begin = at + 2
    end = begin + int.from_bytes(body[at:begin], "big")
    if len(body) < max(begin, end):
        raise MQTTError(f"{what} is cut off")
    try:
        return body[begin:end].decode(), end
    except UnicodeDecodeError as error:
        raise MQTTError(f"{what} is not UTF-8") from error  # [MQTT-1.5.3-1]


async def read_connect(reader: ReaderAdapter, bytes_max: int) -> tuple[BufferReader, str]:
    """A CONNECT for amqtt, whose parser takes text that is not UTF-8 for other text; and its client id.

    Raises:
        MQTTError: the first packet is none.
        NoDataError: the connection ended before its end.
    """
    header = await MQTTFixedHeader.from_stream(reader)
    if header is None:
        raise NoDataError("the connection ended")
    if header.packet_type != CONNECT:
        raise MQTTError(f"a packet of type {header.packet_type}")  # [MQTT-3.1.0-1]
    if header.remaining_length > bytes_max:
        raise MQTTError(f"a packet of {header.remaining_length} bytes; {bytes_max} are allowed")
    body = await read_or_raise(reader, header.remaining_length)
    return BufferReader(header.to_bytes() + body), _checked_client_id(body)


def _checked_client_id(body: bytes) -> str:
    """The client id of a CONNECT of MQTT 3.1.1; empty for any other version, which amqtt refuses."""
    _, at = _text(body, 0, "the protocol name")
    level, flags = body[at : at + 1], int.from_bytes(body[at + 1 : at + 2], "big")
    at += 4  # the level, the flags, and two bytes of keep alive
    if level != PROTOCOL_LEVEL or len(body) <= at:
        return ""
    client_id, at = _text(body, at, "the client id")
    if flags & WILL_FLAG:
        _, at = _text(body, at, "the topic of the will")
        at += 2 + int.from_bytes(body[at : at + 2], "big")  # the will itself may be any bytes
    if flags & USERNAME_FLAG:
        _text(body, at, "the user name")
    return client_id


def publish_packet(
    topic: str, payload: bytes, qos: int, packet_id: int, *, retain: bool, repeated: bool
) -> bytes:
    """A PUBLISH; at QoS 0 without its packet id ([MQTT-2.3.1-5])."""
    name = topic.encode()
    header = len(name).to_bytes(2, "big") + name
    if qos:
        header += packet_id.to_bytes(2, "big")
    flags = repeated << 3 | qos << 1 | retain
    fixed = MQTTFixedHeader(PUBLISH, flags, len(header) + len(payload)).to_bytes()
    return b"".join((fixed, header, payload))


def pubrel_packet(packet_id: int) -> bytes:
    """A PUBREL ([MQTT-3.6.1-1])."""
    return b"\x62\x02" + packet_id.to_bytes(2, "big")


class WebSocketReader(WebSocketsReader):
    """amqtt's goes on with the last frame, again and again, when the connection ends in the middle of a packet."""

    async def _feed_buffer(self, n: int = 1) -> None:
        buffer = bytearray(self._stream.read())
        while len(buffer) < n:
            try:
                frame = await self._protocol.recv()
            except ConnectionClosed:
                break
            buffer.extend(frame.encode() if isinstance(frame, str) else frame)
        self._stream = io.BytesIO(buffer)


class ConnectionWriter(WriterAdapter):
    """A writer whose `close` ends: amqtt's waits for ever for a peer that does not read."""

    def __init__(self, writer: WriterAdapter) -> None:
        """`writer` does the writing."""
        self._writer = writer
        self._closing: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> None:
        """See amqtt; nothing after `close`.

        Raises:
            ConnectionResetError: the peer is gone.
        """
        if self._closing is None:
            try:
                self._writer.write(data)
            except RuntimeError as error:  # uvloop's word for it
                raise ConnectionResetError(str(error)) from error

    async def drain(self) -> None:
        """See amqtt.

        Raises:
            ConnectionResetError: the peer is gone.
        """
        if self._closing is None:
            try:
                await self._writer.drain()
            except ConnectionClosed as error:
                raise ConnectionResetError(str(error)) from error

    def get_peer_info(self) -> tuple[str, int] | None:
        return self._writer.get_peer_info()

    def get_ssl_info(self) -> None:
        """There is no TLS here."""

    async def close(self) -> None:
        """Send what was written, at most for `FLUSH_TIMEOUT_S`; then the connection is cut."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self._writer.close()
        except (TimeoutError, OSError, ConnectionClosed):
            self._abort()

    def _abort(self) -> None:
        match self._writer:
            case StreamWriterAdapter():
                self._writer._writer.transport.abort()  # noqa: SLF001  amqtt has no way to
            case WebSocketsWriter():
                self._writer._protocol.transport.abort()  # noqa: SLF001  the same
