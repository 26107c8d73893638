"""The ExHook server under test: real gRPC, and what it writes to a real Kafka."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import grpc
import msgspec
from google.protobuf.message import Message

from millpond.pipeline.brokers.emqx.delivery.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.calls import Calls
from millpond.pipeline.brokers.emqx.exhook.hooks import Version
from millpond.pipeline.brokers.emqx.exhook.server import HookServer
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.ports import Keeping
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import BridgeSettings
from millpond.pipeline.stack.ports import HOST
from millpond.pipeline.telemetry.bridge import HookMetrics
from millpond.schemas import codec, keys
from millpond.schemas.events import Event
from millpond.schemas.rules import Rules
from tests.support.embedded_bridge import MESSAGE_BYTES_MAX
from tests.support.emqx.trace import Heard, path
from tests.support.workers import PARTITIONS

SECRET = "secret"


class KafkaInlet:
    """Events go to Kafka in the order in which they are entered; nothing is spooled."""

    complaint: str | None = None

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._queue: deque[tuple[tuple[Any, ...], asyncio.Future[None]]] = deque()
        self._woken = asyncio.Event()

    def enter(
        self,
        topic: str,
        event: Event,
        partition: int | None = None,
        *,
        hook: str,
        headers: tuple[tuple[str, bytes], ...] = (),
    ) -> asyncio.Future[None]:
        kept = asyncio.get_running_loop().create_future()
        record = (topic, keys.record_key(event).encode(), codec.encode(event), partition)
        self._queue.append((record, kept))
        self._woken.set()
        return kept

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            while self._queue:
                record, kept = self._queue.popleft()
                acknowledged = await self._producer.send(*record)
                acknowledged.add_done_callback(partial(_answered, kept))
            self._woken.clear()
            await self._woken.wait()


def _answered(kept: asyncio.Future[None], acknowledged: asyncio.Future[Any]) -> None:
    if not kept.done() and not acknowledged.cancelled():
        assert acknowledged.exception() is None, acknowledged.exception()
        kept.set_result(None)


def unary(channel: grpc.aio.Channel, name: str) -> Callable[..., Any]:
    """A call of bytes, answered with bytes."""
    method: Callable[..., Any] = channel.unary_unary(name)
    return method


class Provider:
    """A server, and a connection to it as EMQX's."""

    def __init__(
        self, server: HookServer, calls: Calls, heard: Heard, port: int, hooks: HookMetrics
    ) -> None:
        self.hooks = hooks
        self.server, self.calls, self.heard, self.port = server, calls, heard, port
        self.address = f"{HOST}:{port}"
        self.channel = grpc.aio.insecure_channel(self.address)

    def method(self, name: str, version: Version = "v2") -> Callable[..., Any]:
        """A call of bytes, answered with bytes."""
        return unary(self.channel, path(version, name))

    async def call(self, name: str, request: Message | bytes, version: Version = "v2") -> bytes:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        answer: bytes = await self.method(name, version)(data)
        return answer

    async def publish(self, request: bytes) -> pb.ValuedResponse:
        return pb.ValuedResponse.FromString(await self.call("OnMessagePublish", request))


@contextlib.asynccontextmanager
async def answering(
    durable_producer: Keeping,
    rules: Rules,
    mountpoint: Mountpoint | None = None,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Provider]:
    """A server of this process, on a free port unless the settings say otherwise."""
    heard = Heard()
    calls = Calls(rules, mountpoint, CopyTopic(SECRET), durable_producer, heard, PARTITIONS)
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
    """The same, and what it enters comes into Kafka, whose topics are there."""
    producer = Producer({"bootstrap_servers": [bootstrap]}, MESSAGE_BYTES_MAX)
    await producer.start()
    durable_producer = KafkaInlet(producer)
    running = asyncio.create_task(durable_producer.run())
    try:
        async with answering(durable_producer, rules, mountpoint) as provider:
            yield provider
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await producer.stop()
