"""The answers of EMQX's REST API (`/api/v5`). Only fields that the bridge uses are listed; others are ignored."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from millpond.pipeline.brokers.emqx.times import Time
from millpond.schemas.events import ClientId, MessageId, QoS, Text, Topic

NO_MATCHING_SUBSCRIBERS: Final = 16  # MQTT's reason code 0x10
# 0x83, together with 503: a subscriber matches, but did not get the message. Seen while a node restarts.
NOT_HANDED_OVER: Final = 131


class ErrorBody(Struct, frozen=True):
    """The body of an error: `code` is EMQX's word, `reason_code` is MQTT's number."""

    code: str | int | None = None
    reason_code: int | None = None
    message: str | None = None


class PublishResult(Struct, frozen=True):
    """The result of one publish: the `id` that EMQX gave to the message, or the reason why it was not routed."""

    id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    reason_code: int | None = None
    message: str | None = None


class PageMeta(Struct, frozen=True):
    """The position of a page. EMQX also sends a `count`, except where counting would be slow."""

    hasnext: bool = False


class Page(Struct, frozen=True):
    """One page of a list. Each row is decoded by itself, so that an unreadable one does not spoil the others."""

    data: list[msgspec.Raw]
    meta: PageMeta


class ClientRow(Struct, frozen=True):
    """A client with a session; `connected` is False while the session waits for its client. Intervals in seconds."""

    clientid: ClientId
    connected: bool
    node: Text | None = None
    username: Text | None = None
    ip_address: Text = ""
    port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    connected_at: Time = None
    clean_start: bool = True
    expiry_interval: Annotated[float, Meta(ge=0)] = 0
    mountpoint: Text | None = None
    proto_name: Text = "MQTT"
    proto_ver: int | str = 4
    is_expired: bool = False


class SubscriptionRow(Struct, frozen=True):
    """A subscription: `topic` is the filter with its mountpoint, and `$share/{group}/` in front of a shared one."""

    clientid: ClientId | None
    topic: Topic
    qos: QoS = 0
    node: Text | None = None
    rh: int = 0


class NodeRow(Struct, frozen=True):
    """A node of the cluster; `uptime` is in milliseconds. EMQX before 5.0 writes it in words."""

    node: Text
    node_status: str = "running"
    uptime: int | str = 0

    @property
    def running(self) -> bool:
        """True if the node runs, so that it may have clients."""
        return self.node_status.lower() == "running"


class RetainedRow(Struct, frozen=True):
    """A retained message; `payload` is base64. EMQX leaves it out above 1 MiB."""

    msgid: MessageId
    topic: Topic
    qos: QoS
    from_clientid: ClientId = ""
    from_username: Text | None = None
    publish_at: Time = None
    payload: str | None = None


class SubscribeResult(Struct, frozen=True):
    """The subscriptions of a bulk that EMQX did not grant. If it granted all, it answers with a list instead."""

    failed: list[msgspec.Raw] = []
