"""Where the embedded broker listens: TCP and WebSocket, for everybody."""

from __future__ import annotations

import asyncio
import logging
import ssl
from http import HTTPStatus
from typing import Any, Final

import websockets
import websockets.asyncio.server
from amqtt.adapters import WebSocketsWriter
from amqtt.broker import Broker
from amqtt.contexts import ListenerType
from websockets.http11 import Request, Response

from millpond.pipeline.brokers.embedded.access import AcceptEveryone
from millpond.pipeline.brokers.embedded.wire import WebSocketReader
from millpond.pipeline.process.loopback import host_allowed, origin_allowed
from millpond.pipeline.settings import BridgeSettings

FIXED_HEADER_BYTES_MAX: Final = 5

# The library logs a line for each connection, and a traceback for one that does not speak WebSocket. The answer to the
# client says enough: a port scan must not fill the log.
_logger: Final = logging.getLogger(f"{__name__}.websocket")
_logger.setLevel(logging.WARNING)
_logger.addFilter(lambda record: record.msg != "opening handshake failed")


class ListeningBroker(Broker):
    """amqtt with our listeners, and frames as large as a packet may be."""

    def __init__(self, settings: BridgeSettings, packet_bytes_max: int, page_port: int) -> None:
        """`start` opens the listeners. `page_port` is where the web page is served, whose console connects here."""
        listeners = {
            "default": {"type": "tcp", "bind": f"{settings.host}:{settings.mqtt_port}"},
            "websocket": {"type": "ws", "bind": f"{settings.host}:{settings.websocket_port}"},
        }
        plugins: dict[str, dict[str, Any]] = {
            f"{AcceptEveryone.__module__}.{AcceptEveryone.__name__}": {}
        }
        super().__init__({"listeners": listeners, "plugins": plugins})
        self._settings, self._page_port = settings, page_port
        self._packet_bytes_max = packet_bytes_max

    async def _create_server_instance(
        self,
        listener_name: str,
        listener_type: ListenerType,
        address: str | None,
        port: int,
        ssl_context: ssl.SSLContext | None,
    ) -> asyncio.Server | websockets.asyncio.server.Server:
        """See amqtt, where a WebSocket frame is at most 1 MiB."""
        if listener_type is not ListenerType.WS:
            return await super()._create_server_instance(
                listener_name, listener_type, address, port, ssl_context
            )
        return await websockets.asyncio.server.serve(
            lambda connection: self.ws_connected(connection, listener_name), address, port,
            subprotocols=[websockets.Subprotocol("mqtt")],  # [MQTT-6.0.0-4]
            max_size=self._packet_bytes_max + FIXED_HEADER_BYTES_MAX,
            process_request=self._refusal, logger=_logger,
        )  # fmt: skip

    def _refusal(
        self, connection: websockets.asyncio.server.ServerConnection, request: Request
    ) -> Response | None:
        """The answer to a request that opens no WebSocket here; None if it may.

        Any web page that a browser of this machine shows can send one; only its Origin and Host tell.
        """
        if "Upgrade" not in request.headers:
            answer = connection.respond(
                HTTPStatus.UPGRADE_REQUIRED, "This is MQTT over WebSocket, not a web page.\n"
            )
            answer.headers["Upgrade"] = "websocket"
            return answer
        origins, allowed = request.headers.get_all("Origin"), self._settings.websocket_origins
        host = request.headers.get("Host", "")
        if any(not origin_allowed(origin, host, allowed, self._page_port) for origin in origins):
            return connection.respond(
                HTTPStatus.FORBIDDEN,
                "Pages of this origin may not connect: [bridge] websocket_origins\n",
            )
        hosts = request.headers.get_all("Host")
        if allowed is None and not all(host_allowed(self._settings.host, host) for host in hosts):
            return connection.respond(
                HTTPStatus.FORBIDDEN, "This listener is for 127.0.0.1 and localhost.\n"
            )
        return None

    async def ws_connected(
        self, websocket: websockets.asyncio.server.ServerConnection, listener_name: str
    ) -> None:
        reader, writer = WebSocketReader(websocket), WebSocketsWriter(websocket)
        await self._client_connected(listener_name, reader, writer)
