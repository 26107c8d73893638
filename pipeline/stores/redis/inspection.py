"""Reads that only the CLI and the web page need: counts, positions, fences, rules, receipts, lifetimes."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

from millpond.pipeline.stores.redis.connection import (
    RedisCommand,
    checked,
    escape_glob,
)
from millpond.pipeline.stores.redis.foreign_keys import is_wrong_type
from millpond.pipeline.stores.redis.packing import decode_applied
from millpond.schemas import keys
from millpond.schemas.keys import Partition

SCAN_COUNT: Final = 500  # members of one answer, about


class ReadFence(NamedTuple):
    """The fence of a partition; answered by `Applied | None`."""


class ReadRules(NamedTuple):
    """The rules in force, in canonical form; answered by `str | None`."""


class CountIndex(NamedTuple):
    """The number of messages in a topic's index; answered by `int`."""

    topic: str


class CountBefore(NamedTuple):
    """The number of messages before one in its topic's index; answered by `int`, or None if the index does not have it."""

    topic: str
    message_id: str


class CountBetween(NamedTuple):
    """The number of messages of a topic with `after < score <= last`; answered by `int`."""

    topic: str
    after: int
    last: int


class ReadReceipt(NamedTuple):
    """The receipt of a message; answered by `dict[field, epoch seconds]`. See docs/reference/redis-keys.md."""

    message_id: str


class ReadLifetime(NamedTuple):
    """The time until the server deletes a body; answered by ms, or None without an expiry or a body."""

    message_id: str


class ScanDue(NamedTuple):
    """A page of the due things whose names have a prefix; answered by `(next cursor, list[name])`.

    The first cursor is 0. The next cursor is 0 after the last page.
    """

    cursor: int
    prefix: str


InspectionRead: TypeAlias = (
    ReadFence
    | ReadRules
    | CountIndex
    | CountBefore
    | CountBetween
    | ReadReceipt
    | ReadLifetime
    | ScanDue
)

# Reads of public keys. Another program may have put a key of another type there, which counts as empty: `StoreReader` names it.
PUBLIC: Final = (CountIndex, CountBefore, CountBetween, ReadReceipt)


def inspection_command(partition: Partition, read: InspectionRead) -> RedisCommand:
    """Return the command that answers a read. Its second word is the key."""
    match read:
        case ReadFence():
            return ("GET", keys.applied(partition))
        case ReadRules():
            return ("GET", keys.rules(partition))
        case CountIndex(topic):
            return ("ZCARD", keys.message_index(topic))
        case CountBefore(topic, message_id):
            return ("ZRANK", keys.message_index(topic), message_id)
        case CountBetween(topic, after, last):
            return ("ZCOUNT", keys.message_index(topic), f"({after}", last)
        case ReadReceipt(message_id):
            return ("HGETALL", keys.receipt(message_id))
        case ReadLifetime(message_id):
            return ("PTTL", keys.message_body(message_id))
        case ScanDue(cursor, prefix):
            pattern = f"{escape_glob(prefix)}*"
            return ("ZSCAN", keys.due(partition), cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)


def inspection_answer(read: InspectionRead, reply: Any, where: object) -> Any:
    """Decode the reply to a read. `where` names the server in errors.

    Raises:
        StoreDown, StoreRefused: the reply is an error. A public key of another type is not: it counts as empty.
    """
    if is_wrong_type(reply) and isinstance(read, PUBLIC):
        reply = {CountBefore: None, ReadReceipt: []}.get(type(read), 0)
    checked((reply,), where)
    match read:
        case ReadFence():
            return None if reply is None else decode_applied(reply)
        case ReadRules():
            return None if reply is None else reply.decode()
        case ReadReceipt():
            return {
                field.decode("utf-8", "replace"): int(at)
                for field, at in zip(reply[::2], reply[1::2], strict=True)
                if at.isdigit()
            }
        case ReadLifetime():
            # PTTL: -1 without an expiry, -2 without a key.
            return reply if reply >= 0 else None
        case ScanDue():
            cursor, pairs = reply
            return int(cursor), [name.decode() for name in pairs[::2]]
        case _:
            return reply
