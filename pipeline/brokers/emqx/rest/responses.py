"""What EMQX's REST API (`/api/v5`) answers, as far as it is read: everything else in an answer is ignored."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

from millpond.schemas.events import TIME_MS_MAX, ClientId, MessageId, QoS, Text, Topic

NO_MATCHING_SUBSCRIBERS: Final = 16  # MQTT's reason code 0x10
NOT_HANDED_OVER: Final = (
    131  # 0x83, beside 503: a subscriber matches, and did not get it, as while a node restarts
)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Time: TypeAlias = str | int | None  # RFC 3339; whatever cannot be read as that is as good as none


class ErrorBody(Struct, frozen=True):
    """An error's body: `code` is EMQX's word for it, `reason_code` MQTT's number."""

    code: str | int | None = None
    reason_code: int | None = None
    message: str | None = None


class PublishResult(Struct, frozen=True):
    """What came of one message: the broker's `id` of it, or why it was not routed."""

    id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    reason_code: int | None = None
    message: str | None = None


class PageMeta(Struct, frozen=True):
    """What is said of a page; `count` is left out where counting would be slow."""

    hasnext: bool = False


class Page(Struct, frozen=True):
    """One page of a list; each row is read by itself."""

    data: list[msgspec.Raw]
    meta: PageMeta


class ClientRow(Struct, frozen=True):
    """A client with a session; not `connected` while that waits for it. Intervals are seconds."""

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
    """A filter that a session holds, with its mountpoint, and with `$share/{group}/` in front if it has one."""

    clientid: ClientId | None
    topic: Topic
    qos: QoS = 0
    node: Text | None = None
    rh: int = 0


class NodeRow(Struct, frozen=True):
    """A node of the cluster; `uptime` is milliseconds, in words before 5.0."""

    node: Text
    node_status: str = "running"
    uptime: int | str = 0

    @property
    def running(self) -> bool:
        """Whether it has clients to tell of."""
        return self.node_status.lower() == "running"


class RetainedRow(Struct, frozen=True):
    """A retained message; `payload` is base64, and left out above 1 MiB."""

    msgid: MessageId
    topic: Topic
    qos: QoS
    from_clientid: ClientId = ""
    from_username: Text | None = None
    publish_at: Time = None
    payload: str | None = None


class SubscribeResult(Struct, frozen=True):
    """What of a bulk of subscriptions was not granted; EMQX answers with a list if all were."""

    failed: list[msgspec.Raw] = []


def milliseconds(time: Time) -> int | None:
    """A time in milliseconds since the epoch, if it is one."""
    try:
        at = datetime.fromisoformat(time if isinstance(time, str) else "")
        at_ms = (at - EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError, TypeError):  # no time, beyond all time, or without a zone
        return None
    return at_ms if 0 <= at_ms <= TIME_MS_MAX else None
