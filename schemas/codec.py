"""Bytes to events and back, at one door: whatever cannot be read is a `DecodeError`."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Protocol

import msgspec

from millpond.schemas.commands import Command, Deliver
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import TEXT_BYTES_MAX, Event, Message, PayloadEncoding

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_command_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)


def encode(event: Event | Command) -> bytes:
    """The canonical JSON of an event or command: `type` first, then its fields in the order they are declared."""
    return _encoder.encode(event)


def decode(value: bytes | None) -> Event:
    """The event in a record's value.

    Raises:
        DecodeError: not JSON, an unknown type, a missing or mistyped field, a payload that is not what
            its encoding says, text that is not UTF-8 or too long. Nothing else is ever raised.
    """
    if value is None:
        raise DecodeError("the record has no value")
    try:
        event = _decoder.decode(value)
        if isinstance(event, Message) and event.payload_encoding == "base64":
            b64decode(event.payload, validate=True)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    return event


def decode_command(value: bytes | None) -> Command:
    """The command in a record's value.

    Raises:
        DecodeError: as `decode`.
    """
    if value is None:
        raise DecodeError("the record has no value")
    try:
        command = _command_decoder.decode(value)
        if isinstance(command, Deliver):
            payload_bytes(command)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    return command


class HasPayload(Protocol):
    """A message, however much else is known of it."""

    @property
    def payload(self) -> str:
        """Text, or base64."""
        ...

    @property
    def payload_encoding(self) -> PayloadEncoding:
        """Which of the two."""
        ...


def payload_bytes(event: HasPayload) -> bytes:
    """The payload as the publisher sent it. What was decoded always has one."""
    if event.payload_encoding == "base64":
        return b64decode(event.payload, validate=True)
    return event.payload.encode()


def payload_text(payload: bytes) -> tuple[str, PayloadEncoding]:
    """The text and encoding that carry a payload: UTF-8 as it is, anything else as base64."""
    try:
        return payload.decode(), "utf-8"
    except UnicodeDecodeError:
        return b64encode(payload).decode(), "base64"


def topic_name_error(topic: str) -> str | None:
    """Why `topic` cannot be published to, or None ([MQTT-4.7.1-1], [MQTT-4.7.3-1], [MQTT-4.7.3-2])."""
    if not topic:
        return "the topic is empty"
    if "+" in topic or "#" in topic:
        return "the topic holds a wildcard"
    if "\0" in topic:
        return "the topic holds a null character"
    if len(topic.encode("utf-8", "surrogatepass")) > TEXT_BYTES_MAX:
        return f"the topic is longer than {TEXT_BYTES_MAX} bytes"
    return None
