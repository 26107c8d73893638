"""What an agent costs its store: bytes of states written, states and index entries read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any

from millpond.agents.effects import Refusal, SetState
from millpond.agents.ports import Transaction
from millpond.agents.reads import Read, ReadIndex, ReadStates
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.schemas.events import AgentName
from tests.support import given
from tests.support.delivery import Delivering


class CountingStore(MemoryStore):
    """Counts what it is asked for."""

    def __init__(self, store: MemoryStore, counted: Counter[str]) -> None:
        super().__init__(store._partition, store._server)
        self._counted = counted

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        answers = await super().read(reads)
        for read, answer in zip(reads, answers, strict=True):
            match read:
                case ReadStates(names, table):
                    self._counted.update(f"{table} {name}" for name in names)
                    self._counted["states read"] += len(names)
                case ReadIndex():
                    self._counted["index entries read"] += len(answer)
        return answers

    def commit(self, packed: Transaction) -> Awaitable[Sequence[Refusal]]:
        for effect in packed.effects:
            if isinstance(effect, SetState):
                self._counted["bytes of states"] += len(effect.state or b"")
        return super().commit(packed)


class Costs(Delivering):
    """A partition of a delivery agent whose `t/#` is its own, and what it has cost since it was last asked."""

    def __init__(self, agent: AgentName, **settings: Any) -> None:
        self._counted: Counter[str] = Counter()
        kind = given.queue if agent == "queue" else given.pubsub
        super().__init__(agent, kind("t/#", **settings))

    def new_store(self) -> MemoryStore:
        return CountingStore(super().new_store(), self._counted)

    def take_costs(self) -> Counter[str]:
        """What was counted since this was last asked."""
        counted = Counter(self._counted)
        self._counted.clear()
        return counted
