"""The gRPC server that EMQX's ExHook calls: port, TLS, health, and the dispatch of calls to `calls.py`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias, get_args

import grpc
from google.protobuf.message import DecodeError as NotProtobuf
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.calls import EMPTY, Calls
from millpond.pipeline.brokers.emqx.exhook.hooks import Version
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.settings import PORT_MAX, BridgeSettings
from millpond.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

# Far above Kafka's limit: a payload that is too large for Kafka still gets a refusal, with its reason.
REQUEST_BYTES_MAX: Final = 32 * 1024 * 1024
# Calls that wait for this process. By default gRPC would cancel some beyond 1,000, and EMQX takes that for a success.
# EMQX limits them itself: it has one call under way for each client.
PENDING_MAX: Final = 1_000_000
HEALTH_INTERVAL_S: Final = 0.25  # the delay with which the health service notices refusals, at most
STOP_GRACE_S: Final = 5.0  # by default EMQX does not wait longer for an answer

HandleCall: TypeAlias = Callable[[bytes], bytes]
# Name of the call, seconds until its answer, outcome: "answered" or "malformed".
Observe: TypeAlias = Callable[[str, float, str], None]
GrpcHandler: TypeAlias = Callable[[bytes, Any], Awaitable[bytes]]

# Calls that have another name in EMQX 4.
RENAMED: Final = {
    "OnSessionTakeovered": "OnSessionTakenover",
    "OnClientCheckAcl": "OnClientAuthorize",
}


def service_name(version: Version) -> str:
    """The gRPC service that a version of EMQX calls."""
    return f"emqx.exhook.{version}.HookProvider"


class HookServer:
    """One per bridge process. Several share a port (SO_REUSEPORT); each connection of EMQX stays with one of them."""

    def __init__(
        self,
        settings: BridgeSettings,
        calls: Calls,
        durable_producer: DurableProducer,
        observe: Observe,
    ) -> None:
        """Call `observe` after every call."""
        self._observe = observe
        self._settings, self._calls, self._durable_producer = settings, calls, durable_producer
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        # What the health service reports; None before the first report.
        self._serving: bool | None = None

    async def start(self) -> int:
        """Listen. Returns the port.

        Raises:
            ConfigError: a file cannot be read, or the address is in use or not of this host.
        """
        options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
            ("grpc.max_send_message_length", -1),
            ("grpc.server.max_pending_requests", PENDING_MAX),
            ("grpc.server.max_pending_requests_hard_limit", PENDING_MAX),
        ]
        server = grpc.aio.server(options=options)
        for version in get_args(Version):
            handlers = self._handlers(version)
            generic = grpc.method_handlers_generic_handler(service_name(version), handlers)
            server.add_generic_rpc_handlers((generic,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        port = self._listen(server)
        await server.start()
        self._server = server
        await self._report_health()
        return port

    def _listen(self, server: grpc.aio.Server) -> int:
        address, credentials = self._settings.exhook_listen, _credentials(self._settings)
        port = int(address.rpartition(":")[2])
        # gRPC would use the lower 16 bits of a larger number.
        if port > PORT_MAX:
            raise ConfigError(f"[bridge] exhook_listen: there is no port {port}")
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"[bridge] exhook_listen: cannot listen at {address}") from error

    async def run(self) -> NoReturn:
        """Report health until cancelled."""
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            await self._report_health()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Accept no more calls, and wait up to `grace_s` for the running ones."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)

    async def _report_health(self) -> None:
        complaint = self._durable_producer.complaint
        serving = complaint is None
        if serving == self._serving:
            return
        self._serving = serving
        if serving:
            logger.info("the bridge stores publishes: health is SERVING")
        else:
            logger.error("the bridge refuses publishes, health is NOT_SERVING: %s", complaint)
        status = health_pb2.HealthCheckResponse
        for name in ("", *(service_name(version) for version in get_args(Version))):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    # -- calls

    def _handlers(self, version: Version) -> dict[str, Any]:
        calls = self._calls
        handles: dict[str, HandleCall] = {
            "OnProviderLoaded": partial(calls.provider_loaded, version=version),
            "OnProviderUnloaded": calls.provider_unloaded,
            "OnMessageAcked": calls.acked,
            "OnClientAuthenticate": partial(calls.access_checked, pb.ClientAuthenticateRequest),
            "OnClientAuthorize": partial(calls.access_checked, pb.ClientAuthorizeRequest),
        }
        for name, notification in calls.notifications().items():
            handles[name] = partial(calls.notify, name, notification)
        for method in pb.DESCRIPTOR.services_by_name["HookProvider"].methods:
            handles.setdefault(method.name, _not_registered)
        if version == "v1":
            handles.update({old: handles[new] for old, new in RENAMED.items()})
        named = {name: self._handler(name, handle) for name, handle in handles.items()}
        named["OnMessagePublish"] = self._publish
        # No (de)serializers: requests are parsed in `calls.py`, so that malformed ones are counted.
        return {name: grpc.unary_unary_rpc_method_handler(each) for name, each in named.items()}

    def _handler(self, name: str, handle: HandleCall) -> GrpcHandler:
        async def call(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            began = time.perf_counter()
            try:
                answer = handle(data)
            except NotProtobuf:
                await self._malformed(name, context)
            self._observe(name, time.perf_counter() - began, "answered")
            return answer

        return call

    async def _publish(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        began = time.perf_counter()
        try:
            answer = await self._calls.publish(data)
        except NotProtobuf:
            await self._malformed("OnMessagePublish", context)
        self._observe("OnMessagePublish", time.perf_counter() - began, "answered")
        return answer

    async def _malformed(
        self, name: str, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> NoReturn:
        self._observe(name, 0.0, "malformed")
        self._calls.refusals.add("malformed", f"{name}: the request is not a protobuf of its type")
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, "the request is not a protobuf of its type"
        )


def _not_registered(data: bytes) -> bytes:
    return EMPTY


def _credentials(settings: BridgeSettings) -> grpc.ServerCredentials | None:
    """The TLS credentials of the settings; None without TLS. With `client_ca_file` clients need a certificate."""
    files = (settings.certificate_file, settings.key_file)
    if files == (None, None) and settings.client_ca_file is None:
        return None
    if settings.certificate_file is None or settings.key_file is None:
        raise ConfigError("[bridge] TLS needs both certificate_file and key_file")
    authority = None
    if settings.client_ca_file is not None:
        authority = _read(settings.client_ca_file, "client_ca_file")
    pair = (
        _read(settings.key_file, "key_file"),
        _read(settings.certificate_file, "certificate_file"),
    )
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authority, require_client_auth=authority is not None
    )


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"[bridge] {setting}: {error}") from error
