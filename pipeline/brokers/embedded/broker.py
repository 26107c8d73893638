"""The embedded MQTT broker: amqtt, with Kafka in front of every acknowledgement and its events told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final
from uuid import uuid4

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.broker import Server
from amqtt.errors import AMQTTError, BrokerError, MQTTError
from amqtt.mqtt.connack import IDENTIFIER_REJECTED, ConnackPacket
from amqtt.mqtt.constants import QOS_2
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session

from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.embedded.event_producer import NEVER_EXPIRES_S, EventProducer
from millpond.pipeline.brokers.embedded.handler import (
    ConnectionHandler,
    Granted,
    Kept,
    Payload,
    changing_of,
    outgoing_of,
    routed_copy,
)
from millpond.pipeline.brokers.embedded.listening import ListeningBroker
from millpond.pipeline.brokers.embedded.outgoing import OutgoingChange, ordered
from millpond.pipeline.brokers.embedded.sender import ConnectionSender
from millpond.pipeline.brokers.embedded.topics import filter_refusal, is_refused_topic
from millpond.pipeline.brokers.embedded.wire import ConnectionWriter, read_connect
from millpond.pipeline.clock import now_ms
from millpond.pipeline.settings import BridgeSettings
from millpond.schemas.commands import Command, Subscribe
from millpond.schemas.errors import ConfigError
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    NodeStarted,
    NodeStopped,
    NodeSyncCompleted,
    NodeSyncStarted,
    SessionCreated,
    SessionDiscarded,
    SessionResumed,
    SessionSubscribed,
    SessionTakenOver,
    SessionTerminated,
    SessionUnsubscribed,
)
from millpond.schemas.leases import LeaseName
from millpond.schemas.topics import matches, split_share, standard_filter

logger = logging.getLogger(__name__)

SUBSCRIBE_FAILURE: Final = 0x80  # [MQTT-3.9.3-2]
CONNECT_TIMEOUT_S: Final = 10.0  # from an accepted connection to its CONNECT
END_TIMEOUT_S: Final = 5.0  # for the connection that a newer one of the same client replaces
# What a session that goes on takes from its new connection.
OF_THE_CONNECTION: Final = (
    "remote_address", "remote_port", "username", "keep_alive",
    "will_flag", "will_topic", "will_message", "will_qos", "will_retain",
)  # fmt: skip


class EmbeddedBroker(ListeningBroker):
    """Overrides amqtt where clients come, subscribe and go, and where messages are routed."""

    def __init__(
        self,
        settings: BridgeSettings,
        event_producer: EventProducer,
        deliveries: Deliveries,
        page_port: int,
    ) -> None:
        """`start` opens the listeners; see `ListeningBroker` for `page_port`."""
        super().__init__(settings, event_producer.packet_bytes_max, page_port)
        self._event_producer, self._deliveries = event_producer, deliveries
        self._opening: set[ConnectionWriter] = set()  # connections without a CONNECT so far

    async def start(self) -> None:
        """Accept connections; the snapshot tells that there are none yet.

        Raises:
            ConfigError: a port is in use.
        """
        await self._event_producer.node_event(NodeStarted)
        await self.snapshot()
        level = self.logger.level
        self.logger.setLevel(logging.CRITICAL)  # it would show a traceback beside our one line
        try:
            await super().start()
        except BrokerError as error:
            raise ConfigError(f"the embedded broker: {error}") from error
        finally:
            self.logger.setLevel(level)

    async def shutdown(self) -> None:
        """Close every connection and say so."""
        for server in self._servers.values():
            server.instance.close()
        handlers = self._handlers()
        await asyncio.gather(
            *(writer.close() for writer in self._opening),
            *(handler.drop("server_shutdown") for handler in handlers),
        )
        for handler in handlers:
            await handler.ended.wait()
        await super().shutdown()
        await self._event_producer.node_event(NodeStopped)

    async def snapshot(self) -> None:
        """Everything connected and subscribed, between `node.sync.started` and `.completed`."""
        sync_id = uuid4().hex
        await self._event_producer.node_event(NodeSyncStarted, sync_id=sync_id)
        for handler in self._handlers():
            if handler.connected and handler.session is not None:
                await self._tell_connected(handler.session, handler, told_again=True)
        for topic_filter, subscriptions in list(self._subscriptions.items()):
            for session, qos in list(subscriptions):
                if (session, qos) in self._holders(topic_filter):  # still
                    await self._tell_subscribed(session, topic_filter, qos, told_again=True)
        await self._event_producer.node_event(NodeSyncCompleted, sync_id=sync_id)

    # -- clients come and go

    def _handlers(self) -> list[ConnectionHandler]:
        """The connections there are, and the last one of each session that goes on without."""
        return [
            handler
            for _, handler in self._sessions.values()
            if isinstance(handler, ConnectionHandler)
        ]

    async def _initialize_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        remote_address: str,
        remote_port: int,
    ) -> tuple[BrokerProtocolHandler, Session]:
        """See amqtt, which lets a new connection change the session under an old one."""
        opening = ConnectionWriter(writer)
        self._opening.add(opening)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connect, client_id = await read_connect(
                    reader, self._event_producer.packet_bytes_max
                )
                if "\0" in client_id:  # [MQTT-1.5.3-2]: no event and no key could name it
                    await ConnackPacket.build(0, IDENTIFIER_REJECTED).to_stream(writer)
                    raise MQTTError("a client id with a null character")
                _, incoming = await BrokerProtocolHandler.init_from_connect(
                    connect, writer, self.plugins_manager
                )
        except Exception as error:
            # Foreign bytes: whatever amqtt raises for them.
            # What comes after a colon may be what the client sent, and that may be a password.
            kind, reason = type(error).__name__, str(error).partition(":")[0]
            logger.warning(
                "%s:%d: no valid CONNECT: %s %s", remote_address, remote_port, kind, reason
            )
            await opening.close()
            raise AMQTTError("no valid CONNECT") from error
        finally:
            self._opening.discard(opening)
        handler = ConnectionHandler(
            self.plugins_manager, self._event_producer, self._deliveries, self
        )
        try:
            return handler, await self._session_for(incoming, handler)
        except TimeoutError as error:
            # Its events wait for Kafka. Whoever is cut off comes again.
            logger.warning("%s: its connection before has not ended yet", incoming.client_id)
            await opening.close()
            raise AMQTTError("the connection before has not ended") from error

    async def _session_for(self, incoming: Session, handler: ConnectionHandler) -> Session:
        """The session of a CONNECT, once no other connection has it ([MQTT-3.1.4-2], [MQTT-3.1.2-4 to 6])."""
        client_id = incoming.client_id
        assert client_id, "amqtt makes one up"
        async with asyncio.timeout(END_TIMEOUT_S):
            while True:
                session, before = self._sessions.get(client_id, (None, None))
                if not isinstance(before, ConnectionHandler) or before.ended.is_set():
                    break
                await before.drop("discarded" if incoming.clean_session else "takenover")
                await before.ended.wait()
        # From here to the new entry nothing is awaited: of two CONNECTs at once, one comes after the other.
        if session is not None and not incoming.clean_session:
            for name in OF_THE_CONNECTION:
                setattr(session, name, getattr(incoming, name))
            session.parent = 1  # amqtt's word for "session present"
            handler.outgoing = outgoing_of(session)
            self._sessions[client_id] = session, handler
            return session
        if session is not None:
            await super()._delete_session(client_id)
        handler.outgoing = outgoing_of(incoming)
        self._sessions[client_id] = incoming, handler
        if session is not None:
            await self._event_producer.client(SessionDiscarded, client_id)
        return incoming

    async def _handle_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        client_session: Session,
        handler: BrokerProtocolHandler,
        server: Server,
        listener_name: str,
    ) -> None:
        assert isinstance(handler, ConnectionHandler), "_initialize_client_session makes no other"
        try:
            await super()._handle_client_session(
                reader, writer, client_session, handler, server, listener_name
            )
        finally:
            client_session.transitions.disconnect()
            handler.ended.set()
            handler.announced.set()

    async def _client_message_loop(
        self, client_session: Session, handler: BrokerProtocolHandler
    ) -> None:
        assert isinstance(handler, ConnectionHandler), "_initialize_client_session makes no other"
        handler.connected_at_ms, handler.connected = now_ms(), True
        kind = SessionResumed if client_session.parent else SessionCreated
        await self._event_producer.client(kind, handler.client_id)
        await self._tell_connected(client_session, handler)
        handler.announced.set()
        handler.start_sending(self._sender(client_session, handler))
        try:
            await super()._client_message_loop(client_session, handler)
        finally:
            await self._connection_ended(client_session, handler)

    async def _connection_ended(self, session: Session, handler: ConnectionHandler) -> None:
        """What becomes of the session is told after the disconnect."""
        client_id, reason = handler.client_id, handler.reason
        await handler.stop_sending()
        await handler.until_changed()
        handler.connected = False
        withdrawn = await handler.withdraw()
        discarded = reason == "discarded"
        if session.clean_session or discarded:
            await super()._delete_session(client_id)
        await self._event_producer.client(
            ClientDisconnected, client_id, connection_id=handler.connection_id, reason=reason
        )
        if discarded:
            await self._event_producer.client(SessionDiscarded, client_id)
        elif session.clean_session:
            await self._event_producer.client(SessionTerminated, client_id, reason=reason)
        elif reason == "takenover":
            await self._event_producer.client(SessionTakenOver, client_id)
        for change in withdrawn:
            await self.change(change)

    def _sender(self, session: Session, handler: ConnectionHandler) -> ConnectionSender:
        return ConnectionSender(
            handler.client_id,
            outgoing_of(session),
            self._deliveries,
            self._event_producer,
            self.change,
        )

    async def _tell_connected(
        self, session: Session, handler: ConnectionHandler, **marks: bool
    ) -> None:
        clean = bool(session.clean_session)
        await self._event_producer.client(
            ClientConnected,
            handler.client_id,
            username=session.username,
            connection_id=handler.connection_id,
            connected_at=handler.connected_at_ms,
            clean_start=clean,
            session_expiry_s=0 if clean else NEVER_EXPIRES_S,
            protocol="MQTT 3.1.1",
            **marks,
        )

    # -- subscriptions

    async def subscribe(
        self, session: Session, topic_filters: Iterable[tuple[str, int]], *, proxied: bool = False
    ) -> Granted:
        """Subscribe a session; `proxied` if its client has not asked for it. What nobody can serve is refused."""
        codes: list[int] = []
        kept: list[asyncio.Future[Any]] = []
        for written, qos in topic_filters:
            if filter_refusal(written) is not None or qos > QOS_2:
                codes.append(SUBSCRIBE_FAILURE)
                continue
            topic_filter = standard_filter(written)
            self._del_subscription(topic_filter, session)  # [MQTT-3.8.4-3]
            self._subscriptions.setdefault(topic_filter, []).append((session, qos))
            outgoing_of(session).newest_sent.subscribed(topic_filter, now_ms())
            codes.append(qos)
            kept.append(await self._tell_subscribed(session, topic_filter, qos, proxied=proxied))
        return Granted(codes, kept)

    async def _tell_subscribed(
        self, session: Session, topic_filter: str, qos: int, **marks: bool
    ) -> asyncio.Future[Any]:
        client_id = session.client_id or ""
        return await self._event_producer.client(
            SessionSubscribed, client_id, topic_filter=topic_filter, qos=qos, **marks
        )

    async def unsubscribe(self, session: Session, topic_filters: Iterable[str]) -> Kept:
        """End those of these subscriptions that the session has."""
        kept = []
        for written in topic_filters:
            topic_filter = standard_filter(written)
            if not self._del_subscription(topic_filter, session):
                continue
            if not self._holders(topic_filter):
                self._subscriptions.pop(topic_filter, None)  # amqtt keeps them for ever
            client_id = session.client_id or ""
            kept.append(
                await self._event_producer.client(
                    SessionUnsubscribed, client_id, topic_filter=topic_filter
                )
            )
        return kept

    def _holders(self, topic_filter: str) -> list[tuple[Session, int]]:
        return self._subscriptions.get(topic_filter, [])

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        """Nothing: amqtt sends retained messages at each connect, for anybody's filters. See `send_retained`."""

    def send_retained(self, session: Session, topic_filters: Iterable[tuple[str, int]]) -> None:
        """[MQTT-3.3.1-6]: at a new subscription only. A shared one gets none (MQTT 5.0, 4.8.2).

        Where a rule looks them up in the store, they come from there.
        """
        handler = self._get_handler(session)
        if not isinstance(handler, ConnectionHandler):
            return
        for written, qos in topic_filters:
            topic_filter = standard_filter(written)
            shared = split_share(topic_filter)[0] is not None
            looked_up = self._event_producer.answers.looks_up_retained(topic_filter)
            if qos == SUBSCRIBE_FAILURE or shared or looked_up:
                continue
            for topic, retained in self._retained_messages.items():
                if matches(topic_filter, topic):
                    assert isinstance(retained.data, Payload), "only `_route` and wills retain"
                    handler.put(routed_copy(retained.data, qos, retain=True))

    # -- commands

    async def take(self, pending: PendingCommand, command: Command) -> None:
        """A command takes its place among those of its client, or its client is not there."""
        item = ordered(command, pending)
        _, handler = self._sessions.get(pending.client_id, (None, None))
        if isinstance(handler, ConnectionHandler) and handler.connected:
            handler.outgoing.put(item)
        elif isinstance(item, OutgoingChange):
            await self.change(item)
        else:
            self._deliveries.fail(pending, "no_client")

    async def settle(self) -> None:
        """A copy is written and reported at once. Only the events of changes are under way."""
        await self._event_producer.drain()

    def filter_refusal(self, topic_filter: str) -> str | None:
        """See `CommandHandler`."""
        return filter_refusal(topic_filter)

    async def change(self, change: OutgoingChange) -> None:
        """Carry out what concerns a client's subscriptions; with its session they are gone."""
        pending, command = change
        session, _ = self._sessions.get(pending.client_id, (None, None))
        if session is not None:
            async with changing_of(session):
                if isinstance(command, Subscribe):
                    await self.subscribe(session, command.topic_filters, proxied=True)
                else:
                    await self.unsubscribe(session, command.topic_filters)
            if isinstance(command, Subscribe):
                self.send_retained(session, command.topic_filters)
        self._event_producer.when_kept(pending.done)

    def unacknowledged(self, client_id: str) -> list[LeaseName]:
        """The leases of the copies that a client has and has not acknowledged."""
        _, handler = self._sessions.get(client_id, (None, None))
        return handler.outgoing.unacknowledged() if isinstance(handler, ConnectionHandler) else []

    def drop_stale(self) -> None:
        """Commands that wait for a slow client do not wait for ever."""
        for handler in self._handlers():
            handler.outgoing.drop_stale(self._deliveries.drop_if_over)

    # -- messages

    async def route(self, session: Session, payload: Payload, retain: bool) -> None:
        """To the subscribers, in the order of calls; Kafka has the message."""
        topic = payload.event.topic
        self._to_subscribers(payload)
        if retain:
            await self.retain_message(session, topic, payload, payload.event.qos)

    def _to_subscribers(self, payload: Payload) -> None:
        """Route a message at once; amqtt has a queue for that, and knows no shared subscriptions.

        The topics of delivery agents are not routed. Their messages go to clients by command.
        """
        if self._event_producer.answers.has_delivery_agent(payload.event.topic):
            return
        for topic_filter, holders in self._subscriptions.items():
            group, plain = split_share(topic_filter)
            if matches(plain, payload.event.topic):
                for session, qos in holders if group is None else _in_turn(holders):
                    self._pass_on(session, payload, qos)

    def _pass_on(self, session: Session, payload: Payload, qos: int) -> None:
        """A message for a subscriber. For one that is away it is kept if its session goes on ([MQTT-3.1.2-4])."""
        copy = routed_copy(payload, qos, retain=False)
        if session.transitions.is_connected():
            handler = self._get_handler(session)
            if isinstance(handler, ConnectionHandler):
                handler.put(copy)
        elif not session.clean_session and qos:
            outgoing_of(session).keep(copy)

    async def _broadcast_message(
        self,
        session: Session | None,
        topic: str | None,
        data: bytes | bytearray | None,
        force_qos: int | None = None,
    ) -> None:
        """See amqtt, which calls this for wills alone. A will gets its event."""
        assert session is not None and topic is not None, "a will has a session and a topic"
        if is_refused_topic(topic):
            logger.warning("%s has a will for %r: not published", session.client_id, topic)
            session.will_retain = False
            return
        data = bytes(data or b"")
        event, _ = await self._event_producer.publish(
            topic, data, force_qos or 0, bool(session.will_retain),
            session.client_id or "", session.username,
        )  # fmt: skip
        payload = session.will_message = Payload.of(data, event)  # which amqtt may retain
        self._to_subscribers(payload)


def _in_turn(holders: list[tuple[Session, int]]) -> list[tuple[Session, int]]:
    """The client of a group whose turn it is: the next one that is connected, or else the next one. It goes to the end."""
    connected = (
        at for at, (session, _) in enumerate(holders) if session.transitions.is_connected()
    )
    at = next(connected, 0)
    chosen = holders[at : at + 1]
    holders += chosen
    del holders[at : at + 1]
    return chosen
