"""Reads: what a machine or an output asks of the store, as data.

A read says *what* it asks for. A store says how. Each docstring below says what the answer is.

- A **table** is a hash of packed states, an **index** a zset of names. Both belong to the partition that reads.
  The **due set** is a zset of names with a time.
- A **topic's index** is the public zset of its stored messages.
- A public key may have a **foreign type**, because another program wrote it. What a user's application wrote for Millpond to
  read (subscriptions), and what a client waits for (retained messages), is answered by `WrongType`: it becomes a dead letter.
  Elsewhere such a key counts as empty, and the store names it in its log.
- A **score** is a place in the log. "Behind" a score means above it.
- A **page** is a limited answer in order. The reader asks for the next page behind the last entry.

Who reads what:

| by | reads |
|---|---|
| machines, before a step | states, indexes, the due set, a topic's index |
| outputs, after their transaction | bodies, retained entries, subscriptions, indexes of other partitions |
| commands and the web page | anything, without a fence |

A machine may hold a state that it has read, because only the partition's owner changes it. The data of outputs
belongs to others. It is read once, and never becomes state.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from millpond.agents.effects import Table
from millpond.schemas.keys import Partition


class WrongType(NamedTuple):
    """The answer about a public key that another program wrote, with another type. `reason` is the store's."""

    key: str
    reason: str


class ReadStates(NamedTuple):
    """The packed states of some keys of a table.

    Answer: `dict[str, bytes | None]`, None for a key without state.
    """

    names: tuple[str, ...]
    table: Table = "states"


class ReadAllStates(NamedTuple):
    """A part of all packed states of a table. The first cursor is 0.

    Answer: `(cursor, dict[key, bytes])`. The next cursor 0 says that this was the last part.
    A key that exists all the time comes once or more. A key that is added or removed meanwhile may be missed.
    """

    cursor: int
    table: Table = "states"


class ReadBelow(NamedTuple):
    """The first entries of an index with a score below `before`.

    Answer: `list[tuple[key, score]]` in the order of the scores.
    """

    name: str
    before: int
    limit: int


class ReadDue(NamedTuple):
    """The earliest entries of the due set, due or not.

    Answer: `list[tuple[name, at_ms]]` in the order of time, then name.
    """

    limit: int


class ReadIndex(NamedTuple):
    """The oldest entries of a topic's index behind the score `after`.

    Answer: `list[tuple[message_id, score]]` in the order of the log.
    """

    topic: str
    limit: int
    after: int = 0


class ReadEntry(NamedTuple):
    """The place of one message in its topic's index.

    Answer: its score, or None if the index does not have the message.
    """

    topic: str
    message_id: str


class ReadLast(NamedTuple):
    """The newest entry of a topic's index with a score up to `until`, this score included.

    Answer: `list[tuple[message_id, score]]` with one entry or none.
    """

    topic: str
    until: int


class ReadSubscriptions(NamedTuple):
    """The subscriptions that the user's applications wrote for a client.

    Answer: `dict[bytes, bytes]`, topic filter → QoS, both unchecked; or `WrongType`.
    """

    client_id: str


class ReadNames(NamedTuple):
    """The first names of an index that begin with `prefix` and come behind `after`. All scores of the index must be 0.

    An empty `after` asks for the first page. `partition` None means the partition of the store.
    Answer: `list[str]` in the order of the bytes.
    """

    partition: Partition | None
    name: str
    prefix: str
    after: str
    limit: int


class ReadRetained(NamedTuple):
    """The id of a topic's retained message.

    Answer: `str | None`, or `WrongType`.
    """

    topic: str


class ReadBody(NamedTuple):
    """One stored message.

    Answer: `dict[field, bytes]`, empty if the store has no such message.
    """

    message_id: str


Read: TypeAlias = (
    ReadStates
    | ReadAllStates
    | ReadBelow
    | ReadDue
    | ReadIndex
    | ReadEntry
    | ReadLast
    | ReadSubscriptions
    | ReadNames
    | ReadRetained
    | ReadBody
)

# A batch in flight can change the answers to these, so the driver finishes it before it reads. ReadStates is not among
# them: a machine holds the states that an unfinished batch changed, and does not ask for them.
READS_AFTER_COMMIT: Final = (ReadAllStates, ReadBelow, ReadDue, ReadIndex, ReadEntry, ReadNames)
