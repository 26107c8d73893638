"""Where the embedded broker listens: TCP and WebSocket, for everybody."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Final

import websockets
import websockets.asyncio.server
from amqtt.adapters import WebSocketsWriter
from amqtt.broker import Broker
from amqtt.contexts import ListenerType

from millpond.pipeline.brokers.embedded.access import AcceptEveryone
from millpond.pipeline.brokers.embedded.wire import WebSocketReader
from millpond.pipeline.settings import BridgeSettings

FIXED_HEADER_BYTES_MAX: Final = 5


class ListeningBroker(Broker):
    """amqtt with our listeners, and frames as large as a packet may be."""

    def __init__(self, settings: BridgeSettings, packet_bytes_max: int) -> None:
        """`start` opens the listeners."""
        listeners = {
            "default": {"type": "tcp", "bind": f"{settings.host}:{settings.mqtt_port}"},
            "websocket": {"type": "ws", "bind": f"{settings.host}:{settings.websocket_port}"},
        }
        plugins: dict[str, dict[str, Any]] = {
            f"{AcceptEveryone.__module__}.{AcceptEveryone.__name__}": {}
        }
        super().__init__({"listeners": listeners, "plugins": plugins})
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
        )  # fmt: skip

    async def ws_connected(
        self, websocket: websockets.asyncio.server.ServerConnection, listener_name: str
    ) -> None:
        reader, writer = WebSocketReader(websocket), WebSocketsWriter(websocket)
        await self._client_connected(listener_name, reader, writer)
