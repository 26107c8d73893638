"""The interface through which the contract of bridges uses a bridge and its broker, embedded or EMQX."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path

from millpond.schemas.events import DeliveriesSent, DeliveryFailed, MessageAcked, Sent
from tests.support import mqtt
from tests.support.bridge_commands import Commands, commanding
from tests.support.embedded_bridge import Bridge, Log, reading
from tests.support.emqx import broker
from tests.support.emqx.world import EmqxWorld, a_world
from tests.support.mqtt import PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, delivered


class Client(ABC):
    """One connection of a client that Millpond delivers to."""

    client_id: str

    @abstractmethod
    async def subscribe(self, topic_filter: str, qos: int = 1) -> None: ...

    @abstractmethod
    async def unsubscribe(self, topic_filter: str) -> None: ...

    @abstractmethod
    async def publish(self, topic: str, payload: bytes, qos: int = 1) -> None:
        """Publish, and wait for the acknowledgement if the QoS has one."""

    @abstractmethod
    async def copies(self, count: int) -> list[tuple[str, bytes]]:
        """Topic and payload of the next copies. Each is acknowledged, unless the client answers nothing by itself."""

    @abstractmethod
    async def ack(self, payload: bytes) -> None:
        """Acknowledge a copy that came and was not acknowledged."""

    @abstractmethod
    async def disconnect(self) -> None: ...


class Played(ABC):
    """One kind of broker with its bridge. `log` has what the bridge writes from now on."""

    log: Log
    commands: Commands

    @abstractmethod
    async def connect(
        self, client_id: str, *, clean: bool = True, answers: bool = True
    ) -> Client: ...

    # -- what the bridge reports of copies

    def sent(self, client_id: str) -> list[Sent]:
        events = (record.event for record in self.log.records)
        reports = [event for event in events if isinstance(event, DeliveriesSent)]
        return [each for event in reports for each in event.sent if each.client_id == client_id]

    def failed(self, client_id: str) -> list[tuple[str, str]]:
        events = [record.event for record in self.log.records]
        return [
            (event.message_id, event.reason)
            for event in events
            if isinstance(event, DeliveryFailed) and event.client_id == client_id
        ]

    def acked(self, client_id: str) -> list[str]:
        """The ids of the acknowledged messages. Aliases of copies are replaced by them."""
        names = {each.alias: each.message_id for each in self.sent(client_id)}
        events = [record.event for record in self.log.records]
        acks = [
            event for event in events if isinstance(event, MessageAcked) and event.client_id == client_id
        ]  # fmt: skip
        return [names.get(event.message_id, event.message_id) for event in acks]


# -- embedded


class EmbeddedClient(Client):
    def __init__(self, client_id: str, connection: mqtt.Client, answers: bool) -> None:
        self.client_id, self._connection, self._answers = client_id, connection, answers
        self._packet_ids: dict[bytes, int] = {}  # payload → packet id, not acknowledged

    async def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        assert await self._connection.subscribe(topic_filter, qos) == qos

    async def unsubscribe(self, topic_filter: str) -> None:
        await self._connection.unsubscribe(topic_filter)

    async def publish(self, topic: str, payload: bytes, qos: int = 1) -> None:
        connection = self._connection
        connection.publish(topic, payload, qos, 9)
        if qos == 1:
            await connection.next(PUBACK)
        elif qos == 2:
            await connection.next(PUBREC)
            connection.answer(PUBREL, 9)
            await connection.next(PUBCOMP)

    async def copies(self, count: int) -> list[tuple[str, bytes]]:
        found = []
        for _ in range(count):
            topic, payload, qos, packet_id = delivered(await self._connection.next(PUBLISH))
            assert qos < 2
            if qos and self._answers:
                self._connection.answer(PUBACK, packet_id)
            elif qos:
                self._packet_ids[payload] = packet_id
            found.append((topic, payload))
        return found

    async def ack(self, payload: bytes) -> None:
        self._connection.answer(PUBACK, self._packet_ids.pop(payload))

    async def disconnect(self) -> None:
        await self._connection.disconnect()


class Embedded(Played):
    def __init__(self, bridge: Bridge, log: Log, commands: Commands) -> None:
        self._bridge, self.log, self.commands = bridge, log, commands

    async def connect(self, client_id: str, *, clean: bool = True, answers: bool = True) -> Client:
        connection = await self._bridge.connect(client_id, clean=clean)
        return EmbeddedClient(client_id, connection, answers)


@contextlib.asynccontextmanager
async def embedded(bridge: Bridge) -> AsyncIterator[Played]:
    async with reading(bridge.bootstrap) as log, commanding(bridge.bootstrap) as commands:
        yield Embedded(bridge, log, commands)
    bridge.let_go()


# -- EMQX


class EmqxClient(Client):
    def __init__(self, client_id: str, connection: broker.Client) -> None:
        self.client_id, self._connection = client_id, connection
        self._taken = 0

    async def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        await self._connection.subscribe(topic_filter, qos)

    async def unsubscribe(self, topic_filter: str) -> None:
        await self._connection.unsubscribe(topic_filter)

    async def publish(self, topic: str, payload: bytes, qos: int = 1) -> None:
        await self._connection.publish(topic, payload, qos)

    async def copies(self, count: int) -> list[tuple[str, bytes]]:
        found = await self._connection.until_received(self._taken + count)
        new, self._taken = found[self._taken :], len(found)
        return [(message.topic, message.payload) for message in new]

    async def ack(self, payload: bytes) -> None:
        (message,) = [each for each in self._connection.received if each.payload == payload]
        await self._connection.ack(message)

    async def disconnect(self) -> None:
        await self._connection.disconnect()


class AnEmqx(Played):
    def __init__(self, world: EmqxWorld, log: Log, commands: Commands) -> None:
        self._world, self.log, self.commands = world, log, commands

    async def connect(self, client_id: str, *, clean: bool = True, answers: bool = True) -> Client:
        expiry_s = 0 if clean else 3_600
        connection = await self._world.emqx.connect(
            client_id, clean_start=clean, expiry_s=expiry_s, answers=answers
        )
        return EmqxClient(client_id, connection)


@contextlib.asynccontextmanager
async def an_emqx(
    app: str, bootstrap: str, redis_url: str, directory: Path, *rules: str
) -> AsyncIterator[Played]:
    async with (
        a_world(app, bootstrap, redis_url, directory, *rules, agents=()) as world,
        reading(bootstrap) as log,
        commanding(bootstrap) as commands,
    ):
        yield AnEmqx(world, log, commands)
