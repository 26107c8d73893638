"""Commands: the records of `mqtt.deliveries`, keyed by client id. Agents write them, and bridges carry them out.

**Validity.** A command is valid for `valid_for_s` seconds from the append time of its record. After that, or after
`expires_at`, a bridge does not carry it out. If it has a lease, the bridge reports it as `stale`.

**Order.** The commands of one client share a partition of the topic, so a bridge reads them in the order of the log.

**Epoch.** After a failed `deliver`, all later ones of the same client, agent, partition and epoch fail, too.
Otherwise a later message would overtake the failed one, which its agent delivers again.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from millpond.schemas.events import MessageId, PayloadEncoding, QoS, Text, TimeMs, Topic

# After an hour in Kafka, a command says nothing about its client any more.
VALID_FOR_S_MAX = 3_600
ValidForS = Annotated[int, Meta(ge=1, le=VALID_FOR_S_MAX)]
# A client that no bridge reached within a minute is offline, or has connected again since.
COMMAND_VALID_FOR_S = 60
# Far above any real count: `max_deliveries` is at most 1,000.
ATTEMPTS_MAX = 1_000_000
# More filters in one session are a fault of the client. The session's state is written again with each change.
SUBSCRIPTIONS_MAX = 1_000


class Deliver(Struct, frozen=True, kw_only=True, tag_field="type", tag="deliver"):
    """Deliver one message to one client.

    client_id: The receiver.
    lease: The name of the lease, which the bridge's report repeats. Empty if no agent waits for a report:
        retained messages and QoS 0 publishes.
    epoch: See the head of this module.
    valid_for_s: See the head of this module.
    valid_until: The end of the validity in ms of the log's time, if the record reached Kafka late. None: `valid_for_s` alone.
    attempt: Which delivery of the message this is, from 1.
    message_id: The id of the stored message. The broker may give the copy another one.
    topic: The topic of the message.
    qos: The QoS of the copy: the lower one of message and subscription.
    retain: True if the message is delivered because it is retained.
    payload, payload_encoding: The payload, as text or in base64.
    expires_at: When the message expires, in ms: by its own expiry or by its rule, whichever is earlier. None: never.
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
    """Subscribe a client's session to these filters, each with its QoS."""

    client_id: Text
    topic_filters: tuple[tuple[Topic, QoS], ...]
    valid_for_s: ValidForS = COMMAND_VALID_FOR_S


class Unsubscribe(Struct, frozen=True, kw_only=True, tag_field="type", tag="unsubscribe"):
    """End these subscriptions of a client's session."""

    client_id: Text
    topic_filters: tuple[Topic, ...]
    valid_for_s: ValidForS = COMMAND_VALID_FOR_S


Command: TypeAlias = Deliver | Subscribe | Unsubscribe
