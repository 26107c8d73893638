"""The reads of machines and outputs as Redis commands, and the replies as answers.

Each read is one command. `agents/reads.py` documents every answer.
"""

from __future__ import annotations

from typing import Any, Final

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
    WrongType,
)
from millpond.pipeline.stores.redis.connection import RedisCommand, checked
from millpond.pipeline.stores.redis.foreign_keys import is_wrong_type, name_foreign_key
from millpond.schemas import keys
from millpond.schemas.keys import Partition

SCAN_COUNT: Final = 500  # states of one answer, about
# Reads of public keys. Another program may have put a key of another type there.
PUBLIC: Final = (
    ReadIndex,
    ReadEntry,
    ReadLast,
    ReadBody,
)  # such a key counts as empty, and the log names it
ANSWERED: Final = (ReadSubscriptions, ReadRetained)  # its type is the answer


def read_command(partition: Partition, read: Read) -> RedisCommand:
    """Return the command that answers a read. Its second word is the key."""
    match read:
        case ReadStates(names, table):
            # HMGET needs a field. The empty one has no state, and `answer` ignores it.
            return ("HMGET", keys.table(partition, table), *(names or ("",)))
        case ReadAllStates(cursor, table):
            return ("HSCAN", keys.table(partition, table), cursor, "COUNT", SCAN_COUNT)
        case ReadBelow(index, before, limit):
            name = keys.index(partition, index)
            below = f"({before}"
            return ("ZRANGE", name, "-inf", below, "BYSCORE", "LIMIT", 0, limit, "WITHSCORES")
        case ReadDue(limit):
            return ("ZRANGE", keys.due(partition), 0, limit - 1, "WITHSCORES")
        case ReadIndex(topic, limit, after):
            name, above = keys.message_index(topic), f"({after}"
            return ("ZRANGE", name, above, "+inf", "BYSCORE", "LIMIT", 0, limit, "WITHSCORES")
        case ReadEntry(topic, message_id):
            return ("ZSCORE", keys.message_index(topic), message_id)
        case ReadLast(topic, until):
            name = keys.message_index(topic)
            return ("ZRANGE", name, until, "-inf", "BYSCORE", "REV", "LIMIT", 0, 1, "WITHSCORES")
        case ReadSubscriptions(client_id):
            return ("HGETALL", keys.subscriptions(client_id))
        case ReadNames(other, index, prefix, after, limit):
            first = b"(" + after.encode() if after else b"[" + prefix.encode()
            # UTF-8 has no byte 0xFF, so this is above all names with the prefix.
            last = b"(" + prefix.encode() + b"\xff" if prefix else b"+"
            name = keys.index(other or partition, index)
            return ("ZRANGE", name, first, last, "BYLEX", "LIMIT", 0, limit)
        case ReadRetained(topic):
            return ("ZRANGE", keys.retained(topic), 0, 0)
        case ReadBody(message_id):
            return ("HGETALL", keys.message_body(message_id))


def public_key(
    read: ReadIndex | ReadEntry | ReadLast | ReadSubscriptions | ReadRetained | ReadBody,
) -> str:
    """Return the public key that a read is about."""
    match read:
        case ReadSubscriptions(client_id):
            return keys.subscriptions(client_id)
        case ReadRetained(topic):
            return keys.retained(topic)
        case ReadBody(message_id):
            return keys.message_body(message_id)
        case _:
            return keys.message_index(read.topic)


def answer(read: Read, reply: Any, where: object) -> Any:
    """Decode the reply to a read. `where` names the server in errors.

    Raises:
        StoreDown, StoreRefused: the reply is an error. A public key of another type is none.
    """
    if is_wrong_type(reply):
        if isinstance(read, ANSWERED):
            return WrongType(public_key(read), str(reply))
        if isinstance(read, PUBLIC):
            name_foreign_key(public_key(read), reply)
            reply = []
    checked((reply,), where)
    match read:
        case ReadStates(names):
            # Not strict: a read of no names has the reply to the empty field.
            return dict(zip(names, reply, strict=False))
        case ReadAllStates():
            cursor, pairs = reply
            state_keys = (key.decode() for key in pairs[::2])
            return int(cursor), dict(zip(state_keys, pairs[1::2], strict=True))
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
            return [name.decode() for name in reply]
        case ReadRetained():
            return reply[0].decode("utf-8", "replace") if reply else None
    # Scores are whole numbers below 2**53, which a double holds exactly.
    return [
        (member.decode(), int(float(score)))
        for member, score in zip(reply[::2], reply[1::2], strict=True)
    ]
