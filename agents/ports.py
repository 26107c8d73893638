"""The three interfaces of the driver: a log, a store and a machine. The driver is in `agents/driver/driver.py`.

Each interface has one contract suite. Every implementation passes it, the ones in memory as well.

Concepts

- **Run**: records of one partition that the log returned together, in order.
- **Batch**: the part of a run that becomes one transaction.
- **Fence**: the key with the applied offset (`Applied`). Every transaction expects its old value and writes a new one.
- **Journal**: outputs of earlier transactions that Kafka may not have yet, by sequence number.
- **In flight**: a transaction that was sent, and whose result is not known yet. There is at most one.

How driver and store work together

```
load ──► read* ──► pack ──► commit ──► result ──► read* ──► pack ──► …
                     ▲         │
                     └─────────┘  the driver packs the next batch while this one is in flight
```

1. `load` connects, reads the state of one moment, and remembers its fence.
2. `commit` writes nothing if the store's fence is not the remembered one, or not the one that the transaction expects.
3. The driver commits only after the result of the commit before. It checks only while nothing is in flight.
4. After `Fenced` or `StoreDown` the driver must `load` again before it calls anything else.

How driver and machine work together

For each batch, in this order:

1. ON half-written events of the batch before: `wanted` and `supply` until nothing is wanted, then `refused` for each.
2. `wanted` and `supply` for the events of the batch, until nothing is wanted.
3. `step` for each event, in the order of the log.
4. `finish` once, then `partition_state`.
5. `settled` once, when the store has the batch. The driver may have finished the next batch by then.

A batch without events (the driver's own notes) has the steps 1, 4 and 5.

ON an event for which `alone` is true: the driver first waits until the store has every earlier batch. The batch then
holds only this event.

ON load, and after each failure: `restore`, then step 2 without events. The machine forgets all that it held.

Invariants

1. What a machine decides depends on its state and the arguments of `step` or `refused`, and on nothing else.
2. A machine asks for so much that more could not change a decision. So batch borders never decide.
3. A machine holds what it changed until `settled`. The store may not have it before, so a read may not show it.
4. A step that raises DecodeError has changed nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from millpond.agents.effects import Effect, Output, Refusal
from millpond.agents.reads import Read
from millpond.schemas.events import AgentName, Event
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

# -- the log


class Record(NamedTuple):
    """One Kafka record. `timestamp` is its append time in ms, which Kafka sets."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class OutgoingRecord(NamedTuple):
    """One record to produce. Without `partition`, the key decides where it goes."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None


class LogBounds(NamedTuple):
    """What Kafka knows of one partition.

    partition_count: Of the whole topic.
    start: The first offset that the log has.
    end: The offset after the last one.
    committed: The offset that this agent's consumer group committed. None if it never did.
    """

    cluster_id: str
    partition_count: int
    start: int
    end: int
    committed: int | None


class Log(Protocol):
    """Kafka as the driver sees it. Every call retries until Kafka answers, and never gives up."""

    async def bounds(self, partition: Partition) -> LogBounds:
        """Ask Kafka for the bounds of a partition."""
        ...

    def read(self, partition: Partition, start: int, stop: int) -> AsyncIterator[Sequence[Record]]:
        """Read the records from `start` up to `stop`, `stop` excluded, in runs within the bounds of a batch.

        Offsets without a record are skipped: those that retention removed, and gaps.
        """
        ...

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        """Start to produce the records in order. The result is done when Kafka has acknowledged all of them.

        Records of a later call come after those of an earlier one. A record that is too large for Kafka becomes a
        dead letter without a value.

        Raises:
            LogRefused: Kafka refuses a record. The result raises it.
        """
        ...


# -- the store


class Applied(Struct, frozen=True, kw_only=True):
    """The fence: how far a partition's state is.

    offset: The applied offset: the last record whose effects the store has.
    timestamp: The timestamp of that record, in ms. With `cluster_id` it identifies the log.
    cluster_id: The Kafka cluster.
    partition_count: The partition count of the topic, which can never change.
    sequence: The number of this transaction, from 1.
    produced: Transactions up to this sequence have no output left to produce.
    now_ms: The log's time; see `agents/driver/log_clock.py`.
    score: The last score that was given, in µs.
    machine: The machine's partition-wide state.

    It is stored as JSON: do not rename fields.
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
    """What a store has of one partition, all of one moment.

    applied: The fence. None if the store has nothing of the partition.
    journal: Sequence number → outputs that Kafka may not have yet.
    rules: The rules in force, in canonical form. None if the store has none.
    seen: The seen ids: the even generation, and the odd one.
    """

    applied: Applied | None
    journal: Mapping[int, Sequence[Output]]
    rules: str | None
    seen: tuple[tuple[str, ...], tuple[str, ...]]


class Transaction(NamedTuple):
    """One batch of one partition, as a store writes it.

    expected: The fence that the store must still have.
    applied: The fence that replaces it.
    effects: What the store carries out, see `agents/effects.py`.
    outputs: What the driver produces afterwards. The journal keeps them under `applied.sequence`, if there are any.
    produced: Sequence numbers of journal entries that Kafka has. The store removes them.
    """

    expected: Applied | None
    applied: Applied
    effects: Sequence[Effect]
    outputs: Sequence[Output]
    produced: Sequence[int]


Packed = TypeVar("Packed")


class Store(Protocol[Packed]):
    """The store of one partition. It raises StoreDown, Fenced and StoreRefused, and nothing else."""

    async def load(self) -> LoadedState:
        """Connect, read the partition's state, and remember its fence. Retry with back-off while the store is down.

        Raises:
            StoreRefused: The store refuses, or its keys hold something that Millpond did not write.
        """
        ...

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        """Answer reads, in their order. The answers show every commit whose result is known.

        Whether they show the commit in flight depends on the store.

        Raises:
            StoreDown: The store does not answer.
            StoreRefused: The store refuses.
        """
        ...

    def pack(self, transaction: Transaction) -> Packed:
        """Encode a transaction for `commit`. Allowed while another one is in flight."""
        ...

    def commit(self, packed: Packed) -> Awaitable[Sequence[Refusal]]:
        """Send a transaction now. The result is known when the store has answered: what it refused.

        Raises:
            Fenced: The fence was not the expected one. Nothing was applied.
            StoreDown: Unknown whether the transaction was applied. Load, and compare the fence.
            StoreRefused: The store refuses the whole transaction.
        """
        ...

    async def check(self) -> None:
        """Ask whether the fence is still the one that this store last loaded or wrote. Nothing may be in flight.

        Raises:
            Fenced: It is not. The store was emptied or rolled back, or another owner wrote it.
            StoreDown: The store does not answer.
        """
        ...

    async def close(self) -> None:
        """Close the connection. The stored state stays."""
        ...


# -- the machine


class Machine(Protocol):
    """The decisions of one agent for one partition. It does no IO, and knows neither clock nor chance."""

    agent: AgentName

    @property
    def next_due_ms(self) -> int | None:
        """When the earliest due thing is due. 0 if work waits for a tick. None if nothing falls due."""
        ...

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        ...

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        """Forget everything, and continue from what the store has.

        Args:
            partition_state: What `partition_state` returned for the fence. Empty for a partition without state.
            stored: The loaded state. Seen ids come from it.
            rules: The rules in force. They can differ from `stored.rules` if the store has none.
        """
        ...

    def owns(self, key: str) -> bool:
        """True if this agent owns records with this key: a topic, a client id, or a filter with a wildcard.

        The answer may change with the rules only. The driver remembers it until then.
        """
        ...

    def alone(self, event: Event) -> bool:
        """True if the event needs every earlier batch in the store, and a batch of its own."""
        ...

    def wanted(self, events: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """Return the reads that the steps of these events need, and whose answers the machine does not hold.

        The driver answers them and asks again, until nothing is wanted.
        """
        ...

    def supply(self, read: Read, answer: Any) -> None:
        """Take the answer to a read that was wanted."""
        ...

    def step(self, offset: int, event: Event, now_ms: int, score: int) -> Sequence[Effect | Output]:
        """Fold one event.

        Args:
            offset: The offset of its record.
            event: The event.
            now_ms: The log's time at this record.
            score: A score that is higher than every earlier one of the partition. For a message it is its place in
                the log.

        Raises:
            DecodeError: The event makes no sense, for example an invalid topic. Its record becomes a dead letter.
        """
        ...

    def finish(self) -> Sequence[Effect]:
        """End a batch: return one write for each state that its events changed."""
        ...

    def settled(self) -> None:
        """Note that the store has the oldest batch that is finished and not settled. Its states may be forgotten."""
        ...

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """Return what cleans up after the store refused a part of what `event` asked for."""
        ...

    def partition_state(self) -> dict[str, Any]:
        """Return the small partition-wide state that the fence stores."""
        ...
