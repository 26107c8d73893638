"""What a machine asks of the store, as Redis commands, and their replies as answers."""

from __future__ import annotations

from typing import Any

from hiredis import ReplyError

from agents.ports import Read, ReadDue, ReadIndex, ReadTopicStates
from pipeline.stores.wire import Command, checked, code
from schemas import keys
from schemas.keys import Partition


def read_command(partition: Partition, read: Read) -> Command:
    """The one command that answers a read; its second word is the key."""
    match read:
        case ReadTopicStates(topics):
            return ("HMGET", keys.topic_states(partition), *(topics or ("",)))
        case ReadDue(limit):
            return ("ZRANGE", keys.due(partition), 0, limit - 1, "WITHSCORES")
        case ReadIndex(topic, limit):
            return ("ZRANGE", keys.message_index(topic), 0, limit - 1, "WITHSCORES")


def answer(read: Read, reply: Any, where: object) -> Any:
    """What the reply says. An index key that is of another type holds nothing of ours.

    Raises:
        StoreDown, StoreRefused: it is an error that says so.
    """
    if isinstance(read, ReadIndex) and isinstance(reply, ReplyError) and code(reply) == "WRONGTYPE":
        return []
    checked((reply,), where)
    if isinstance(read, ReadTopicStates):
        return dict(zip(read.topics, reply, strict=False))
    # Scores are whole numbers below 2**53, which a double holds exactly.
    return [
        (member.decode(), int(float(at)))
        for member, at in zip(reply[::2], reply[1::2], strict=True)
    ]
