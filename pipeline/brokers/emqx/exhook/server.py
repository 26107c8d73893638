"""The gRPC server that EMQX's ExHook calls: ports, TLS, health, and the way of bytes to `calls.py` and back."""

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
from millpond.pipeline.brokers.emqx.ports import Keeping
from millpond.pipeline.settings import PORT_MAX, BridgeSettings
from millpond.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

REQUEST_BYTES_MAX: Final = (
    32 * 1024 * 1024
)  # a larger payload than Kafka takes is still refused properly
# Calls that wait for this process to take them. Beyond 1,000 gRPC would cancel some, and EMQX count that as answered; it
# waits itself, with one call for each client.
PENDING_MAX: Final = 1_000_000
HEALTH_INTERVAL_S: Final = 0.25  # how late it may be noticed that events are refused
STOP_GRACE_S: Final = 5.0  # EMQX does not wait longer for an answer, by default

HandleCall: TypeAlias = Callable[[bytes], bytes]
# The name of a call, how long its answer took, and which it was.
Observe: TypeAlias = Callable[[str, float, str], None]
GrpcHandler: TypeAlias = Callable[[bytes, Any], Awaitable[bytes]]

# Of EMQX 4, whose names for these differ.
RENAMED: Final = {
    "OnSessionTakeovered": "OnSessionTakenover",
    "OnClientCheckAcl": "OnClientAuthorize",
}


def service_name(version: Version) -> str:
    """The service under which a version of EMQX calls."""
    return f"emqx.exhook.{version}.HookProvider"


class HookServer:
    """One per bridge process; several may share a port, and a client's calls stay with one of them."""

    def __init__(
        self, settings: BridgeSettings, calls: Calls, durable_producer: Keeping, observe: Observe
    ) -> None:
        """Nothing is opened before `start`. `observe` hears of every call that was answered."""
        self._observe = observe
        self._settings, self._calls, self._durable_producer = settings, calls, durable_producer
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._serving: bool | None = None

    async def start(self) -> int:
        """Listen; the port.

        Raises:
            ConfigError: a file cannot be read, or the address is in use or not ours.
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
        await self._tell_health()
        return port

    def _listen(self, server: grpc.aio.Server) -> int:
        address, credentials = self._settings.exhook_listen, _credentials(self._settings)
        port = int(address.rpartition(":")[2])
        if port > PORT_MAX:  # gRPC would take what is left of it in 16 bits
            raise ConfigError(f"[bridge] exhook_listen: there is no port {port}")
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"[bridge] exhook_listen: cannot listen at {address}") from error

    async def run(self) -> NoReturn:
        """Keep the health service right, until cancelled."""
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            await self._tell_health()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Take no more calls, and finish those in hand, if that takes no longer than `grace_s`."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)

    async def _tell_health(self) -> None:
        complaint = self._durable_producer.complaint
        serving = complaint is None
        if serving == self._serving:
            return
        self._serving = serving
        if serving:
            logger.info("ready for hook calls")
        else:
            logger.error("publishes are refused: %s", complaint)
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
            "OnClientAuthenticate": partial(calls.judged, pb.ClientAuthenticateRequest),
            "OnClientAuthorize": partial(calls.judged, pb.ClientAuthorizeRequest),
        }
        for name, told in calls.told().items():
            handles[name] = partial(calls.tell, name, told)
        for method in pb.DESCRIPTOR.services_by_name["HookProvider"].methods:
            handles.setdefault(method.name, _unasked)
        if version == "v1":
            handles.update({old: handles[new] for old, new in RENAMED.items()})
        named = {name: self._handler(name, handle) for name, handle in handles.items()}
        named["OnMessagePublish"] = self._publish
        # Without (de)serializers: requests are parsed where what is wrong with them is counted.
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
        self._calls.refusals.add("malformed", f"{name}: not the message that it should be")
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not the message that it should be")


def _unasked(data: bytes) -> bytes:
    """A hook that is not registered."""
    return EMPTY


def _credentials(settings: BridgeSettings) -> grpc.ServerCredentials | None:
    """TLS, and of clients a certificate, as the settings say; None without."""
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
