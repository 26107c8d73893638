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
from amqtt.mqtt.packet import PUBLISH, MQTTFixedHeader, MQTTPacket
from websockets.exceptions import ConnectionClosed

FLUSH_TIMEOUT_S: Final = 1.0  # for a peer to take what was written, once its connection is to close


class PublishPacket(NamedTuple):
    """What a PUBLISH says. `packet_id` is 0 at QoS 0 ([MQTT-2.3.1-5]: it has none)."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    packet_id: int


Packet = PublishPacket | MQTTPacket  # type: ignore[type-arg]  # amqtt's, of any kind


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
    if header.packet_type == PUBLISH:
        return _publish(header.flags, body)
    try:
        return await packet_class(header).from_stream(BufferReader(body), fixed_header=header)
    except (AMQTTError, MQTTError, NoDataError, ValueError) as error:
        raise MQTTError(f"a malformed packet of type {header.packet_type}: {error}") from error


def _publish(flags: int, body: bytes) -> PublishPacket:
    qos, end = flags >> 1 & 3, 2 + int.from_bytes(body[:2], "big")
    if qos > 2:
        raise MQTTError("a PUBLISH at QoS 3")  # [MQTT-3.3.1-4]
    try:
        topic = body[2:end].decode()
    except UnicodeDecodeError as error:
        raise MQTTError("a topic that is not UTF-8") from error  # [MQTT-1.5.3-1]
    packet_id = 0
    if qos:
        packet_id = int.from_bytes(body[end : end + 2], "big")
        end += 2
        if not packet_id:
            raise MQTTError("a PUBLISH without its packet id")  # [MQTT-2.3.1-1]
    if len(body) < end:
        raise MQTTError("a PUBLISH that is shorter than its topic")
    return PublishPacket(topic, body[end:], qos, bool(flags & 1), packet_id)


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
