"""The hooks of the EMQX double through gRPC, like EMQX: a pool of connections, all calls of a client on one of them."""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import Message as ProtobufMessage

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.hooks import Version
from millpond.pipeline.stack.ports import HOST
from millpond.schemas.topics import matches
from tests.support.emqx.broker import NODE, Client, Message
from tests.support.emqx.trace import path
from tests.support.workers import until

POOL_SIZE = 8
REQUEST_TIMEOUT_S = 5.0
# The hook of each call, as a provider registers it.
HOOKS = {
    "OnClientConnected": "client.connected", "OnClientDisconnected": "client.disconnected",
    "OnSessionCreated": "session.created", "OnSessionResumed": "session.resumed",
    "OnSessionDiscarded": "session.discarded", "OnSessionTakenover": "session.takenover",
    "OnSessionTerminated": "session.terminated", "OnSessionSubscribed": "session.subscribed",
    "OnSessionUnsubscribed": "session.unsubscribed", "OnMessagePublish": "message.publish",
    "OnMessageDelivered": "message.delivered", "OnMessageAcked": "message.acked",
}  # fmt: skip


class GrpcHooks:
    """Calls the provider at a port. A call without an answer counts as a success, as in EMQX."""

    def __init__(self, port: int, version: Version = "v2", started_at: int = 0) -> None:
        self._version: Version = version
        self._started_at = started_at
        self._channels = [
            grpc.aio.insecure_channel(
                f"{HOST}:{port}",
                options=[
                    ("grpc.use_local_subchannel_pool", 1),  # or all would be one connection
                    ("grpc.initial_reconnect_backoff_ms", 100),
                    ("grpc.min_reconnect_backoff_ms", 100),
                    ("grpc.max_reconnect_backoff_ms", 200),
                ],
            )
            for _ in range(POOL_SIZE)
        ]
        self.registered: dict[str, tuple[str, ...]] = {}
        self.unanswered: Counter[str] = Counter()

    async def load(self) -> None:
        """Ask which hooks to call. Retries while the provider starts."""

        async def answered() -> bool:
            request = pb.ProviderLoadedRequest(meta=pb.RequestMeta(node=NODE, version="5.5.1"))
            answer = await self._call("OnProviderLoaded", request, NODE)
            if answer is not None:
                loaded = pb.LoadedResponse.FromString(answer)
                self.registered = {hook.name: tuple(hook.topics) for hook in loaded.hooks}
            return answer is not None

        await until(answered, "a provider of hooks")

    async def connected(self) -> None:
        """Wait until every connection is open."""
        for channel in self._channels:
            await channel.channel_ready()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def _call(self, name: str, request: ProtobufMessage, of: str) -> bytes | None:
        channel = self._channels[zlib.crc32(of.encode()) % POOL_SIZE]
        method: Any = channel.unary_unary(path(self._version, name))
        try:
            answer: bytes = await method(request.SerializeToString(), timeout=REQUEST_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            self.unanswered[name] += 1
            return None
        return answer

    def _wanted(self, name: str, topic: str | None = None) -> bool:
        filters = self.registered.get(HOOKS[name])
        if filters is None:
            return False
        return not filters or topic is None or any(matches(each, topic) for each in filters)

    # -- see `tests.support.emqx.broker.Hooks`

    async def client(self, name: str, client: Client, **what: Any) -> None:
        if not self._wanted("On" + name):
            return
        kind = getattr(pb, name + "Request")
        if "qos" in what:
            what["subopts"] = pb.SubOpts(qos=what.pop("qos"), rh=what.pop("rh", 0))
        request = kind(clientinfo=_info(client), meta=_meta(), **what)
        await self._call("On" + name, request, client.client_id)

    async def publish(self, message: Message) -> Message | None:
        if not self._wanted("OnMessagePublish", message.topic):
            return message
        request = pb.MessagePublishRequest(message=_told(message), meta=_meta())
        answer = await self._call("OnMessagePublish", request, message.sender)
        if answer is None:
            return message
        valued = pb.ValuedResponse.FromString(answer)
        if valued.type == pb.ValuedResponse.IGNORE or not valued.HasField("message"):
            return message
        changed = valued.message
        if changed.headers.get("allow_publish") == "false":
            return None
        return replace(message, topic=changed.topic, payload=changed.payload, qos=changed.qos)

    async def received(self, name: str, client: Client, message: Message) -> None:
        if not self._wanted("On" + name, message.topic):
            return
        kind = getattr(pb, name + "Request")
        request = kind(clientinfo=_info(client), message=_told(message), meta=_meta())
        await self._call("On" + name, request, client.client_id)


def _meta() -> pb.RequestMeta:
    return pb.RequestMeta(node=NODE, version="5.5.1", sysdescr="EMQX", cluster_name="emqxcl")


def _info(client: Client) -> pb.ClientInfo:
    return pb.ClientInfo(
        node=NODE, clientid=client.client_id, username=client.username or "",
        peerhost=client.peerhost, peerport=client.port, sockport=1883, protocol="mqtt",
        mountpoint=client.mountpoint, anonymous=True,
    )  # fmt: skip


def _told(message: Message) -> pb.Message:
    return pb.Message(
        node=NODE, id=message.id, qos=message.qos, from_client_id=message.sender,
        topic=message.topic, payload=message.payload, timestamp=message.timestamp,
        headers=message.headers,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def calling(port: int, version: Version = "v2") -> AsyncIterator[GrpcHooks]:
    """The connections of a broker to a provider."""
    hooks = GrpcHooks(port, version)
    try:
        yield hooks
    finally:
        await hooks.close()
