"""What EMQX tells, as canonical events; pure, and all that is foreign is checked here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, TypeAlias

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint, standard_filter
from millpond.pipeline.brokers.emqx.rest.responses import milliseconds
from millpond.schemas import codec
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import (
    MESSAGE_ID_LENGTH_MAX,
    TEXT_BYTES_MAX,
    TIME_MS_MAX,
    ClientConnected,
    ClientDisconnected,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    NodeStarted,
    SessionCreated,
    SessionDiscarded,
    SessionResumed,
    SessionSubscribed,
    SessionTakenOver,
    SessionTerminated,
    SessionUnsubscribed,
)
from millpond.schemas.topics import filter_error, topic_name_error

EXPIRY_PROPERTY: Final = "Message-Expiry-Interval"  # [MQTT5-3.3.2.3.3], in seconds
SECONDS_DIGITS_MAX: Final = 10  # a four byte integer
# EMQX 4 spells the reason differently.
REASONS: Final = {"takeovered": "takenover"}
SHUTDOWN: Final = re.compile(r"\{shutdown,([a-z_]+)\}\Z")  # how Erlang writes why a process ended


Received: TypeAlias = pb.MessageDeliveredRequest | pb.MessageAckedRequest


class Translator:
    """One per bridge; `mountpoint` is set where Millpond delivers. Every method raises DecodeError for what no event
    can say.
    """

    def __init__(self, mountpoint: Mountpoint | None) -> None:
        """Without a mountpoint the broker delivers."""
        self._mountpoint = mountpoint
        self.broker_delivers = mountpoint is None

    # -- clients

    def connected(self, request: pb.ClientConnectedRequest, at: int) -> ClientConnected:
        """`clean_start` and the expiry are not told: the event's defaults stand for that."""
        client = request.clientinfo
        return ClientConnected(
            at=at, node=node_of(client.node), client_id=client_id_of(client),
            username=_text(client.username) or None, connection_id=connection_of(client),
            connected_at=at, protocol="MQTT" if client.protocol == "mqtt" else _text(client.protocol),
        )  # fmt: skip

    def disconnected(self, request: pb.ClientDisconnectedRequest, at: int) -> ClientDisconnected:
        """The reason is EMQX's own; `takenover` and `discarded` hand over to a newer connection."""
        client = request.clientinfo
        return ClientDisconnected(
            at=at, node=node_of(client.node), client_id=client_id_of(client),
            connection_id=connection_of(client), reason=reason_of(request.reason),
        )  # fmt: skip

    # -- sessions

    def created(self, request: pb.SessionCreatedRequest, at: int) -> SessionCreated:
        """A new session."""
        client = request.clientinfo
        return SessionCreated(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def resumed(self, request: pb.SessionResumedRequest, at: int) -> SessionResumed:
        """A session that was there; its subscriptions are not told again."""
        client = request.clientinfo
        return SessionResumed(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def discarded(self, request: pb.SessionDiscardedRequest, at: int) -> SessionDiscarded:
        """Told of the connection that goes."""
        client = request.clientinfo
        return SessionDiscarded(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def taken_over(self, request: pb.SessionTakenoverRequest, at: int) -> SessionTakenOver:
        """Told of the connection that goes."""
        client = request.clientinfo
        return SessionTakenOver(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def terminated(self, request: pb.SessionTerminatedRequest, at: int) -> SessionTerminated:
        """The end of a session that nothing replaced."""
        client = request.clientinfo
        return SessionTerminated(
            at=at, node=node_of(client.node), client_id=client_id_of(client),
            reason=reason_of(request.reason),
        )  # fmt: skip

    def subscribed(self, request: pb.SessionSubscribedRequest, at: int) -> SessionSubscribed:
        """A filter was granted."""
        client, options = request.clientinfo, request.subopts
        told = standard_filter(request.topic, options.share)
        topic_filter, reachable = self.own_filter(client_id_of(client), client.mountpoint, told)
        if options.rh > 2:
            raise DecodeError(f"a retain handling of {options.rh}")
        return SessionSubscribed(
            at=at, node=node_of(client.node), client_id=client.clientid, topic_filter=topic_filter,
            qos=qos_of(options.qos), retain_handling=options.rh,
            broker_delivers=self.broker_delivers, reachable=reachable,
        )  # fmt: skip

    def unsubscribed(self, request: pb.SessionUnsubscribedRequest, at: int) -> SessionUnsubscribed:
        """A filter was given up. Before EMQX 5.4 nobody tells of which group it was."""
        client = request.clientinfo
        told = standard_filter(request.topic)
        topic_filter, _ = self.own_filter(client_id_of(client), client.mountpoint, told)
        return SessionUnsubscribed(
            at=at, node=node_of(client.node), client_id=client.clientid, topic_filter=topic_filter
        )

    def own_filter(self, client_id: str, mounted_at: str, told: str) -> tuple[str, bool]:
        """A filter as the client subscribed to it, and whether what is delivered there reaches this client alone.

        `mounted_at` is what stands in front of its topics, if anything does; `told` the filter as the broker holds it,
        in standard form. Where the broker delivers, and below mountpoints that are not Millpond's, that is the filter.
        """
        error = filter_error(told)
        if error is not None:
            raise DecodeError(error)
        if self._mountpoint is None:
            return told, True
        if mounted_at != self._mountpoint.of(client_id):
            return told, False
        own = self._mountpoint.unmount_filter(client_id, told)
        if own is None or filter_error(own) is not None:
            return told, False
        return own, self._mountpoint.can_serve(client_id)

    # -- messages

    def published(self, request: pb.MessagePublishRequest, topic: str, at: int) -> MessagePublished:
        """A publish to `topic`, which is un-mounted. The retain flag is not told."""
        message = request.message
        _check_topic(topic)
        published_at = time_of(message.timestamp) or at
        payload, encoding = codec.payload_text(message.payload)
        return MessagePublished(
            at=published_at, node=node_of(message.node), message_id=message_id_of(message.id),
            topic=topic, qos=qos_of(message.qos), retain=False,
            client_id=_client_id(message.from_client_id),
            username=_text(message.headers.get("username", "")) or None, payload=payload, payload_encoding=encoding,
            published_at=published_at, expires_at=_expires_at(request.props, published_at),
            user_properties={each.name: each.value for each in request.user_props},
        )  # fmt: skip

    def delivered(self, request: pb.MessageDeliveredRequest, at: int) -> MessageDelivered:
        """The QoS is the effective one."""
        client, message = request.clientinfo, request.message
        return MessageDelivered(
            at=at, node=node_of(client.node), message_id=message_id_of(message.id),
            topic=self.own_topic(request), client_id=client_id_of(client),
            from_client_id=message.from_client_id or None, qos=qos_of(message.qos),
        )  # fmt: skip

    def acked(self, request: pb.MessageAckedRequest, at: int) -> MessageAcked:
        """A PUBACK, or a PUBREC."""
        client, message = request.clientinfo, request.message
        return MessageAcked(
            at=at, node=node_of(client.node), message_id=message_id_of(message.id),
            topic=self.own_topic(request), client_id=client_id_of(client),
            from_client_id=message.from_client_id or None, qos=qos_of(message.qos),
            broker_delivers=self.broker_delivers,
        )  # fmt: skip

    def own_topic(self, request: Received) -> str:
        """The topic of a message as its receiver sees it."""
        client, topic = request.clientinfo, request.message.topic
        mountpoint = self._mountpoint
        if mountpoint is not None and client.mountpoint == mountpoint.of(client.clientid):
            topic = mountpoint.unmount(client.clientid, topic) or topic
        _check_topic(topic)
        return topic


def node_started(request: pb.ProviderLoadedRequest) -> NodeStarted | None:
    """The node's start, at its boot time: it also tells so when an operator turns the hook on again, and whoever has
    connected since that start is still there. None if it does not say when that was (EMQX 4).
    """
    told_at, uptime = milliseconds(request.broker.datetime), request.broker.uptime
    if told_at is None or not 0 < uptime <= told_at:
        return None
    return NodeStarted(at=told_at - uptime, node=node_of(request.meta.node))


# -- parts


def node_of(name: str) -> str:
    """The name of a broker node."""
    if not name:
        raise DecodeError("no node is named")
    return _text(name)


def client_id_of(client: pb.ClientInfo) -> str:
    """Whose event it is."""
    if not client.clientid:
        raise DecodeError("no client is named")
    return _client_id(client.clientid)


def connection_of(client: pb.ClientInfo) -> str:
    """The identity of a connection: of two of one client, at least the port differs."""
    return _text(f"{client.node}/{client.peerhost}:{client.peerport}")


def reason_of(told: str) -> str:
    """Why a connection or a session ended, without Erlang's wrapping."""
    wrapped = SHUTDOWN.match(told)
    reason = told if wrapped is None else wrapped[1]
    return _text(REASONS.get(reason, reason))


def message_id_of(told: str) -> str:
    """The broker's id of a message."""
    if not 0 < len(told) <= MESSAGE_ID_LENGTH_MAX:
        raise DecodeError(f"a message id of {len(told)} characters")
    return told


def qos_of(told: int) -> int:
    """0, 1 or 2."""
    if told > 2:
        raise DecodeError(f"a QoS of {told}")
    return told


def time_of(told_ms: int) -> int:
    """Milliseconds since the epoch."""
    if told_ms > TIME_MS_MAX:
        raise DecodeError(f"a time of {told_ms} ms")
    return told_ms


def _expires_at(properties: Iterable[pb.Property], published_at: int) -> int | None:
    for each in properties:
        seconds = each.value
        if each.name == EXPIRY_PROPERTY and seconds.isascii() and seconds.isdigit():
            if len(seconds) > SECONDS_DIGITS_MAX:
                return None
            return min(published_at + int(seconds) * 1_000, TIME_MS_MAX)
    return None


def _check_topic(topic: str) -> None:
    error = topic_name_error(topic)
    if error is not None:
        raise DecodeError(error)


def _client_id(told: str) -> str:
    if "\0" in told:
        raise DecodeError("a client id holds a null character")
    return _text(told)


def _text(told: str) -> str:
    if len(told) > TEXT_BYTES_MAX:
        raise DecodeError(f"a text of {len(told)} characters")
    return told
