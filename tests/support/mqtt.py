"""An MQTT 3.1.1 client by hand, for tests that must see each packet: it answers nothing by itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from millpond.pipeline.stack.ports import HOST

CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 2, 3, 4, 5, 6, 7
SUBACK, UNSUBACK, PINGRESP = 9, 11, 13
PACKET_TIMEOUT_S = 60.0  # generous, since machines are shared
RECEIVE_BYTES = 64 * 1024
SILENCE_S = 0.3  # how long nothing has to come to be called nothing


class Packet(NamedTuple):
    kind: int
    flags: int
    body: bytes

    @property
    def packet_id(self) -> int:
        """Of an acknowledgement."""
        return int.from_bytes(self.body[:2], "big")


class Will(NamedTuple):
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return len(encoded).to_bytes(2, "big") + encoded


def packet(kind: int, flags: int, body: bytes) -> bytes:
    length, left = bytearray(), len(body)
    while True:
        left, digit = divmod(left, 128)
        length.append(digit | (0x80 if left else 0))
        if not left:
            return bytes((kind << 4 | flags,)) + bytes(length) + body


def a_publish(
    topic: str | bytes, payload: bytes, qos: int, packet_id: int, *, repeated: bool = False,
    retain: bool = False,
) -> bytes:  # fmt: skip
    flags = repeated << 3 | qos << 1 | retain
    return packet(
        PUBLISH, flags, text(topic) + (packet_id.to_bytes(2, "big") if qos else b"") + payload
    )


def delivered(publish: Packet) -> tuple[str, bytes, int, int]:
    """Topic, payload, QoS and packet id of a PUBLISH that came."""
    qos, end = publish.flags >> 1 & 3, 2 + int.from_bytes(publish.body[:2], "big")
    topic = publish.body[2:end].decode()
    packet_id = int.from_bytes(publish.body[end : end + 2], "big") if qos else 0
    return topic, publish.body[end + (2 if qos else 0) :], qos, packet_id


def packet_ids(count: int) -> Iterator[int]:
    return (number % 65_535 + 1 for number in range(count))


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        host, port = writer.get_extra_info("sockname")[:2]
        self.address = f"{host}:{port}"
        self.session_present = False

    @classmethod
    async def open(cls, port: int) -> Client:
        """A TCP connection that takes little before it is read, on which nothing has been said."""
        connection = socket.create_connection((HOST, port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        return cls(*await asyncio.open_connection(sock=connection, limit=RECEIVE_BYTES))

    async def connect(
        self, client_id: str, *, clean: bool = True, keep_alive_s: int = 0,
        will: Will | None = None, username: str | None = None,
    ) -> None:  # fmt: skip
        """CONNECT, which the broker accepts."""
        flags, fields = clean << 1, text(client_id)
        if will is not None:
            flags |= 0x04 | will.qos << 3 | will.retain << 5
            fields += text(will.topic) + text(will.payload)
        if username is not None:
            flags |= 0x80
            fields += text(username)
        self.send(
            packet(
                1, 0, text("MQTT") + bytes((4, flags)) + keep_alive_s.to_bytes(2, "big") + fields
            )
        )
        answer = await self.next(CONNACK)
        assert answer.body[1] == 0
        self.session_present = bool(answer.body[0])

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def publish(
        self, topic: str, payload: bytes, qos: int = 0, packet_id: int = 1, *,
        repeated: bool = False, retain: bool = False,
    ) -> None:  # fmt: skip
        self.send(a_publish(topic, payload, qos, packet_id, repeated=repeated, retain=retain))

    def answer(self, kind: int, packet_id: int) -> None:
        """PUBACK, PUBREC, PUBREL or PUBCOMP."""
        self.send(packet(kind, 2 if kind == PUBREL else 0, packet_id.to_bytes(2, "big")))

    def ping(self) -> None:
        self.send(packet(12, 0, b""))

    async def subscribe(self, topic_filter: str, qos: int) -> int:
        """The granted QoS, or 128."""
        self.send(packet(8, 2, (7).to_bytes(2, "big") + text(topic_filter) + bytes((qos,))))
        return (await self.next(SUBACK)).body[2]

    async def unsubscribe(self, topic_filter: str) -> None:
        self.send(packet(10, 2, (8).to_bytes(2, "big") + text(topic_filter)))
        await self.next(UNSUBACK)

    async def take(self) -> Packet | None:
        """The next packet; None when the broker has closed the connection."""
        try:
            async with asyncio.timeout(PACKET_TIMEOUT_S):
                first = (await self.reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    digit = (await self.reader.readexactly(1))[0]
                    length |= (digit & 0x7F) << shift
                    shift += 7
                    if not digit & 0x80:
                        break
                return Packet(first >> 4, first & 15, await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def next(self, kind: int) -> Packet:
        """The next packet, which is of this kind."""
        came = await self.take()
        if came is None:
            raise ConnectionResetError("the broker closed the connection")
        assert came.kind == kind, came
        return came

    async def silent(self) -> bool:
        """Whether nothing comes, for as long as one would wait."""
        try:
            async with asyncio.timeout(SILENCE_S):
                came = await self.reader.read(1)
        except TimeoutError:
            return True
        assert not came, "a packet came"
        return False

    async def closed(self) -> bool:
        """Whether the broker closes the connection, and says nothing more."""
        return await self.take() is None

    async def disconnect(self) -> None:
        self.send(packet(14, 0, b""))
        while await self.take() is not None:
            pass
        self.vanish()

    def vanish(self) -> None:
        """Reset the connection, as a client does that is killed."""
        self.writer.transport.abort()

    async def acknowledged(self, count: int) -> list[int]:
        """The packet ids of that many PUBACKs, in the order they come; fewer when the connection ends."""
        ids: list[int] = []
        while len(ids) < count and (came := await self.take()) is not None:
            assert came.kind == PUBACK, came
            ids.append(came.packet_id)
        return ids


async def send_all(client: Client, packets: Iterable[bytes]) -> None:
    """As fast as the broker takes them."""
    for one in packets:
        client.send(one)
        await client.writer.drain()
