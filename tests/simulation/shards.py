"""A Redis Cluster in memory whose shards lose their last writes, and a store that writes it in the order of `ClusterStore`.

- A *shard* holds the keys of its slots. Its replica is a copy of an earlier moment, until the world replicates it.
- A failover of a shard puts the replica in the place of the primary, by itself and with other shards unchanged.
- A connection notices that a shard has failed over when it uses it next: the real one breaks.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from millpond.agents.effects import (
    ClearBodyExpiry,
    ClearRetained,
    DeleteBody,
    Effect,
    ForgetPresence,
    Refusal,
    Retain,
    RunCommand,
    SetDue,
    SetIndex,
    SetPresence,
    SetRules,
    SetState,
    ShowOffset,
    Unindex,
    WriteSeen,
)
from millpond.agents.ports import Applied, LoadedState, Transaction
from millpond.agents.reads import Read
from millpond.pipeline.stores.memory.server import MemoryServer, Value
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.pipeline.stores.memory.writer import EffectWriter
from millpond.schemas import keys
from millpond.schemas.errors import Fenced, StoreDown
from tests.simulation.points import Pause
from tests.support.partition import PARTITION

SHARDS = 3
CONFIRM_STEPS_MAX = 30  # steps of a worker until WAIT gives up
STATE = (SetState, SetIndex, SetRules, WriteSeen, SetDue)
REMOVALS = (
    Unindex, ClearRetained, ClearBodyExpiry, SetPresence, ForgetPresence, ShowOffset, RunCommand, DeleteBody,
)  # fmt: skip
# The list of removals that the journal holds, as a number. It is in the slot of the fence.
LEFT = f"{keys.applied(PARTITION)}:left"


def shard_of(key: str) -> int:
    return key_slot(key.encode()) * SHARDS // REDIS_CLUSTER_HASH_SLOTS


HOME = shard_of(keys.applied(PARTITION))


class Values(dict[str, Value]):
    """The content of all primaries. `written` are the shards that were written since it was emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __setitem__(self, key: str, value: Value) -> None:
        self.written.add(shard_of(key))
        super().__setitem__(key, value)

    def pop(self, key: str, *default: Any) -> Any:
        self.written.add(shard_of(key))
        return super().pop(key, *default)


class Shards:
    """The cluster.

    - `failovers`: the number of failovers of each shard.
    - `lists`: number → the removals of a list that a journal held.
    """

    def __init__(self) -> None:
        self.values = Values()
        self.server = MemoryServer(self.values)
        self._replicas: list[dict[str, Value]] = [{} for _ in range(SHARDS)]
        self.failovers = [0] * SHARDS
        self.lists: dict[int, Sequence[Effect]] = {}

    def _part(self, shard: int) -> dict[str, Value]:
        return {key: value for key, value in self.values.items() if shard_of(key) == shard}

    def lags(self, shard: int) -> bool:
        return self._part(shard) != self._replicas[shard]

    def replicate(self, shard: int) -> None:
        self._replicas[shard] = {key: copy.copy(x) for key, x in self._part(shard).items()}

    def fail_over(self, shard: int) -> None:
        """Lose what the replica does not have."""
        self.failovers[shard] += 1
        for key in self._part(shard):
            del self.values[key]
        for key, value in self._replicas[shard].items():
            self.values[key] = copy.copy(value)


class Commit(Awaitable[Sequence[Refusal]]):
    """A commit that begins when it is awaited."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin

    def __await__(self) -> Generator[None, None, Sequence[Refusal]]:
        result: Sequence[Refusal] = yield from self._begin().__await__()
        return result


class ShardedStore:
    """See `millpond.agents.ports.Store`, and `ClusterStore` for the steps. Without `confirms` it waits for no replica."""

    def __init__(self, shards: Shards, *, confirms: bool) -> None:
        self._shards, self._confirms = shards, confirms
        self._failovers: list[int] = []
        self._seen: Applied | None = None

    async def load(self) -> LoadedState:
        while True:
            await Pause()
            self._failovers = list(self._shards.failovers)
            stored = await MemoryStore(PARTITION, self._shards.server).load()
            self._seen = stored.applied
            try:
                await self._finish_removals()
            except StoreDown:
                continue
            return stored

    async def _finish_removals(self) -> None:
        left = self._shards.values.get(LEFT)
        if left is not None:
            assert isinstance(left, bytes)
            await self._confirm({HOME})
            await self._remove(self._shards.lists[int(left)])

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        await self._reach()
        return await MemoryStore(PARTITION, self._shards.server).read(reads)

    async def _reach(self) -> None:
        await Pause()
        if self._failovers != self._shards.failovers:
            raise StoreDown("a shard has failed over")

    def pack(self, transaction: Transaction) -> Transaction:
        return transaction

    def commit(self, packed: Transaction) -> Awaitable[Sequence[Refusal]]:
        return Commit(lambda: self._commit(packed))

    async def _commit(self, transaction: Transaction) -> Sequence[Refusal]:
        effects = transaction.effects
        writer = EffectWriter(self._shards.server, PARTITION)
        await self._step(writer._body_or_receipt, effects)
        await self._step(writer._entry, effects)
        await self._reach()
        await self._fence(transaction)
        await self._confirm({HOME})
        removals = [x for x in effects if isinstance(x, REMOVALS)]
        if removals:
            await self._remove(removals)
        return writer.refusals()

    async def _fence(self, transaction: Transaction) -> None:
        """Apply the state, the fence and the list of removals: one transaction of one shard."""
        store = MemoryStore(PARTITION, self._shards.server)
        if (await store.load()).applied != transaction.expected:
            raise Fenced("another writer has changed its state")
        state = [x for effect in transaction.effects for x in _state(effect)]
        await store.commit(transaction._replace(effects=state))
        removals = [x for x in transaction.effects if isinstance(x, REMOVALS)]
        if removals:
            number = len(self._shards.lists)
            self._shards.lists[number] = removals
            self._shards.server.keep(LEFT, b"%d" % number)

    async def _remove(self, removals: Sequence[Effect]) -> None:
        writer = EffectWriter(self._shards.server, PARTITION)
        bodies = [x for x in removals if isinstance(x, DeleteBody)]
        await self._step(writer._removal, [x for x in removals if not isinstance(x, DeleteBody)])
        await self._step(writer._removal, bodies)
        await self._reach()
        self._shards.server.remove(LEFT)

    async def _step(self, write: Callable[[Effect], None], effects: Sequence[Effect]) -> None:
        """Apply one step, which a crash or a failover may interrupt after each effect."""
        written: set[int] = set()
        for effect in effects:
            self._shards.values.written.clear()
            write(effect)
            if self._shards.values.written:
                written |= self._shards.values.written
                await self._reach()
        await self._confirm(written)

    async def _confirm(self, shards: set[int]) -> None:
        """Wait until the replicas of these shards have everything.

        Raises:
            StoreDown: a shard has failed over meanwhile, or its replica lags for too long.
        """
        if not self._confirms:
            return
        for shard in sorted(shards):
            for _ in range(CONFIRM_STEPS_MAX):
                await self._reach()
                if not self._shards.lags(shard):
                    break
            else:
                raise StoreDown("no replica acknowledges")

    async def check(self) -> None:
        await self._reach()
        if (await MemoryStore(PARTITION, self._shards.server).load()).applied is None:
            raise Fenced("the state is gone")

    async def close(self) -> None:
        """Keep what is under way."""


def _state(effect: Effect) -> list[Effect]:
    """Return what of an effect belongs to the private state."""
    match effect:
        case Retain(topic=topic):
            return [SetIndex(keys.RETAINED_INDEX, topic, 0)]
        case ClearRetained(topic=topic):
            return [SetIndex(keys.RETAINED_INDEX, topic, None)]
    return [effect] if isinstance(effect, STATE) else []
