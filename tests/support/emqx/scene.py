"""The EMQX double with its REST API, and the parts of a bridge that send requests to it, without Kafka and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.commands.reports import ReportedEvent, Reports
from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.delivery.sender import BulkSender
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.rest.client import RestClient
from millpond.pipeline.clock import now_ms
from millpond.pipeline.settings import BridgeSettings
from millpond.schemas.commands import Command, Deliver, Subscribe, Unsubscribe
from millpond.schemas.events import DeliveriesSent, DeliveryFailed
from millpond.schemas.leases import LeaseName
from tests.support.emqx.broker import MOUNTPOINT, NODE, Client, Emqx, Message, NoHooks
from tests.support.emqx.rest import SECRET, EmqxRest
from tests.support.workers import until

RETURNING = CopyTopic(SECRET)


class ReportsInMemory:
    """An `EventSink` that stores the events of reports in memory."""

    node = NODE

    def __init__(self) -> None:
        self.events: list[ReportedEvent] = []

    async def enter(
        self, event: ReportedEvent, partition: int | None = None
    ) -> asyncio.Future[Any]:
        stored: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.events.append(event)
        stored.set_result(None)
        return stored

    async def enter_alone(self, event: ReportedEvent, partition: int | None = None) -> None:
        self.events.append(event)


class Provider(NoHooks):
    """Routes copies like the bridge's hooks, and passes acknowledgements on to the sender."""

    def __init__(self, copy_topic: CopyTopic) -> None:
        self.sender: BulkSender | None = None
        self.returned: list[str] = []  # message ids of the copies, in the order of their publishes
        self._copy_topic = copy_topic

    async def publish(self, message: Message) -> Message | None:
        if not message.topic.startswith("$millpond/"):
            return message
        returned = self._copy_topic.parse(message.topic)
        if returned is None:
            return None
        self.returned.append(returned.message_id)
        return replace(message, topic=returned.topic)

    async def received(self, name: str, client: Client, message: Message) -> None:
        if name == "MessageAcked" and self.sender is not None:
            self.sender.acked(client.client_id, message.id)

    async def client(self, name: str, client: Client, **what: Any) -> None:
        if name in ("SessionTerminated", "SessionDiscarded") and self.sender is not None:
            self.sender.session_ended(client.client_id)


class Scene:
    """A broker, its REST API, a sender, and what the sender reports."""

    def __init__(self, emqx: Emqx, server: EmqxRest, rest: RestClient, mounted: bool) -> None:
        self.emqx, self.server, self.rest = emqx, server, rest
        self.event_producer = ReportsInMemory()
        self.reports = Reports(self.event_producer)
        mountpoint = Mountpoint(MOUNTPOINT) if mounted else None
        deliveries = Deliveries(NODE, self.reports)
        self.sender = BulkSender(rest, deliveries, RETURNING, mountpoint)
        self.done: list[int] = []  # numbers of the commands that are finished
        self.revoked = False

    # -- commands

    async def take(self, command: Command, *, number: int = 0, valid_for_s: float = 60) -> None:
        lease = None
        if isinstance(command, Deliver) and command.lease:
            lease = LeaseName("queue", 0, number)
        pending = PendingCommand(
            command.client_id, lease, getattr(command, "epoch", 0),
            getattr(command, "message_id", ""), now_ms() + int(valid_for_s * 1000),
            lambda: self.done.append(number), lambda: self.revoked,
        )  # fmt: skip
        await self.sender.take(pending, command)

    async def deliver(
        self, client: str, *numbers: int, valid_for_s: float = 60, **fields: Any
    ) -> None:
        """Command the delivery of copies to a client. Each payload is the copy's number."""
        for number in numbers:
            values: dict[str, Any] = {
                "lease": str(LeaseName("queue", 0, number)), "epoch": 1, "valid_for_s": 60,
                "attempt": 1, "message_id": f"m{number}", "topic": "queue/a", "qos": 1,
                "retain": False, "payload": str(number), **fields,
            }  # fmt: skip
            await self.take(
                Deliver(client_id=client, **values), number=number, valid_for_s=valid_for_s
            )

    async def subscribe(self, client: str, *topic_filters: str, **how: Any) -> None:
        wanted = tuple((topic_filter, 1) for topic_filter in topic_filters)
        await self.take(Subscribe(client_id=client, topic_filters=wanted), **how)

    async def unsubscribe(self, client: str, *topic_filters: str, **how: Any) -> None:
        await self.take(Unsubscribe(client_id=client, topic_filters=topic_filters), **how)

    # -- results

    async def until_done(self, *numbers: int) -> None:
        """Wait until exactly these commands are finished."""

        async def finished() -> bool:
            return len(self.done) >= len(numbers)

        await until(finished, f"{numbers} to be done, not {self.done}")
        assert sorted(self.done) == sorted(numbers)

    def failed(self, reason: str) -> list[str]:
        """The message ids of the copies that failed with this reason."""
        return [
            event.message_id
            for event in self.event_producer.events
            if isinstance(event, DeliveryFailed) and event.reason == reason
        ]

    @property
    def sent(self) -> list[str]:
        """The message ids of the copies that the sender itself reported."""
        return [
            one.message_id
            for event in self.event_producer.events
            if isinstance(event, DeliveriesSent)
            for one in event.sent
        ]


def settings_for(
    server: EmqxRest, directory: Path, *, url: str | None = None, **fields: Any
) -> BridgeSettings:
    key_file = directory / "api-key"
    key_file.write_text(server.key + "\n")
    return BridgeSettings(rest_url=url or server.url, api_key_file=str(key_file), **fields)


@contextlib.asynccontextmanager
async def asking(server: EmqxRest, directory: Path, **fields: Any) -> AsyncIterator[RestClient]:
    """A REST client."""
    rest = RestClient(settings_for(server, directory, **fields))
    await rest.start()
    try:
        yield rest
    finally:
        await rest.stop()


@contextlib.asynccontextmanager
async def playing(directory: Path, *, mounted: bool = True) -> AsyncIterator[Scene]:
    """A scene whose sender runs."""
    provider = Provider(RETURNING)
    emqx = Emqx(provider)
    server = EmqxRest(emqx)
    await server.start()
    async with asking(server, directory) as rest:
        scene = Scene(emqx, server, rest, mounted)
        provider.sender = scene.sender
        working = [
            asyncio.create_task(scene.sender.run()),
            asyncio.create_task(scene.reports.run()),
        ]
        try:
            yield scene
            assert not any(task.done() for task in working), "the sender ended"
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            emqx.stop()
            await server.stop()
