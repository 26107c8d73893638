"""What is no MQTT, or more than is allowed, ends its connection: nothing of it is published, and nobody else feels it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from websockets.asyncio.client import connect as websocket_connect
from websockets.typing import Subprotocol

from millpond.pipeline.stack.ports import HOST
from millpond.schemas import keys
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    SessionCreated,
    SessionTerminated,
)
from tests.support.embedded_bridge import MESSAGE_BYTES_MAX, Bridge, Log, reason_of_end, running
from tests.support.mqtt import CONNACK, PUBACK, a_publish, packet, text

pytestmark = pytest.mark.usefixtures("let_go")


@pytest.fixture(scope="module")
def bridge(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    yield from running(kafka, tmp_path_factory.mktemp("bridge"))


async def nothing_but(bridge: Bridge, log: Log, topic: str) -> None:
    """Somebody else publishes to the topic, and that is all there is of it."""
    other = await bridge.connect("somebody-else")
    other.publish(topic, b"after", 1)
    await other.next(PUBACK)
    await log.until(lambda: log.payloads(topic)[-1:] == [b"after"], "the one after")
    assert log.payloads(topic) == [b"after"]


@pytest.mark.parametrize(
    "bytes_sent",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x10\xff\xff\xff\xff\xff", b"\x10\x02\x00\x04", b"\xc0\x00", b""],
)
async def test_who_does_not_speak_mqtt_is_no_client(
    bridge: Bridge, log: Log, bytes_sent: bytes
) -> None:
    stranger = await bridge.open()
    stranger.send(bytes_sent)
    stranger.writer.write_eof()
    assert await stranger.closed()
    await (await bridge.connect("next")).disconnect()
    await log.until(lambda: "SessionTerminated" in log.kinds("next"), "the next client")
    assert {record.key for record in log.records} == {"next"}


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00",  # [MQTT-3.1.0-2]: a second CONNECT
        b"\x20\x02\x00\x00",  # CONNACK
        b"\x00\x00",  # reserved
        b"\x36\x05\x00\x01t\x00\x01",  # QoS 3
        b"\x32\x05\x00\x01t\x00\x00",  # packet id 0
        b"\x30\x01\x00",  # shorter than its topic
        b"\x30\x04\x00\x02\xff\xfe",  # a topic that is not UTF-8
        b"\x30\xff\xff\xff\xff\x01",  # a length of five bytes
        b"\x82\x01\x00",  # SUBSCRIBE without its packet id
    ],
)
async def test_a_client_that_breaks_the_protocol_is_cut_off(
    bridge: Bridge, log: Log, bytes_sent: bytes
) -> None:
    client = await bridge.connect("broken")
    client.send(bytes_sent + b"\x30\x04\x00\x01tX")
    assert await client.closed()
    events = await log.until_kinds(
        "broken", SessionCreated, ClientConnected, ClientDisconnected, SessionTerminated
    )
    assert isinstance(events[2], ClientDisconnected)
    assert events[2].reason == "protocol_error"
    await nothing_but(bridge, log, "t")


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize(
    "topic", ["$millpond/messages", "$SYS/broker", "$share/g/t", "a/+/b", "#", "", "nul\0"]
)
async def test_a_publish_where_nobody_may_is_refused(
    bridge: Bridge, log: Log, topic: str, qos: int
) -> None:
    client = await bridge.connect("refused")
    # What is in the payload is never taken for packets.
    client.publish(topic, a_publish("inside", b"x", 0, 0), qos)
    assert await client.closed()
    assert await reason_of_end(log, "refused") == "protocol_error"
    await nothing_but(bridge, log, "inside")
    assert {r.key for r in log.records if r.topic == keys.MESSAGES_TOPIC} == {"inside"}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"a" * (MESSAGE_BYTES_MAX + 100_000), "protocol_error"),
        (b"a" * MESSAGE_BYTES_MAX, "publish_refused"),
        (b"\xff" * (MESSAGE_BYTES_MAX - 1_000), "publish_refused"),
    ],
    ids=["more-than-a-packet", "more-than-a-record", "more-than-a-record-as-base64"],
)
async def test_a_payload_that_is_too_large_ends_its_connection_and_no_other(
    bridge: Bridge, log: Log, payload: bytes, reason: str
) -> None:
    # Also when it is published again, over another connection of the session
    for repeated in (False, True):
        client = await bridge.connect("large", clean=False)
        client.publish("large/1", payload, 2, 3, repeated=repeated)
        assert await client.closed()
    (await bridge.connect("large")).vanish()
    await log.until(lambda: len(log.of_type(ClientDisconnected, "large")) == 3, "the ends")
    reasons = [event.reason for event in log.of_type(ClientDisconnected, "large")]
    assert reasons == [reason, reason, "closed"]
    assert "large: " in bridge.said()
    await nothing_but(bridge, log, "large/1")


async def test_the_largest_record_that_the_settings_allow_is_taken_by_kafka(
    bridge: Bridge, log: Log
) -> None:
    # Given payloads around the limit
    for size in range(MESSAGE_BYTES_MAX - 460, MESSAGE_BYTES_MAX - 300, 20):
        client = await bridge.connect("edge")
        client.publish("edge/1", b"a" * size, 1)
        if await client.take() is None:
            break
        await client.disconnect()
    else:
        pytest.fail("all were taken")
    # Then one that was refused here has not hurt what comes after it
    other = await bridge.connect("after")
    other.publish("edge/1", b"after", 1)
    await other.next(PUBACK)
    await log.until(lambda: log.payloads("edge/1")[-1:] == [b"after"], "the one after")
    assert len(log.published("edge/1")) > 1


async def test_a_websocket_that_ends_in_the_middle_of_a_packet_has_published_nothing(
    bridge: Bridge, log: Log
) -> None:
    address = f"ws://127.0.0.1:{bridge.websocket_port}/"
    async with websocket_connect(address, subprotocols=[Subprotocol("mqtt")]) as connection:
        await connection.send(packet(1, 0, text("MQTT") + b"\x04\x02\x00\x00" + text("half-web")))
        answer = await connection.recv()
        assert isinstance(answer, bytes)
        assert answer[0] >> 4 == CONNACK
        publish = a_publish("half/1", b"0123456789", 0, 0)
        for frame in (publish[:2], publish[2:-3]):
            await connection.send(frame)
    assert await reason_of_end(log, "half-web") == "closed"
    half = await bridge.connect("half-tcp")
    half.send(a_publish("half/1", b"0123456789", 0, 0)[:-3])
    half.writer.write_eof()
    assert await reason_of_end(log, "half-tcp") == "closed"
    await nothing_but(bridge, log, "half/1")


async def handshake(bridge: Bridge, *headers: str, upgrade: bool = True) -> str:
    """The first line of the answer to a request for a WebSocket."""
    reader, writer = await asyncio.open_connection(HOST, bridge.websocket_port)
    asked = ["GET /mqtt HTTP/1.1", *headers]
    if upgrade:
        asked += [
            "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol: mqtt",
        ]  # fmt: skip
    writer.write(("\r\n".join(asked) + "\r\n\r\n").encode())
    answer = await reader.readline()
    writer.close()
    return answer.decode().split("\r", 1)[0]


@pytest.mark.parametrize(
    ("host", "origin", "answer"),
    [
        ("127.0.0.1", None, "HTTP/1.1 101 Switching Protocols"),
        ("127.0.0.1", "http://127.0.0.1:8080", "HTTP/1.1 101 Switching Protocols"),
        ("localhost", "http://localhost:8080", "HTTP/1.1 101 Switching Protocols"),
        ("127.0.0.1", "http://127.0.0.1:3000", "HTTP/1.1 403 Forbidden"),
        ("127.0.0.1", "http://evil.example", "HTTP/1.1 403 Forbidden"),
        ("127.0.0.1", "null", "HTTP/1.1 403 Forbidden"),
        ("evil.example", None, "HTTP/1.1 403 Forbidden"),
        ("evil.example", "http://127.0.0.1:8080", "HTTP/1.1 403 Forbidden"),
    ],
)
async def test_a_websocket_opens_for_the_page_of_this_machine_and_for_what_is_no_browser(
    bridge: Bridge, host: str, origin: str | None, answer: str
) -> None:
    origins = [] if origin is None else [f"Origin: {origin}"]
    assert await handshake(bridge, f"Host: {host}:{bridge.websocket_port}", *origins) == answer


async def test_what_is_no_websocket_is_answered_and_not_logged(bridge: Bridge) -> None:
    said = bridge.said()
    host = f"Host: 127.0.0.1:{bridge.websocket_port}"
    assert await handshake(bridge, host, upgrade=False) == "HTTP/1.1 426 Upgrade Required"
    reader, writer = await asyncio.open_connection(HOST, bridge.websocket_port)
    writer.write(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00\r\n\r\n")
    await reader.read()
    writer.close()
    client = await bridge.connect("after")
    await client.disconnect()
    assert bridge.said() == said
