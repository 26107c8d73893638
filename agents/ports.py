"""What the driver needs from the world: a log, a store, a machine. Each has a contract suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from millpond.agents.effects import Effect, Output, Refusal
from millpond.agents.reads import Read
from millpond.schemas.events import AgentName, Event
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules


class Record(NamedTuple):
    """One Kafka record; `timestamp` is the log's append time in ms."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class OutgoingRecord(NamedTuple):
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

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
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


class LoadedState(NamedTuple):
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


Packed = TypeVar("Packed")


class Store(Protocol[Packed]):
    """One partition's part of the store. Errors are `StoreDown`, `Fenced` and `StoreRefused`, nothing else."""

    async def load(self) -> LoadedState:
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

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
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
