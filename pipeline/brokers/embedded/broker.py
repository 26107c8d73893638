"""The embedded MQTT broker: amqtt, with Kafka in front of every acknowledgement and its events told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Final
from uuid import uuid4

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.broker import Broker, Server
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session

from pipeline.brokers.embedded.handler import Handler, Payload, refused_topic
from pipeline.brokers.embedded.recorder import NEVER_EXPIRES_S, Recorder, now_ms
from pipeline.settings import BridgeSettings
from schemas.events import (
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
from schemas.filters import filter_error

logger = logging.getLogger(__name__)

SUBSCRIBE_FAILURE: Final = 0x80  # [MQTT-3.9.3-2]
CLOSE_TIMEOUT_S: Final = 5.0  # for the connection that a newer one of the same client replaces


class AcceptEveryone(BaseAuthPlugin):
    """amqtt's own anonymous access also makes sessions forget what comes while a client is away."""

    async def authenticate(self, *, session: Session) -> bool:
        """Let everybody in: the broker listens on loopback."""
        return True


class EmbeddedBroker(Broker):
    """Overrides amqtt where clients come, subscribe and go, and where messages are routed."""

    def __init__(self, settings: BridgeSettings, recorder: Recorder) -> None:
        """`start` opens the listeners."""
        listeners = {
            "default": {"type": "tcp", "bind": f"{settings.host}:{settings.mqtt_port}"},
            "websocket": {"type": "ws", "bind": f"{settings.host}:{settings.websocket_port}"},
        }
        plugins: dict[str, dict[str, Any]] = {f"{__name__}.{AcceptEveryone.__name__}": {}}
        super().__init__({"listeners": listeners, "plugins": plugins})
        self._recorder = recorder

    async def start(self) -> None:
        """Accept connections; the snapshot tells that there are none yet."""
        await self._recorder.node_event(NodeStarted)
        await self.snapshot()
        await super().start()

    async def shutdown(self) -> None:
        """Close every connection and say so."""
        await super().shutdown()
        await self._recorder.node_event(NodeStopped)

    async def snapshot(self) -> None:
        """Everything connected and subscribed, between `node.sync.started` and `.completed`."""
        sync_id = uuid4().hex
        await self._recorder.node_event(NodeSyncStarted, sync_id=sync_id)
        for session, handler in list(self._sessions.values()):
            if isinstance(handler, Handler) and not handler.ended.is_set():
                await self._tell_connected(session, handler)
        for topic_filter, subscriptions in list(self._subscriptions.items()):
            for session, qos in list(subscriptions):
                await self._tell_subscribed(session, topic_filter, qos)
        await self._recorder.node_event(NodeSyncCompleted, sync_id=sync_id)

    # -- clients come and go

    async def _initialize_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        remote_address: str,
        remote_port: int,
    ) -> tuple[BrokerProtocolHandler, Session]:
        _, session = await super()._initialize_client_session(
            reader, writer, remote_address, remote_port
        )
        # A session that goes on keeps the address of its old connection otherwise.
        session.remote_address, session.remote_port = remote_address, remote_port
        session.keep_alive = session.keep_alive * 3 // 2  # [MQTT-3.1.2-24]
        return Handler(self.plugins_manager, self._recorder, self._route), session

    async def _delete_session(self, client_id: str) -> None:
        """A clean start: the session before ends, and so does its connection ([MQTT-3.1.4-2])."""
        existed = client_id in self._sessions
        await self._close_connection(client_id, "discarded")
        await super()._delete_session(client_id)
        if existed:
            await self._recorder.client(SessionDiscarded, client_id)

    async def _handle_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        client_session: Session,
        handler: BrokerProtocolHandler,
        server: Server,
        listener_name: str,
    ) -> None:
        """A session that is still connected is taken over ([MQTT-3.1.4-2])."""
        client_id = client_session.client_id or ""
        if await self._close_connection(client_id, "takenover"):
            await self._recorder.client(SessionTakenOver, client_id)
        await super()._handle_client_session(
            reader, writer, client_session, handler, server, listener_name
        )

    async def _close_connection(self, client_id: str, reason: str) -> bool:
        """Close a client's connection and wait until it has ended; whether there was one."""
        _, handler = self._sessions.get(client_id, (None, None))
        if not isinstance(handler, Handler) or handler.ended.is_set():
            return False
        await handler.drop(reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await handler.ended.wait()
        return True

    async def _client_message_loop(
        self, client_session: Session, handler: BrokerProtocolHandler
    ) -> None:
        assert isinstance(handler, Handler), "_initialize_client_session makes no other"
        client_id, connection_id = handler.client_id, handler.connection_id
        handler.connected_at_ms = now_ms()
        kind = SessionResumed if client_session.parent else SessionCreated
        await self._recorder.client(kind, client_id)
        await self._tell_connected(client_session, handler)
        try:
            await super()._client_message_loop(client_session, handler)
        finally:
            reason = handler.reason
            await self._recorder.client(
                ClientDisconnected, client_id, connection_id=connection_id, reason=reason
            )
            if client_session.clean_session:
                await self._recorder.client(SessionTerminated, client_id, reason=reason)
            handler.ended.set()

    async def _tell_connected(self, session: Session, handler: Handler) -> None:
        clean = bool(session.clean_session)
        await self._recorder.client(
            ClientConnected,
            handler.client_id,
            username=session.username,
            connection_id=handler.connection_id,
            connected_at=handler.connected_at_ms,
            clean_start=clean,
            session_expiry_s=0 if clean else NEVER_EXPIRES_S,
            protocol="MQTT 3.1.1",
        )

    # -- subscriptions

    async def add_subscription(self, subscription: tuple[str, int], session: Session) -> int:
        """See amqtt; a filter that is none is refused."""
        topic_filter, qos = subscription
        if filter_error(topic_filter) is not None:
            return SUBSCRIBE_FAILURE
        granted = await super().add_subscription((topic_filter, qos), session)
        if granted != SUBSCRIBE_FAILURE:
            await self._tell_subscribed(session, topic_filter, granted)
        return granted

    async def _tell_subscribed(self, session: Session, topic_filter: str, qos: int) -> None:
        await self._recorder.client(
            SessionSubscribed, session.client_id or "", topic_filter=topic_filter, qos=qos
        )

    async def _handle_unsubscription(
        self,
        client_session: Session,
        handler: BrokerProtocolHandler,
        unsubscribe_waiter: asyncio.Future[Any],
    ) -> None:
        held = [
            topic_filter
            for topic_filter in unsubscribe_waiter.result().topics
            if any(session is client_session for session, _ in self._holders(topic_filter))
        ]
        await super()._handle_unsubscription(client_session, handler, unsubscribe_waiter)
        for topic_filter in held:
            await self._recorder.client(
                SessionUnsubscribed, client_session.client_id or "", topic_filter=topic_filter
            )

    def _holders(self, topic_filter: str) -> list[tuple[Session, int]]:
        return self._subscriptions.get(topic_filter, [])

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        """[MQTT-3.3.1-6]: at a new subscription only. amqtt also sends them at each connect, for anybody's filters."""
        handler = self._get_handler(session)
        if isinstance(handler, Handler) and handler.connected_at_ms:
            await super()._publish_retained_messages_for_subscription(subscription, session)

    # -- messages

    async def _route(self, session: Session, payload: Payload, retain: bool) -> None:
        """To the subscribers, in the order of calls; Kafka has the message."""
        topic = payload.event.topic
        await self._broadcast_message(session, topic, payload)
        if retain:
            await self.retain_message(session, topic, payload, payload.event.qos)

    async def _broadcast_message(
        self,
        session: Session | None,
        topic: str | None,
        data: bytes | bytearray | None,
        force_qos: int | None = None,
    ) -> None:
        """See amqtt. What comes without an event is a will: it gets one."""
        if session is not None and topic is not None and not isinstance(data, Payload):
            if refused_topic(topic):
                logger.warning("%s has a will for %r: not published", session.client_id, topic)
                return
            payload = bytes(data or b"")
            event, _ = await self._recorder.publish(
                topic, payload, force_qos or 0, bool(session.will_retain),
                session.client_id or "", session.username,
            )  # fmt: skip
            data = Payload.of(payload, event)
        await super()._broadcast_message(session, topic, data, force_qos)
