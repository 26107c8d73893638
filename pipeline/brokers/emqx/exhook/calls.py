"""The handling of EMQX's calls: each becomes an event for Kafka, and gets an answer.

Two kinds of calls:

- *Notifications* (clients, sessions, deliveries, acknowledgements): EMQX ignores the answer. The bridge enters the
  event and answers at once, without waiting until it is stored.
- `message.publish`: EMQX does what the answer says. The bridge answers when the event is stored.

ON message.publish, by the topic of the PUBLISH packet:

| topic | stored event | answer |
|---|---|---|
| `$millpond/d/…` with a valid MAC: a copy | `deliveries.sent`, for QoS 1 and 2 with a lease | route to the client's topic |
| below `$millpond/` otherwise | none | refuse (`reserved`) |
| below another client's mountpoint, or reserved below the own one | none | refuse (`mailbox`) |
| of a delivery rule, with a mountpoint | `message.publish` | do not route: Millpond delivers |
| of another rule, or without a mountpoint | `message.publish` | route, without the publisher's mountpoint |
| of no rule | none | route, without the publisher's mountpoint |

An event that is invalid or cannot be stored: refuse (`invalid`, `unkept`).

Order: until its first `await` a call is one step of the event loop. So events are entered in the order of the calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from google.protobuf.message import Message as ProtobufMessage

from millpond.pipeline.brokers.bridge_rules import BridgeRules
from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic, ReturnedCopy
from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook import translation
from millpond.pipeline.brokers.emqx.exhook.hooks import Version, needed_hooks
from millpond.pipeline.brokers.emqx.exhook.translation import Translator
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.clock import now_ms
from millpond.pipeline.telemetry.tracing import BridgeTracing
from millpond.schemas import keys
from millpond.schemas.errors import DecodeError, MillpondError
from millpond.schemas.events import (
    DeliveriesSent,
    Event,
    MessagePublished,
    Sent,
    SessionDiscarded,
    SessionTerminated,
)
from millpond.schemas.leases import parse_lease
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

LOG_INTERVAL_S: Final = 1.0  # the log has one line for each kind of refusal in this time
SHOWN_MAX: Final = 200  # characters of foreign text in such a line
EMPTY: Final = b""  # an EmptySuccess
IGNORE: Final = pb.ValuedResponse(type="IGNORE").SerializeToString()


class CallListener(NamedTuple):
    """The functions of the bridge that follow from calls. None of them may wait or raise."""

    provider_loaded: Callable[[str], None]
    """`(node)`: the node begins to call. Its earlier events may be missing, so a snapshot is needed."""
    acked: Callable[[str, str], object]
    """`(client id, message id)`: a client acknowledged a message or copy, under EMQX's id. The event was entered."""
    session_ended: Callable[[str], None]
    """`(client id)`: the session was terminated or discarded. EMQX holds nothing for the client any more."""
    retainable: Callable[[str, MessagePublished], None]
    """`(topic, event)`: a publish that a retain rule covers is stored. If EMQX retains it, it does so before the call,
    at `topic`: the topic of the PUBLISH packet, with the mountpoint."""


class Refusals:
    """Counts refused calls, and logs one in a while. Payloads are never logged."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # by kind
        self._logged: dict[
            str, tuple[float, int]
        ] = {}  # kind → loop time and count of the last log line

    def add(self, kind: str, sentence: str) -> None:
        """Count a refusal."""
        self.counts[kind] += 1
        now, count = asyncio.get_running_loop().time(), self.counts[kind]
        at, before = self._logged.get(kind, (now - LOG_INTERVAL_S, 0))
        if now - at >= LOG_INTERVAL_S:
            self._logged[kind] = now, count
            logger.warning("%s (%s: %d since the last such line)", sentence, kind, count - before)


class Notification(NamedTuple):
    """How a notification becomes an event: its hook, its request type, the Kafka topic and the translation."""

    hook: str
    request: type[ProtobufMessage]
    topic: str
    translate: Callable[[Any, int], Event | None]


class Calls:
    """One per bridge process."""

    def __init__(
        self,
        rules: Rules,
        mountpoint: Mountpoint | None,
        copy_topic: CopyTopic,
        durable_producer: DurableProducer,
        listener: CallListener,
        partitions: int,
        tracing: BridgeTracing | None = None,
    ) -> None:
        """`partitions` is the number of partitions of each Kafka topic: node events go to each of them."""
        self._tracing = tracing
        self._rules, self._mountpoint, self._copy_topic = rules, mountpoint, copy_topic
        self._durable_producer, self._listener, self._partitions = (
            durable_producer,
            listener,
            partitions,
        )
        self._answers = BridgeRules(rules)
        self._translator = Translator(mountpoint)
        self.refusals = Refusals()

    # -- the provider

    def provider_loaded(self, data: bytes, version: Version) -> bytes:
        """Answer with the hooks to call.

        EMQX asks only once. A bridge process that starts later gets calls without this one, and works, too.
        """
        request = pb.ProviderLoadedRequest.FromString(data)
        node = request.meta.node
        try:
            event = translation.node_started(request)
        except DecodeError as error:
            self.refusals.add("invalid", f"OnProviderLoaded: {error}")
            event = None
        if event is not None:
            for number in range(self._partitions):
                self._durable_producer.enter(keys.CLIENTS_TOPIC, event, number, hook="node.started")
        logger.info("%s (EMQX %s) registers its hooks at this bridge", node, request.broker.version)
        self._listener.provider_loaded(node)
        hooks = needed_hooks(self._rules, self._mountpoint, version)
        specs = [pb.HookSpec(name=each.name, topics=each.topics) for each in hooks]
        return pb.LoadedResponse(hooks=specs).SerializeToString()

    def provider_unloaded(self, data: bytes) -> bytes:
        """Log that the node's calls end. EMQX stops, or an operator disabled the hook while clients stay connected."""
        request = pb.ProviderUnloadedRequest.FromString(data)
        logger.warning(
            "%s stops calling this bridge: its events are missing until it calls again", request.meta.node[:SHOWN_MAX]
        )  # fmt: skip
        return EMPTY

    # -- notifications

    def notifications(self) -> dict[str, Notification]:
        """The notifications that become one event, by the name of the call."""
        clients, messages, to = keys.CLIENTS_TOPIC, keys.MESSAGES_TOPIC, self._translator
        # fmt: off
        return {
            "OnClientConnected": Notification("client.connected", pb.ClientConnectedRequest, clients, to.connected),
            "OnClientDisconnected": Notification("client.disconnected", pb.ClientDisconnectedRequest, clients, to.disconnected),
            "OnSessionCreated": Notification("session.created", pb.SessionCreatedRequest, clients, to.created),
            "OnSessionResumed": Notification("session.resumed", pb.SessionResumedRequest, clients, to.resumed),
            "OnSessionDiscarded": Notification("session.discarded", pb.SessionDiscardedRequest, clients, to.discarded),
            "OnSessionTakenover": Notification("session.takenover", pb.SessionTakenoverRequest, clients, to.taken_over),
            "OnSessionTerminated": Notification("session.terminated", pb.SessionTerminatedRequest, clients, to.terminated),
            "OnSessionSubscribed": Notification("session.subscribed", pb.SessionSubscribedRequest, clients, to.subscribed),
            "OnSessionUnsubscribed": Notification("session.unsubscribed", pb.SessionUnsubscribedRequest, clients, to.unsubscribed),
            "OnMessageDelivered": Notification("message.delivered", pb.MessageDeliveredRequest, messages, self._delivered),
        }
        # fmt: on

    def notify(self, rpc: str, notification: Notification, data: bytes) -> bytes:
        """Enter the event of a notification. An invalid one is only counted: EMQX ignores the answer."""
        request = notification.request.FromString(data)
        try:
            event = notification.translate(request, now_ms())
        except DecodeError as error:
            self.refusals.add("invalid", f"{rpc}: {error}")
            return EMPTY
        # No rule needs the event.
        if event is None:
            return EMPTY
        self._durable_producer.enter(notification.topic, event, hook=notification.hook)
        if isinstance(event, SessionTerminated | SessionDiscarded):
            self._listener.session_ended(event.client_id)
        return EMPTY

    def _delivered(self, request: pb.MessageDeliveredRequest, at: int) -> Event | None:
        event = self._translator.delivered(request, at)
        if not self._answers.wants("message.delivered", event.topic):
            return None
        return event

    def acked(self, data: bytes) -> bytes:
        """Enter an acknowledgement, and then free its room. So its event precedes those of the next copy."""
        request = pb.MessageAckedRequest.FromString(data)
        try:
            event = self._translator.acked(request, now_ms())
        except DecodeError as error:
            self.refusals.add("invalid", f"OnMessageAcked: {error}")
            return EMPTY
        if self._answers.wants("message.acked", event.topic):
            self._durable_producer.enter(keys.MESSAGES_TOPIC, event, hook="message.acked")
        self._listener.acked(event.client_id, event.message_id)
        return EMPTY

    # -- publishes

    async def publish(self, data: bytes) -> bytes:
        """Store a publish, and answer how EMQX routes it; see the table at the head of this file."""
        request = pb.MessagePublishRequest.FromString(data)
        message = request.message
        if message.topic.startswith(keys.RESERVED_TOPIC_PREFIX):
            returned = self._copy_topic.parse(message.topic)
            if returned is None:
                return self._refuse(message, "reserved", "clients may not publish below $millpond/")
            return await self._route_copy(message, returned)
        topic = self._unmounted(message)
        if topic is None:
            return self._refuse(message, "mailbox", "only Millpond may publish to other clients")
        delivered = self._answers.has_delivery_agent(topic)
        if not delivered and not self._answers.wants("message.publish", topic):
            return IGNORE if topic == message.topic else _answer(message, topic)
        try:
            event = self._translator.published(request, topic, now_ms())
        except DecodeError as error:
            return self._refuse(message, "invalid", str(error))
        refusal = await self._refusal_unless_stored(message, self._enter(event))
        if refusal is not None:
            return refusal
        if self._answers.may_retain(topic):
            self._listener.retainable(message.topic, event)
        if delivered and self._mountpoint is not None:
            return _answer(message, topic, allow=False)
        return IGNORE if topic == message.topic else _answer(message, topic)

    def _enter(self, event: MessagePublished) -> asyncio.Future[None]:
        """Enter the event of a publish. A trace begins here, if this publish is sampled."""
        hook = "message.publish"
        span = None if self._tracing is None else self._tracing.publish(event)
        headers = () if span is None else span.headers
        stored = self._durable_producer.enter(
            keys.MESSAGES_TOPIC, event, hook=hook, headers=headers
        )
        if span is not None:
            stored.add_done_callback(span.answered)
        return stored

    async def _refusal_unless_stored(
        self, message: pb.Message, stored: asyncio.Future[None]
    ) -> bytes | None:
        """Wait until an event is stored. Returns the refusal of the publish if it cannot be."""
        try:
            # EMQX may cancel the call. The event must not be cancelled with it.
            await asyncio.shield(stored)
        except MillpondError as error:
            return self._refuse(message, "unkept", str(error))
        return None

    def _unmounted(self, message: pb.Message) -> str | None:
        """The topic as the publisher wrote it. None if it is below another client's mountpoint, or reserved."""
        mountpoint, topic = self._mountpoint, message.topic
        if mountpoint is None or not mountpoint.holds(topic):
            return topic
        meant = mountpoint.unmount(message.from_client_id, topic)
        if meant is None or mountpoint.holds(meant):
            return None
        return None if meant.startswith(keys.RESERVED_TOPIC_PREFIX) else meant

    async def _route_copy(self, message: pb.Message, returned: ReturnedCopy) -> bytes:
        """Store the report of a copy, then let EMQX route the copy. So no acknowledgement can precede its report."""
        if message.qos > 0 and returned.lease:
            try:
                report, partition = self._report(message, returned)
            except DecodeError as error:
                return self._refuse(message, "invalid", str(error))
            hook = "message.publish"
            stored = self._durable_producer.enter(keys.MESSAGES_TOPIC, report, partition, hook=hook)
            refusal = await self._refusal_unless_stored(message, stored)
            if refusal is not None:
                return refusal
        return _answer(message, returned.topic)

    def _report(self, message: pb.Message, returned: ReturnedCopy) -> tuple[DeliveriesSent, int]:
        lease = parse_lease(returned.lease)
        sent = Sent(
            returned.lease, returned.client_id, returned.message_id,
            translation.message_id_of(message.id), translation.qos_of(message.qos),
        )  # fmt: skip
        node = translation.node_of(message.node)
        event = DeliveriesSent(at=now_ms(), node=node, agent=lease.agent, sent=(sent,))
        return event, lease.partition

    def _refuse(self, message: pb.Message, kind: str, why: str) -> bytes:
        """Let EMQX drop a publish, and hide it from other hooks. The publisher gets a PUBACK nevertheless."""
        client_id, topic = message.from_client_id[:SHOWN_MAX], message.topic[:SHOWN_MAX]
        self.refusals.add(kind, f"{client_id!r}: a publish to {topic!r} is refused: {why}")
        message.headers["allow_publish"] = "false"
        return pb.ValuedResponse(type="STOP_AND_RETURN", message=message).SerializeToString()

    # -- calls that are not registered

    @staticmethod
    def access_checked(request_type: type[ProtobufMessage], data: bytes) -> bytes:
        """Confirm the result that EMQX already has. The hooks are not registered; if EMQX asks, the answer decides."""
        request: Any = request_type.FromString(data)
        return pb.ValuedResponse(type="CONTINUE", bool_result=request.result).SerializeToString()


def _answer(message: pb.Message, topic: str, *, allow: bool = True) -> bytes:
    """Let EMQX continue with this topic and the rest of the message unchanged. `allow=False`: do not route it."""
    message.topic = topic
    if not allow:
        message.headers["allow_publish"] = "false"
    return pb.ValuedResponse(type="CONTINUE", message=message).SerializeToString()
