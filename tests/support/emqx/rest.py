"""The REST API of the EMQX double (`/api/v5`): every documented answer, and faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
import math
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from aiohttp import web

from millpond.pipeline.clock import now_ms
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.schemas.topics import topic_name_error
from tests.support.emqx.broker import NODE, Client, Emqx, Message, message_id

KEY, SECRET = "millpond-key", "s3cr3t-of-the-tests"
NOT_FOUND = {"code": "CLIENTID_NOT_FOUND", "message": "Client ID not found"}


@dataclass
class Fault:
    """A fault of the next requests whose path begins with `path`.

    `lost`: EMQX does what is requested, and the connection is cut. `cut`: EMQX does nothing, and the connection is cut.
    `hang`: no answer. A number: an answer with that status.
    """

    path: str
    kind: Literal["lost", "cut", "hang"] | int
    times: float = math.inf
    body: bytes = b'{"code":"INTERNAL_ERROR","message":"out of order"}'
    seen: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)


class EmqxRest:
    """Serves one broker on a free port. It can be stopped and started again at the same port."""

    def __init__(self, emqx: Emqx) -> None:
        self.emqx, self.port = emqx, free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.key = f"{KEY}:{SECRET}"
        self.faults: list[Fault] = []
        self.bulks: list[list[dict[str, Any]]] = []  # the bulk publishes
        self.asked: list[str] = []  # method and path of each request
        # Payloads that match a subscriber, but cannot be handed over (503).
        self.undelivered: set[bytes] = set()
        self._runner: web.AppRunner | None = None

    # -- stopped and started

    async def start(self) -> None:
        app = web.Application(middlewares=[self._guard], client_max_size=64 << 20)
        app.add_routes([
            web.post("/api/v5/publish/bulk", self._publish_bulk),
            web.post("/api/v5/publish", self._publish),
            web.post("/api/v5/clients/{id}/subscribe/bulk", self._subscribe),
            web.post("/api/v5/clients/{id}/unsubscribe/bulk", self._unsubscribe),
            web.get("/api/v5/clients", self._clients),
            web.get("/api/v5/subscriptions", self._subscriptions),
            web.get("/api/v5/nodes", self._nodes),
            web.get("/api/v5/mqtt/retainer/message/{topic}", self._retained),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self.port, reuse_address=True).start()

    async def stop(self) -> None:
        """Refuse connections from now on."""
        if self._runner is not None:
            for fault in self.faults:
                fault.released.set()
            await self._runner.cleanup()
            self._runner = None

    def fault(self, path: str, kind: Any, times: float = math.inf, **how: Any) -> Fault:
        self.faults.append(Fault("/api/v5" + path, kind, times, **how))
        return self.faults[-1]

    def heal(self) -> None:
        for fault in self.faults:
            fault.released.set()
        self.faults.clear()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        fault = next(
            (each for each in self.faults if each.times > 0 and request.path.startswith(each.path)),
            None,
        )
        if fault is not None:
            fault.times -= 1
            fault.seen += 1
            if isinstance(fault.kind, int):
                return web.Response(
                    status=fault.kind, body=fault.body, content_type="application/json"
                )
            if fault.kind == "hang":
                await fault.released.wait()
            if fault.kind == "lost":
                await handler(request)
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if request.headers.get("Authorization") != "Basic " + b64encode(self.key.encode()).decode():
            return web.json_response(
                {"code": "BAD_API_KEY_OR_SECRET", "message": "Check api_key/api_secret"}, status=401
            )
        answer: web.StreamResponse = await handler(request)
        return answer

    # -- publish

    async def _publish(self, request: web.Request) -> web.Response:
        message = self._message(await request.json())
        if isinstance(message, web.Response):
            return message
        status, body = await self._published(message)
        return web.json_response(body, status=status)

    async def _publish_bulk(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.bulks.append(asked)
        messages = [self._message(each) for each in asked]
        for message in messages:
            if isinstance(message, web.Response):
                return message  # nothing of it is published
        results = [await self._published(each) for each in messages if isinstance(each, Message)]
        statuses = {status for status, _ in results}
        status = 503 if 503 in statuses else 202 if 202 in statuses else 200
        return web.json_response([body for _, body in results], status=status)

    def _message(self, asked: dict[str, Any]) -> Message | web.Response:
        if topic_name_error(asked["topic"]) is not None:
            return web.json_response(
                {"reason_code": 144, "message": "topic_name_invalid"}, status=400
            )
        payload = asked["payload"].encode()
        if asked.get("payload_encoding", "plain") == "base64":
            try:
                payload = b64decode(payload, validate=True)
            except Base64Error:
                return web.json_response(
                    {"code": "BAD_REQUEST", "message": "decode_base64_payload_failed"}, status=400
                )
        expiry_s = asked.get("properties", {}).get("message_expiry_interval")
        at = now_ms()
        return Message(
            message_id(), asked["topic"], payload, asked.get("qos", 0), "http_api", at,
            retain=asked.get("retain", False),
            expires_at=None if expiry_s is None else at + expiry_s * 1000,
        )  # fmt: skip

    async def _published(self, message: Message) -> tuple[int, dict[str, Any]]:
        if message.payload in self.undelivered:
            return 503, {"reason_code": 131, "message": "failed_to_dispatch"}
        if await self.emqx.publish(message):
            return 200, {"id": message.id}
        return 202, {"reason_code": 16, "message": "no_matching_subscribers"}

    # -- clients and subscriptions

    def _client(self, request: web.Request) -> Client | None:
        session = self.emqx.sessions.get(request.match_info["id"])
        return None if session is None else session.client or self.emqx.last(session.client_id)

    async def _subscribe(self, request: web.Request) -> web.Response:
        client = self._client(request)
        if client is None:
            return web.json_response(NOT_FOUND, status=404)
        granted = []
        for each in await request.json():
            await self.emqx.subscribe(client, each["topic"], each.get("qos", 0), each.get("rh", 0))
            granted.append({"clientid": client.client_id, "node": NODE, **each})
        return web.json_response(granted)

    async def _unsubscribe(self, request: web.Request) -> web.Response:
        client = self._client(request)
        if client is None:
            return web.json_response(NOT_FOUND, status=404)
        for each in await request.json():
            await self.emqx.unsubscribe(client, each["topic"])
        return web.Response(status=204)

    async def _clients(self, request: web.Request) -> web.Response:
        rows = [
            _row(session.client or self.emqx.last(session.client_id), session.client is not None)
            for session in self.emqx.sessions.values()
        ]
        return _page(request, rows)

    async def _subscriptions(self, request: web.Request) -> web.Response:
        rows = [
            {
                "clientid": session.client_id,
                "node": NODE,
                "topic": topic,
                "durable": False,
                **options,
            }
            for session in self.emqx.sessions.values()
            for topic, options in session.subscriptions.items()
        ]
        return _page(request, rows)

    async def _nodes(self, request: web.Request) -> web.Response:
        return web.json_response([
            {"node": node, "node_status": status, "uptime": now_ms() - self.emqx.started_at,
             "version": "5.5.1", "edition": "Opensource", "connections": len(self.emqx.sessions)}
            for node, status in self.emqx.nodes.items()
        ])  # fmt: skip

    async def _retained(self, request: web.Request) -> web.Response:
        message = self.emqx.retained.get(request.match_info["topic"])
        if message is None:
            return web.json_response(
                {"code": "NOT_FOUND", "message": "Viewed message doesn't exist"}, status=404
            )
        return web.json_response({
            "msgid": message.id, "topic": message.topic, "qos": message.qos,
            "publish_at": _rfc3339(message.timestamp), "from_clientid": message.sender,
            "from_username": message.headers.get("username", ""),
            **({"payload": b64encode(message.payload).decode()} if len(message.payload) <= 1 << 20 else {}),
        })  # fmt: skip


def _row(client: Client, connected: bool) -> dict[str, Any]:
    return {
        "clientid": client.client_id, "username": client.username, "node": NODE,
        "ip_address": client.peerhost, "port": client.port, "connected": connected,
        "connected_at": _rfc3339(client.connected_at), "created_at": _rfc3339(client.connected_at),
        "clean_start": client.clean_start, "expiry_interval": client.expiry_s,
        "mountpoint": client.mountpoint or None, "listener": client.listener, "keepalive": 60,
        "proto_name": "MQTT", "proto_ver": 5, "is_bridge": False, "is_expired": False,
        "mqueue_max": 1000, "inflight_max": 32, "subscriptions_max": "infinity", "durable": False,
    }  # fmt: skip


def _page(request: web.Request, rows: list[dict[str, Any]]) -> web.Response:
    page, limit = int(request.query.get("page", 1)), int(request.query.get("limit", 100))
    if not 1 <= limit <= 10_000:
        return web.json_response(
            {"code": "INVALID_PARAMETER", "message": "page_limit_invalid"}, status=400
        )
    start = (page - 1) * limit
    meta = {"page": page, "limit": limit, "count": len(rows), "hasnext": start + limit < len(rows)}
    return web.json_response({"data": rows[start : start + limit], "meta": meta})


def _rfc3339(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")


@contextlib.asynccontextmanager
async def serving(emqx: Emqx) -> AsyncIterator[EmqxRest]:
    """The REST API of a broker."""
    rest = EmqxRest(emqx)
    await rest.start()
    try:
        yield rest
    finally:
        await rest.stop()
