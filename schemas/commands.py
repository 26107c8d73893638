"""What a bridge is to do on its broker: the records of `mqtt.deliveries`, keyed by client id."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from millpond.schemas.events import MessageId, PayloadEncoding, QoS, Text, TimeMs, Topic

VALID_FOR_S_MAX = (
    3_600  # a command that lay an hour in Kafka says nothing about the client any more
)
ValidForS = Annotated[int, Meta(ge=1, le=VALID_FOR_S_MAX)]
COMMAND_VALID_FOR_S = (
    60  # a client that has not been reached by then is gone, or connects and asks anew
)
ATTEMPTS_MAX = 1_000_000
# More filters than this in one session are a fault of the client's; their state is rewritten with each change.
SUBSCRIPTIONS_MAX = 1_000


class Deliver(Struct, frozen=True, kw_only=True, tag_field="type", tag="deliver"):
    """Hand one message to one client, within `valid_for_s` seconds of the record's own log time, and not after
    `valid_until`: a record may reach Kafka late, and the agent counts from the lease.

    `lease` names this copy in the bridge's reports; it is empty for a retained message and a QoS 0 publish, of which
    nobody wants a report. `attempt` counts from 1. Once a command of a client failed, all its later ones of the same
    agent, partition and `epoch` fail too, or they would overtake it.
    """

    client_id: Text
    lease: Text
    epoch: Annotated[int, Meta(ge=0)] = 0
    valid_for_s: ValidForS
    attempt: Annotated[int, Meta(ge=1, le=ATTEMPTS_MAX)]
    message_id: MessageId
    topic: Topic
    qos: QoS
    retain: bool
    payload: str
    payload_encoding: PayloadEncoding = "utf-8"
    expires_at: TimeMs | None = None
    valid_until: TimeMs | None = None


class Subscribe(Struct, frozen=True, kw_only=True, tag_field="type", tag="subscribe"):
    """Subscribe a client's session to these filters, each with its QoS; valid as `Deliver` is."""

    client_id: Text
    topic_filters: tuple[tuple[Topic, QoS], ...]
    valid_for_s: ValidForS = COMMAND_VALID_FOR_S


class Unsubscribe(Struct, frozen=True, kw_only=True, tag_field="type", tag="unsubscribe"):
    """End these subscriptions of a client's session; valid as `Deliver` is."""

    client_id: Text
    topic_filters: tuple[Topic, ...]
    valid_for_s: ValidForS = COMMAND_VALID_FOR_S


Command: TypeAlias = Deliver | Subscribe | Unsubscribe
