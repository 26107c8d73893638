"""What the driver needs from the world: a log, a store, a machine. Each has a contract suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

from msgspec import Struct

from agents.effects import Effect, Output, Refusal, Table
from schemas.events import AgentName, Event
from schemas.keys import Partition
from schemas.rules import Rules


class Record(NamedTuple):
    """One Kafka record; `timestamp` is the log's append time in ms."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class Outgoing(NamedTuple):
    """One record to produce; `partition` None lets the key decide."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None


class LogBounds(NamedTuple):
    """What Kafka says of a partition. `start` is its first offset, `end` the one after its last."""

    cluster_id: str
    partition_count: int
    start: int
    end: int
    committed: int | None  # by this agent's group


class Log(Protocol):
    """Kafka, as the driver sees it. Every call waits for Kafka to come back; none gives up."""

    async def bounds(self, partition: Partition) -> LogBounds:
        """Cluster, partition count, first and end offset, and the group's committed offset."""
        ...

    def read(self, partition: Partition, start: int, stop: int) -> AsyncIterator[Sequence[Record]]:
        """The records from `start` up to, not including, `stop`, in runs within the batch bounds."""
        ...

    def produce(self, records: Sequence[Outgoing]) -> Awaitable[None]:
        """Produce in order, starting now; done when Kafka has acknowledged every one."""
        ...


class Applied(Struct, frozen=True, kw_only=True):
    """The fence: how far a partition's state has come, written by every transaction.

    `timestamp` and `cluster_id` identify the record at `offset`; `partition_count` is for life. `sequence` counts
    transactions; journal entries up to `produced` are done. `now_ms` is the highest log time so far, `score` the
    last index score given. `machine` is the machine's own partition-wide state.
    """

    offset: int
    timestamp: int
    cluster_id: str
    partition_count: int
    sequence: int
    produced: int
    now_ms: int
    score: int
    machine: dict[str, Any]


class Stored(NamedTuple):
    """What a store holds of a partition: its fence, journal, rules and seen ids (by generation parity)."""

    applied: Applied | None
    journal: Mapping[int, Sequence[Output]]
    rules: str | None
    seen: tuple[tuple[str, ...], tuple[str, ...]]


class Transaction(NamedTuple):
    """One batch of one partition. `expected` is the fence that must still be there."""

    expected: Applied | None
    applied: Applied
    effects: Sequence[Effect]
    outputs: Sequence[Output]  # journaled under `applied.sequence` when there are any
    produced: Sequence[int]  # journal entries to remove


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

Packed = TypeVar("Packed")


class Store(Protocol[Packed]):
    """One partition's part of the store. Errors are `StoreDown`, `Fenced` and `StoreRefused`, nothing else."""

    async def load(self) -> Stored:
        """Set the fence and read what is held. Waits, with back-off, for a store that is down."""
        ...

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        """Answer reads in order; what they see includes every finished commit."""
        ...

    def pack(self, transaction: Transaction) -> Packed:
        """Turn a transaction into what goes over the wire, while another one may be on its way."""
        ...

    def commit(self, packed: Packed) -> Awaitable[Sequence[Refusal]]:
        """Send it now; done when every reply was read: what the store refused in it.

        Raises:
            Fenced: the fence was not the expected one; nothing was applied.
            StoreDown: unknown whether it was applied: load and compare.
        """
        ...

    async def check(self) -> None:
        """Find out, with nothing in flight, whether the fence is still the one last written or loaded.

        Raises:
            Fenced: it is not: emptied, rolled back by a failover, or written by another owner.
            StoreDown: no answer.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection; the state stays."""
        ...


class Machine(Protocol):
    """One agent's decisions for one partition: no IO, no clock, no chance. See `agents/messages/machine.py`."""

    agent: AgentName

    @property
    def next_due_ms(self) -> int | None:
        """When the earliest known thing falls due."""
        ...

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        ...

    def restore(self, partition_state: Mapping[str, Any], stored: Stored, rules: Rules) -> None:
        """Start anew from what the store holds; `rules` are in force."""
        ...

    def owns(self, key: str) -> bool:
        """Whether records of this key are this agent's."""
        ...

    def alone(self, event: Event) -> bool:
        """Whether an event needs all before it in the store, and is stepped by itself."""
        ...

    def wanted(self, events: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """What the steps of these events need and the machine does not hold; asked until nothing is."""
        ...

    def supply(self, read: Read, answer: Any) -> None:
        """The answer to something wanted."""
        ...

    def step(self, offset: int, event: Event, now_ms: int, score: int) -> Sequence[Effect | Output]:
        """Fold one event."""
        ...

    def finish(self) -> Sequence[Effect]:
        """The end of a batch: what its events came to, each key once."""
        ...

    def settled(self) -> None:
        """The oldest batch finished and not yet settled is in the store: what was held for it may go."""
        ...

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """What to remove after the store refused a part of what `event` asked for."""
        ...

    def partition_state(self) -> dict[str, Any]:
        """The small state that travels in the fence."""
        ...
