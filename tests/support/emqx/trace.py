"""EMQX's side of ExHook for tests: its requests, the trace of a real EMQX, and doubles of what is behind the hooks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from google.protobuf import json_format
from google.protobuf.message import Message

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.calls import CallListener
from millpond.pipeline.brokers.emqx.exhook.hooks import Version
from millpond.pipeline.brokers.emqx.exhook.server import service_name
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer, NotStored
from millpond.pipeline.telemetry.tracing import Headers
from millpond.schemas.events import Event, MessagePublished

TRACE: Final = Path(__file__).parents[2] / "fixtures" / "emqx-5.5.1-exhook.jsonl"
NODE: Final = "emqx@127.0.0.1"
SERVICE: Final = pb.DESCRIPTOR.services_by_name["HookProvider"]
OF_EMQX_4: Final = {
    "OnSessionTakenover": "OnSessionTakeovered",
    "OnClientAuthorize": "OnClientCheckAcl",
}


class Call(NamedTuple):
    number: int
    name: str
    request: Message


def trace() -> Iterator[Call]:
    """Every call of one session of a real EMQX 5.5.1, in order."""
    for line in TRACE.read_text().splitlines():
        call = json.loads(line)
        yield Call(call["seq"], call["call"], parsed(call["call"], call["req"]))


def parsed(name: str, request: dict[str, Any]) -> Message:
    """Parse a request that is written as JSON."""
    kind = getattr(pb, SERVICE.methods_by_name[name].input_type.name)
    message: Message = json_format.ParseDict(request, kind())
    return message


def path(version: Version, name: str) -> str:
    """The gRPC path of a call, as a version of EMQX names it."""
    if version == "v1":
        name = OF_EMQX_4.get(name, name)
    return f"/{service_name(version)}/{name}"


def a_client(client_id: str = "c2", **fields: Any) -> pb.ClientInfo:
    values = {
        "node": NODE, "username": "u", "password": "p", "peerhost": "127.0.0.1", "peerport": 40112,
        "sockport": 1883, "protocol": "mqtt", "anonymous": True, **fields,
    }  # fmt: skip
    return pb.ClientInfo(clientid=client_id, **values)


def a_message(topic: str = "t", message_id: str = "m1", **fields: Any) -> pb.Message:
    values: dict[str, Any] = {
        "node": NODE, "qos": 1, "from_client_id": "pub", "payload": b"hello",
        "timestamp": 1_700_000_000_000, **fields,
    }  # fmt: skip
    return pb.Message(topic=topic, id=message_id, **values)


def a_publish(topic: str = "t", message_id: str = "m1", **fields: Any) -> bytes:
    message = a_message(topic, message_id, **fields)
    return pb.MessagePublishRequest(message=message).SerializeToString()


class EnteredEvent(NamedTuple):
    topic: str
    event: Event
    partition: int | None
    hook: str


class InMemoryProducer(DurableProducer):
    """Stores events in memory: at once, unless it is `paused`. It refuses all events while it has a `complaint`."""

    complaint: str | None = None

    def __init__(self) -> None:
        """The parts of a real one are missing: only `enter` and `complaint` work."""
        self.records: list[EnteredEvent] = []
        self.paused = False
        self.futures: list[asyncio.Future[None]] = []

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
        self.futures.append(stored)
        if self.complaint is not None:
            stored.set_exception(NotStored("full", self.complaint))
            stored.exception()
            return stored
        self.records.append(EnteredEvent(topic, event, partition, hook))
        if not self.paused:
            stored.set_result(None)
        return stored

    @property
    def events(self) -> list[Event]:
        return [each.event for each in self.records]


class Heard:
    """Records the calls of a `CallListener`."""

    def __init__(self) -> None:
        self.listener = CallListener(
            self.provider_loaded, self.acked, self.session_ended, self.retainable
        )
        self.loaded: list[str] = []
        self.acks: list[tuple[str, str]] = []
        self.retained: list[tuple[str, MessagePublished]] = []
        self.ended: list[str] = []

    def provider_loaded(self, node: str) -> None:
        self.loaded.append(node)

    def acked(self, client_id: str, message_id: str) -> None:
        self.acks.append((client_id, message_id))

    def session_ended(self, client_id: str) -> None:
        self.ended.append(client_id)

    def retainable(self, topic: str, event: MessagePublished) -> None:
        self.retained.append((topic, event))
