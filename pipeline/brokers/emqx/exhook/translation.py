"""The translation of EMQX's requests into canonical events. Pure; everything foreign is validated here.

EMQX leaves out some facts, and the events' defaults stand for them: `clean_start` and session expiry of a connect, and
the retain flag of a publish (`rest/retained.py` asks for retained messages).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, TypeAlias

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint, reported_filter
from millpond.pipeline.brokers.emqx.times import milliseconds
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
REASONS: Final = {"takeovered": "takenover"}  # the spelling of EMQX 4
SHUTDOWN: Final = re.compile(r"\{shutdown,([a-z_]+)\}\Z")  # Erlang's wrapping of a reason


Received: TypeAlias = pb.MessageDeliveredRequest | pb.MessageAckedRequest


class Translator:
    """One per bridge. Every method raises DecodeError for a request that cannot become a valid event."""

    def __init__(self, mountpoint: Mountpoint | None) -> None:
        """With a mountpoint Millpond delivers, without one EMQX does."""
        self._mountpoint = mountpoint
        self.broker_delivers = mountpoint is None

    # -- clients

    def connected(self, request: pb.ClientConnectedRequest, at: int) -> ClientConnected:
        """Translate a connect."""
        client = request.clientinfo
        return ClientConnected(
            at=at, node=node_of(client.node), client_id=client_id_of(client),
            username=_text(client.username) or None, connection_id=connection_of(client),
            connected_at=at, protocol="MQTT" if client.protocol == "mqtt" else _text(client.protocol),
        )  # fmt: skip

    def disconnected(self, request: pb.ClientDisconnectedRequest, at: int) -> ClientDisconnected:
        """Translate a disconnect. The reason is EMQX's: `takenover` and `discarded` announce a newer connection."""
        client = request.clientinfo
        return ClientDisconnected(
            at=at, node=node_of(client.node), client_id=client_id_of(client),
            connection_id=connection_of(client), reason=reason_of(request.reason),
        )  # fmt: skip

    # -- sessions

    def created(self, request: pb.SessionCreatedRequest, at: int) -> SessionCreated:
        """Translate the start of a session."""
        client = request.clientinfo
        return SessionCreated(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def resumed(self, request: pb.SessionResumedRequest, at: int) -> SessionResumed:
        """Translate the resumption of a session. EMQX does not report its subscriptions again."""
        client = request.clientinfo
        return SessionResumed(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def discarded(self, request: pb.SessionDiscardedRequest, at: int) -> SessionDiscarded:
        """Translate the end of a session that a clean start replaces. `clientinfo` is that of the old connection."""
        client = request.clientinfo
        return SessionDiscarded(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def taken_over(self, request: pb.SessionTakenoverRequest, at: int) -> SessionTakenOver:
        """Translate the move of a session to a new connection. `clientinfo` is that of the old connection."""
        client = request.clientinfo
        return SessionTakenOver(at=at, node=node_of(client.node), client_id=client_id_of(client))

    def terminated(self, request: pb.SessionTerminatedRequest, at: int) -> SessionTerminated:
        """Translate the end of a session that no other one replaces."""
        client = request.clientinfo
        return SessionTerminated(
            at=at, node=node_of(client.node), client_id=client_id_of(client),
            reason=reason_of(request.reason),
        )  # fmt: skip

    def subscribed(self, request: pb.SessionSubscribedRequest, at: int) -> SessionSubscribed:
        """Translate a granted subscription."""
        client, options = request.clientinfo, request.subopts
        mounted = reported_filter(request.topic, options.share)
        topic_filter, reachable = self.own_filter(client_id_of(client), client.mountpoint, mounted)
        if options.rh > 2:
            raise DecodeError(f"a retain handling of {options.rh}")
        return SessionSubscribed(
            at=at, node=node_of(client.node), client_id=client.clientid, topic_filter=topic_filter,
            qos=qos_of(options.qos), retain_handling=options.rh,
            broker_delivers=self.broker_delivers, reachable=reachable,
        )  # fmt: skip

    def unsubscribed(self, request: pb.SessionUnsubscribedRequest, at: int) -> SessionUnsubscribed:
        """Translate an unsubscription. Before 5.4 EMQX does not report the group of a shared subscription."""
        client = request.clientinfo
        mounted = reported_filter(request.topic)
        topic_filter, _ = self.own_filter(client_id_of(client), client.mountpoint, mounted)
        return SessionUnsubscribed(
            at=at, node=node_of(client.node), client_id=client.clientid, topic_filter=topic_filter
        )

    def own_filter(self, client_id: str, mounted_at: str, mounted: str) -> tuple[str, bool]:
        """The filter as the client wrote it, and whether Millpond can reach the client through it.

        `mounted_at` is the mountpoint of the client's listener, or empty. `mounted` is the filter as EMQX holds it, in
        standard form. Only Millpond's own mountpoint is removed from it.
        """
        error = filter_error(mounted)
        if error is not None:
            raise DecodeError(error)
        if self._mountpoint is None:
            return mounted, True
        if mounted_at != self._mountpoint.of(client_id):
            return mounted, False
        own = self._mountpoint.unmount_filter(client_id, mounted)
        if own is None or filter_error(own) is not None:
            return mounted, False
        return own, self._mountpoint.can_serve(client_id)

    # -- messages

    def published(self, request: pb.MessagePublishRequest, topic: str, at: int) -> MessagePublished:
        """Translate a publish to `topic`, which has no mountpoint any more."""
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
        """Translate a delivery. Its QoS is the effective one."""
        client, message = request.clientinfo, request.message
        return MessageDelivered(
            at=at, node=node_of(client.node), message_id=message_id_of(message.id),
            topic=self.own_topic(request), client_id=client_id_of(client),
            from_client_id=message.from_client_id or None, qos=qos_of(message.qos),
        )  # fmt: skip

    def acked(self, request: pb.MessageAckedRequest, at: int) -> MessageAcked:
        """Translate an acknowledgement: a PUBACK, or a PUBREC."""
        client, message = request.clientinfo, request.message
        return MessageAcked(
            at=at, node=node_of(client.node), message_id=message_id_of(message.id),
            topic=self.own_topic(request), client_id=client_id_of(client),
            from_client_id=message.from_client_id or None, qos=qos_of(message.qos),
            broker_delivers=self.broker_delivers,
        )  # fmt: skip

    def own_topic(self, request: Received) -> str:
        """The topic of a message as the receiving client sees it."""
        client, topic = request.clientinfo, request.message.topic
        mountpoint = self._mountpoint
        if mountpoint is not None and client.mountpoint == mountpoint.of(client.clientid):
            topic = mountpoint.unmount(client.clientid, topic) or topic
        _check_topic(topic)
        return topic


def node_started(request: pb.ProviderLoadedRequest) -> NodeStarted | None:
    """The start of a node, at its boot time. None if the request has no boot time (EMQX 4).

    EMQX also sends the request when an operator enables the hook again. Clients that connected since the boot are still
    there then, so the event must not have the time of the request.
    """
    sent_at, uptime = milliseconds(request.broker.datetime), request.broker.uptime
    if sent_at is None or not 0 < uptime <= sent_at:
        return None
    return NodeStarted(at=sent_at - uptime, node=node_of(request.meta.node))


# -- parts


def node_of(name: str) -> str:
    """The name of a broker node."""
    if not name:
        raise DecodeError("the request names no node")
    return _text(name)


def client_id_of(client: pb.ClientInfo) -> str:
    """The client id, which must not be empty."""
    if not client.clientid:
        raise DecodeError("the request names no client")
    return _client_id(client.clientid)


def connection_of(client: pb.ClientInfo) -> str:
    """The identity of a connection. Two connections of one client differ at least in the port."""
    return _text(f"{client.node}/{client.peerhost}:{client.peerport}")


def reason_of(text: str) -> str:
    """Why a connection or a session ended, without Erlang's wrapping."""
    wrapped = SHUTDOWN.match(text)
    reason = text if wrapped is None else wrapped[1]
    return _text(REASONS.get(reason, reason))


def message_id_of(text: str) -> str:
    """The broker's id of a message."""
    if not 0 < len(text) <= MESSAGE_ID_LENGTH_MAX:
        raise DecodeError(f"a message id of {len(text)} characters")
    return text


def qos_of(number: int) -> int:
    """0, 1 or 2."""
    if number > 2:
        raise DecodeError(f"a QoS of {number}")
    return number


def time_of(time_ms: int) -> int:
    """A time in milliseconds since the epoch, within the range of events."""
    if time_ms > TIME_MS_MAX:
        raise DecodeError(f"a time of {time_ms} ms")
    return time_ms


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


def _client_id(text: str) -> str:
    if "\0" in text:
        raise DecodeError("a client id contains a null character")
    return _text(text)


def _text(text: str) -> str:
    if len(text) > TEXT_BYTES_MAX:
        raise DecodeError(f"a text of {len(text)} characters")
    return text
