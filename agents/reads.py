"""What a machine or an output reads from the store, as data; each read says what answers it."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from millpond.agents.effects import Table
from millpond.schemas.keys import Partition


class ReadStates(NamedTuple):
    """The packed states of a table's keys; answered by `dict[str, bytes | None]`."""

    names: tuple[str, ...]
    table: Table = "states"


class ReadAllStates(NamedTuple):
    """Some of all packed states of a table, from a cursor on (0 to begin); answered by `(next cursor or 0, dict[key,
    bytes])`.
    """

    cursor: int
    table: Table = "states"


class ReadBelow(NamedTuple):
    """The first keys of an index with a score below `before`; answered by `list[tuple[key, score]]` in order."""

    name: str
    before: int
    limit: int


class ReadDue(NamedTuple):
    """The earliest due members; answered by `list[tuple[member, at_ms]]` in order of (time, member)."""

    limit: int


class ReadIndex(NamedTuple):
    """The oldest entries of a topic's index behind a score; answered by `list[tuple[message_id, score]]` in order."""

    topic: str
    limit: int
    after: int = 0


class ReadEntry(NamedTuple):
    """A message's place in its topic's index; answered by its score, None if it is not there."""

    topic: str
    message_id: str


class ReadLast(NamedTuple):
    """The newest entry of a topic's index up to, and with, a score; answered by `list[tuple[message_id, score]]`."""

    topic: str
    until: int


class ReadSubscriptions(NamedTuple):
    """What the user's applications wrote for a client; answered by `dict[topic filter, QoS as text]`, both bytes."""

    client_id: str


class ReadNames(NamedTuple):
    """The keys of a partition's index whose scores are all 0, by name: the first ones that begin with `prefix` and come
    behind `after`, if that is not empty; answered by `list[str]`. `partition` None is the store's own.
    """

    partition: Partition | None
    name: str
    prefix: str
    after: str
    limit: int


class ReadRetained(NamedTuple):
    """The id of a topic's retained message; answered by `str | None`."""

    topic: str


class ReadBody(NamedTuple):
    """A stored message; answered by `dict[field, bytes]`, empty if it is gone."""

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

# What the store says of these changes with every batch: the one in flight has to be in it.
OF_ALL_BATCHES: Final = (ReadAllStates, ReadBelow, ReadDue, ReadIndex, ReadEntry, ReadNames)
