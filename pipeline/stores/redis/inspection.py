"""What only those ask of a store who look at it from outside: counts, places, the fence, receipts."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

from hiredis import ReplyError

from millpond.pipeline.stores.redis.connection import RedisCommand, checked, code
from millpond.pipeline.stores.redis.packing import decode_applied
from millpond.schemas import keys
from millpond.schemas.keys import Partition

SCANNED: Final = 500  # members of one answer, about
GLOB_SPECIAL: Final = "*?[]\\"


class ReadFence(NamedTuple):
    """The fence of the partition's state; answered by `Applied | None`."""


class ReadRules(NamedTuple):
    """The rules in force, in canonical form; answered by `str | None`."""


class CountIndex(NamedTuple):
    """How many messages a topic's index holds; answered by a number."""

    topic: str


class CountBefore(NamedTuple):
    """How many messages of a topic's index are before one; answered by a number, None if it is not there."""

    topic: str
    message_id: str


class CountBetween(NamedTuple):
    """How many messages of a topic's index are behind a score and up to another; answered by a number."""

    topic: str
    after: int
    last: int


class ReadReceipt(NamedTuple):
    """Who got and who acknowledged a message; answered by `dict[field, epoch seconds]`."""

    message_id: str


class ReadLifetime(NamedTuple):
    """How long a message's body is kept by itself; answered by ms, None if for ever or gone."""

    message_id: str


class ScanDue(NamedTuple):
    """Some of what falls due and is named so, from a cursor on (0 to begin); answered by `(next cursor or 0, list[name])`."""

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

# What others may have put something else in the place of: it is as good as empty then.
PUBLIC: Final = (CountIndex, CountBefore, CountBetween, ReadReceipt)


def outside_command(partition: Partition, read: InspectionRead) -> RedisCommand:
    """The one command that answers; its second word is the key."""
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
            pattern = "".join(f"\\{each}" if each in GLOB_SPECIAL else each for each in prefix)
            return ("ZSCAN", keys.due(partition), cursor, "MATCH", f"{pattern}*", "COUNT", SCANNED)


def outside_answer(read: InspectionRead, reply: Any, where: object) -> Any:
    """What the reply says.

    Raises:
        StoreDown, StoreRefused: it is an error that says so.
    """
    if isinstance(reply, ReplyError) and code(reply) == "WRONGTYPE" and isinstance(read, PUBLIC):
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
            return reply if reply >= 0 else None
        case ScanDue():
            cursor, pairs = reply
            return int(cursor), [name.decode() for name in pairs[::2]]
        case _:
            return reply
