"""What becomes of each call of EMQX's: an event for Kafka, and an answer."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from google.protobuf.message import Message as ProtobufMessage

from millpond.pipeline.brokers.bridge_rules import BridgeRules
from millpond.pipeline.brokers.emqx.delivery.copy_topic import CopyTopic, ReturnedCopy
from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook import translation
from millpond.pipeline.brokers.emqx.exhook.hooks import Version, needed_hooks
from millpond.pipeline.brokers.emqx.exhook.translation import Translator
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.ports import Keeping
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

TOLD_AGAIN_S: Final = 1.0  # the log has one line for each kind of refusal in this time
SHOWN_MAX: Final = 200  # characters of foreign text in such a line
EMPTY: Final = b""  # an EmptySuccess
IGNORE: Final = pb.ValuedResponse(type="IGNORE").SerializeToString()


class CallListener(Protocol):
    """What the rest of the bridge wants to know. None of these may wait or raise."""

    def provider_loaded(self, node: str) -> None:
        """The broker's node began to call: what happened before is not known, a snapshot is."""
        ...

    def acked(self, client_id: str, message_id: str) -> None:
        """A client acknowledged a message or a copy, by the id that the broker gave it; its event was entered."""
        ...

    def session_ended(self, client_id: str) -> None:
        """A client's session was terminated or discarded: the broker holds nothing for it any more."""
        ...

    def retainable(self, topic: str, event: MessagePublished) -> None:
        """A publish is kept that a retain rule covers. `topic` is where the broker retains it, if it does: it has done
        so before it called, at the topic as it was published, which has the mountpoint.
        """
        ...


class Refusals:
    """Counts what was refused, and says so in the log without filling it. Payloads are never shown."""

    def __init__(self) -> None:
        """Nothing was refused so far."""
        self.counts: Counter[str] = Counter()
        self._told: dict[str, tuple[float, int]] = {}  # when last, and how many there were then

    def add(self, kind: str, sentence: str) -> None:
        """One more of a kind."""
        self.counts[kind] += 1
        now, count = asyncio.get_running_loop().time(), self.counts[kind]
        at, before = self._told.get(kind, (now - TOLD_AGAIN_S, 0))
        if now - at >= TOLD_AGAIN_S:
            self._told[kind] = now, count
            logger.warning("%s (%s, %d since)", sentence, kind, count - before)


class Notification(NamedTuple):
    """A call that only tells something: its request, the topic of Kafka that hears of it, and how."""

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
        durable_producer: Keeping,
        listener: CallListener,
        partitions: int,
        tracing: BridgeTracing | None = None,
    ) -> None:
        """`partitions` is how many each Kafka topic has: node events go to every one."""
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
        """The broker asks which hooks to call. Everything else works without this, too: it does not ask again."""
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
        logger.info("%s (EMQX %s) calls", node, request.broker.version)
        self._listener.provider_loaded(node)
        hooks = needed_hooks(self._rules, self._mountpoint, version)
        specs = [pb.HookSpec(name=each.name, topics=each.topics) for each in hooks]
        return pb.LoadedResponse(hooks=specs).SerializeToString()

    def provider_unloaded(self, data: bytes) -> bytes:
        """The broker stops, or an operator has turned the hook off: clients may stay."""
        request = pb.ProviderUnloadedRequest.FromString(data)
        logger.warning("%s calls no longer", request.meta.node[:SHOWN_MAX])
        return EMPTY

    # -- calls that are answered at once

    def told(self) -> dict[str, Notification]:
        """By name, those that become one event."""
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

    def tell(self, rpc: str, told: Notification, data: bytes) -> bytes:
        """Enter an event. What cannot be one is counted, and no concern of the broker's."""
        request = told.request.FromString(data)
        try:
            event = told.translate(request, now_ms())
        except DecodeError as error:
            self.refusals.add("invalid", f"{rpc}: {error}")
            return EMPTY
        if event is None:
            return EMPTY  # no rule wants it
        self._durable_producer.enter(told.topic, event, hook=told.hook)
        if isinstance(event, SessionTerminated | SessionDiscarded):
            self._listener.session_ended(event.client_id)
        return EMPTY

    def _delivered(self, request: pb.MessageDeliveredRequest, at: int) -> Event | None:
        event = self._translator.delivered(request, at)
        if not self._answers.wants("message.delivered", event.topic):
            return None
        return event

    def acked(self, data: bytes) -> bytes:
        """Before anything follows from it, it has its place in Kafka."""
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
        """Keep it, then let it be routed; or not, if Millpond delivers it, or nobody has it.

        Up to the first `await` this is one step: what is called earlier is entered earlier.
        """
        request = pb.MessagePublishRequest.FromString(data)
        message = request.message
        if message.topic.startswith(keys.RESERVED_TOPIC_PREFIX):
            returned = self._copy_topic.parse(message.topic)
            if returned is None:
                return self._refuse(message, "reserved", "nobody may publish there")
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
        unkept = await self._unless_kept(message, self._enter(event))
        if unkept is not None:
            return unkept
        if self._answers.may_retain(topic):
            self._listener.retainable(message.topic, event)
        if delivered and self._mountpoint is not None:
            return _answer(message, topic, allow=False)
        return IGNORE if topic == message.topic else _answer(message, topic)

    def _enter(self, event: MessagePublished) -> asyncio.Future[None]:
        """Into Kafka or the spool; and a trace begins, if this is to be one."""
        hook = "message.publish"
        span = None if self._tracing is None else self._tracing.publish(event)
        headers = () if span is None else span.headers
        kept = self._durable_producer.enter(keys.MESSAGES_TOPIC, event, hook=hook, headers=headers)
        if span is not None:
            kept.add_done_callback(span.answered)
        return kept

    async def _unless_kept(self, message: pb.Message, kept: asyncio.Future[None]) -> bytes | None:
        """The refusal of a publish that cannot be kept."""
        try:
            await asyncio.shield(kept)  # the caller may give up; the event stays
        except MillpondError as error:
            return self._refuse(message, "unkept", str(error))
        return None

    def _unmounted(self, message: pb.Message) -> str | None:
        """The topic that the publisher meant; None if it is below the mountpoint of another, or nobody's to publish to."""
        mountpoint, topic = self._mountpoint, message.topic
        if mountpoint is None or not mountpoint.holds(topic):
            return topic
        meant = mountpoint.unmount(message.from_client_id, topic)
        if meant is None or mountpoint.holds(meant):
            return None
        return None if meant.startswith(keys.RESERVED_TOPIC_PREFIX) else meant

    async def _route_copy(self, message: pb.Message, returned: ReturnedCopy) -> bytes:
        """A copy of ours: its report is in Kafka before any client can acknowledge it."""
        if message.qos > 0 and returned.lease:
            try:
                report, partition = self._report(message, returned)
            except DecodeError as error:
                return self._refuse(message, "invalid", str(error))
            hook = "message.publish"
            kept = self._durable_producer.enter(keys.MESSAGES_TOPIC, report, partition, hook=hook)
            unkept = await self._unless_kept(message, kept)
            if unkept is not None:
                return unkept
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
        """The broker does not route it, and nothing else hears of it."""
        who, where = message.from_client_id[:SHOWN_MAX], message.topic[:SHOWN_MAX]
        self.refusals.add(kind, f"{who!r}: a publish to {where!r} is refused: {why}")
        message.headers["allow_publish"] = "false"
        return pb.ValuedResponse(type="STOP_AND_RETURN", message=message).SerializeToString()

    # -- what is not asked for

    @staticmethod
    def judged(request_type: type[ProtobufMessage], data: bytes) -> bytes:
        """Another's judgement of a client stands. These hooks are not registered: anything but this would be one."""
        request: Any = request_type.FromString(data)
        return pb.ValuedResponse(type="CONTINUE", bool_result=request.result).SerializeToString()


def _answer(message: pb.Message, topic: str, *, allow: bool = True) -> bytes:
    """The broker goes on with this topic; the rest of the message is as it was."""
    message.topic = topic
    if not allow:
        message.headers["allow_publish"] = "false"
    return pb.ValuedResponse(type="CONTINUE", message=message).SerializeToString()
