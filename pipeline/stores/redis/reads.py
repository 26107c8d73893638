"""What a machine asks of the store, as Redis commands, and their replies as answers."""

from __future__ import annotations

from typing import Any, Final

from hiredis import ReplyError

from millpond.agents.reads import (
    Read,
    ReadAllStates,
    ReadBelow,
    ReadBody,
    ReadDue,
    ReadEntry,
    ReadIndex,
    ReadLast,
    ReadNames,
    ReadRetained,
    ReadStates,
    ReadSubscriptions,
)
from millpond.pipeline.stores.redis.connection import RedisCommand, checked, code
from millpond.schemas import keys
from millpond.schemas.keys import Partition

SCANNED: Final = 500  # states of one answer, about
# What others may have put something else in the place of: it is as good as empty then.
PUBLIC: Final = (ReadIndex, ReadEntry, ReadLast, ReadSubscriptions, ReadRetained, ReadBody)


def read_command(partition: Partition, read: Read) -> RedisCommand:
    """The one command that answers a read; its second word is the key."""
    match read:
        case ReadStates(names, table):
            return ("HMGET", keys.table(partition, table), *(names or ("",)))
        case ReadAllStates(cursor, table):
            return ("HSCAN", keys.table(partition, table), cursor, "COUNT", SCANNED)
        case ReadBelow(index, before, limit):
            name = keys.index(partition, index)
            below = f"({before}"
            return ("ZRANGE", name, "-inf", below, "BYSCORE", "LIMIT", 0, limit, "WITHSCORES")
        case ReadDue(limit):
            return ("ZRANGE", keys.due(partition), 0, limit - 1, "WITHSCORES")
        case ReadIndex(topic, limit, after):
            name, behind = keys.message_index(topic), f"({after}"
            return ("ZRANGE", name, behind, "+inf", "BYSCORE", "LIMIT", 0, limit, "WITHSCORES")
        case ReadEntry(topic, message_id):
            return ("ZSCORE", keys.message_index(topic), message_id)
        case ReadLast(topic, until):
            name = keys.message_index(topic)
            return ("ZRANGE", name, until, "-inf", "BYSCORE", "REV", "LIMIT", 0, 1, "WITHSCORES")
        case ReadSubscriptions(client_id):
            return ("HGETALL", keys.subscriptions(client_id))
        case ReadNames(other, index, prefix, after, limit):
            first = b"(" + after.encode() if after else b"[" + prefix.encode()
            # UTF-8 holds no 0xFF: this is behind all text that begins so.
            last = b"(" + prefix.encode() + b"\xff" if prefix else b"+"
            name = keys.index(other or partition, index)
            return ("ZRANGE", name, first, last, "BYLEX", "LIMIT", 0, limit)
        case ReadRetained(topic):
            return ("ZRANGE", keys.retained(topic), 0, 0)
        case ReadBody(message_id):
            return ("HGETALL", keys.message_body(message_id))


def answer(read: Read, reply: Any, where: object) -> Any:
    """What the reply says. A public key that is of another type holds nothing of ours.

    Raises:
        StoreDown, StoreRefused: it is an error that says so.
    """
    if isinstance(reply, ReplyError) and code(reply) == "WRONGTYPE" and isinstance(read, PUBLIC):
        reply = []
    checked((reply,), where)
    match read:
        case ReadStates(names):
            return dict(zip(names, reply, strict=False))
        case ReadAllStates():
            cursor, pairs = reply
            keys_ = (name.decode() for name in pairs[::2])
            return int(cursor), dict(zip(keys_, pairs[1::2], strict=True))
        case ReadSubscriptions():
            return dict(zip(reply[::2], reply[1::2], strict=True))
        case ReadBody():
            return {
                name.decode("utf-8", "replace"): value
                for name, value in zip(reply[::2], reply[1::2], strict=True)
            }
        case ReadEntry():
            return int(float(reply)) if reply else None
        case ReadNames():
            return [topic.decode() for topic in reply]
        case ReadRetained():
            return reply[0].decode("utf-8", "replace") if reply else None
    # Scores are whole numbers below 2**53, which a double holds exactly.
    return [
        (member.decode(), int(float(at)))
        for member, at in zip(reply[::2], reply[1::2], strict=True)
    ]
