"""What the messages agent knows of a topic, and the names of what falls due."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class TopicState(Struct, frozen=True, kw_only=True):
    """The retained message of a topic. A topic without one has no state.

    `indexed` says whether the body is also held by the topic's index; `expires_at` is ms or None.
    """

    message_id: str
    score: int
    expires_at: int | None
    indexed: bool


_decoder = msgspec.json.Decoder(TopicState)


def pack(state: TopicState | None) -> bytes | None:
    """The state as it is stored."""
    return None if state is None else msgspec.json.encode(state)


def unpack(packed: bytes | None) -> TopicState | None:
    """The state as it was stored. Only we write it: anything else is a bug, not an input."""
    return None if packed is None else _decoder.decode(packed)


# Members of the due set. A topic cannot hold a null character ([MQTT-4.7.3-2]), so it separates.
INDEX, RETAINED, MESSAGE = "index", "retained", "message"


def index_due(topic: str) -> str:
    """The oldest entry of a topic's index expires."""
    return f"{INDEX}\0{topic}"


def retained_due(topic: str) -> str:
    """The retained message of a topic expires."""
    return f"{RETAINED}\0{topic}"


def message_due(topic: str, message_id: str) -> str:
    """A message with an expiry of its own expires."""
    return f"{MESSAGE}\0{topic}\0{message_id}"


def split_due(member: str) -> tuple[str, str, str]:
    """Kind, topic and message id (empty but for `MESSAGE`) of a due member."""
    kind, _, rest = member.partition("\0")
    topic, _, message_id = rest.partition("\0")
    return kind, topic, message_id


def earliest(log_ms: int, lifetime_ms: int | None, expires_at: int | None) -> int | None:
    """When something kept since `log_ms` ends: by its rule's lifetime or its own expiry, the sooner."""
    if lifetime_ms is None:
        return expires_at
    end = log_ms + lifetime_ms
    return end if expires_at is None else min(end, expires_at)


def later(end: int | None, other: int | None) -> int | None:
    """The later of two ends; None is never."""
    return None if end is None or other is None else max(end, other)
