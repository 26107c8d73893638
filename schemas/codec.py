"""Bytes to events and commands, and back.

This is the one door for foreign bytes. Whatever they hold, decoding returns an event or raises DecodeError.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Protocol

import msgspec

from millpond.schemas.commands import Command, Deliver
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import Event, Message, PayloadEncoding

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_command_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)


def encode(event: Event | Command) -> bytes:
    """Encode as canonical JSON: `type` first, then the fields in the order of their declaration."""
    return _encoder.encode(event)


def decode(value: bytes | None) -> Event:
    """Decode the event in a record's value.

    Raises:
        DecodeError: The value is missing, is no JSON, or has an unknown type. Or a field is missing or has a wrong
            type. Or text is not UTF-8 or too long. Or a payload is not base64 although its encoding says so.
            Nothing else is raised, whatever the bytes.
    """
    if value is None:
        raise DecodeError("the record has no value")
    try:
        event = _decoder.decode(value)
        if isinstance(event, Message) and event.payload_encoding == "base64":
            b64decode(event.payload, validate=True)
    # ValueError: the text is not UTF-8, or no base64. RecursionError: a hundred thousand open brackets.
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    return event


def decode_command(value: bytes | None) -> Command:
    """Decode the command in a record's value.

    Raises:
        DecodeError: As in `decode`.
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
    """Anything with a payload: an event, a command, or a message read from a store."""

    @property
    def payload(self) -> str:
        """The payload as text, or in base64."""
        ...

    @property
    def payload_encoding(self) -> PayloadEncoding:
        """How `payload` is written."""
        ...


def payload_bytes(event: HasPayload) -> bytes:
    """Return the payload as the publisher sent it. Never fails for a decoded message: decoding has checked base64."""
    if event.payload_encoding == "base64":
        return b64decode(event.payload, validate=True)
    return event.payload.encode()


def payload_text(payload: bytes) -> tuple[str, PayloadEncoding]:
    """Return the text and the encoding that carry a payload: UTF-8 stays text, any other payload becomes base64."""
    try:
        return payload.decode(), "utf-8"
    except UnicodeDecodeError:
        return b64encode(payload).decode(), "base64"
