"""The ExHook server under test, called through gRPC, with events in memory or in a real Kafka."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import grpc
import msgspec
from google.protobuf.message import Message

from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.calls import Calls
from millpond.pipeline.brokers.emqx.exhook.hooks import Version
from millpond.pipeline.brokers.emqx.exhook.server import HookServer
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import BridgeSettings, KafkaSettings
from millpond.pipeline.stack.ports import HOST
from millpond.pipeline.telemetry.bridge import HookMetrics
from millpond.pipeline.telemetry.tracing import Headers
from millpond.schemas import codec, keys
from millpond.schemas.events import Event
from millpond.schemas.rules import Rules
from tests.support.embedded_bridge import MESSAGE_BYTES_MAX
from tests.support.emqx.trace import Heard, path
from tests.support.workers import PARTITIONS

SECRET = "secret"


class UnspooledProducer(DurableProducer):
    """Sends events to Kafka in the order in which they are entered. It has no spool."""

    complaint: str | None = None

    def __init__(self, producer: Producer) -> None:
        self._kafka = producer
        self._queue: deque[tuple[tuple[Any, ...], asyncio.Future[None]]] = deque()
        self._woken = asyncio.Event()

    def enter(
        self,
        topic: str,
        event: Event,
        partition: int | None = None,
        *,
        hook: str,
        headers: Headers = (),
    ) -> asyncio.Future[None]:
        stored = asyncio.get_running_loop().create_future()
        record = (topic, keys.record_key(event).encode(), codec.encode(event), partition)
        self._queue.append((record, stored))
        self._woken.set()
        return stored

    async def run(self) -> NoReturn:
        while True:
            while self._queue:
                record, stored = self._queue.popleft()
                acknowledged = await self._kafka.send(*record)
                acknowledged.add_done_callback(partial(_answered, stored))
            self._woken.clear()
            await self._woken.wait()


def _answered(stored: asyncio.Future[None], acknowledged: asyncio.Future[Any]) -> None:
    if not stored.done() and not acknowledged.cancelled():
        assert acknowledged.exception() is None, acknowledged.exception()
        stored.set_result(None)


def unary(channel: grpc.aio.Channel, name: str) -> Callable[..., Any]:
    """A gRPC call that takes and returns bytes."""
    method: Callable[..., Any] = channel.unary_unary(name)
    return method


class Provider:
    """A server, and a connection to it like one of EMQX's."""

    def __init__(
        self, server: HookServer, calls: Calls, heard: Heard, port: int, hooks: HookMetrics
    ) -> None:
        self.hooks = hooks
        self.server, self.calls, self.heard, self.port = server, calls, heard, port
        self.address = f"{HOST}:{port}"
        self.channel = grpc.aio.insecure_channel(self.address)

    def method(self, name: str, version: Version = "v2") -> Callable[..., Any]:
        """A gRPC call of the server that takes and returns bytes."""
        return unary(self.channel, path(version, name))

    async def call(self, name: str, request: Message | bytes, version: Version = "v2") -> bytes:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        answer: bytes = await self.method(name, version)(data)
        return answer

    async def publish(self, request: bytes) -> pb.ValuedResponse:
        return pb.ValuedResponse.FromString(await self.call("OnMessagePublish", request))


@contextlib.asynccontextmanager
async def answering(
    durable_producer: DurableProducer,
    rules: Rules,
    mountpoint: Mountpoint | None = None,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Provider]:
    """A server in this process, on a free port unless the settings name one."""
    heard = Heard()
    calls = Calls(
        rules, mountpoint, CopyTopic(SECRET), durable_producer, heard.listener, PARTITIONS
    )
    listen = msgspec.convert({"exhook_listen": f"{HOST}:0", **settings}, BridgeSettings)
    hooks = HookMetrics(calls.refusals.counts)
    server = HookServer(listen, calls, durable_producer, hooks.observe)
    port = await server.start()
    running = asyncio.create_task(server.run())
    provider = Provider(server, calls, heard, port, hooks)
    try:
        yield provider
    finally:
        await provider.channel.close()
        await server.stop(0)
        running.cancel()
        await asyncio.wait((running,))


@contextlib.asynccontextmanager
async def serving(
    bootstrap: str, rules: Rules, mountpoint: Mountpoint | None = None
) -> AsyncIterator[Provider]:
    """The same, with events that go to Kafka. The topics must exist."""
    producer = Producer(
        KafkaSettings(bootstrap_servers=(bootstrap,), message_bytes_max=MESSAGE_BYTES_MAX)
    )
    await producer.start()
    durable_producer = UnspooledProducer(producer)
    running = asyncio.create_task(durable_producer.run())
    try:
        async with answering(durable_producer, rules, mountpoint) as provider:
            yield provider
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await producer.stop()
