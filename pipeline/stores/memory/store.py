"""A store in memory, for simulations and tests. Stores of several owners share one `MemoryServer`, which can fail on demand."""

from __future__ import annotations

from collections.abc import Awaitable, Generator, Sequence
from typing import Any

import msgspec

from millpond.agents.effects import Output, Refusal
from millpond.agents.ports import Applied, LoadedState, Transaction
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
from millpond.pipeline.stores.memory.server import Hash, Kind, MemoryServer, RefusedError, Zset
from millpond.pipeline.stores.memory.writer import EffectWriter
from millpond.schemas import keys
from millpond.schemas.errors import Fenced, StoreError
from millpond.schemas.keys import Partition


class _Result(Awaitable[Sequence[Refusal]]):
    """The result of a commit, which is known before it is awaited."""

    def __init__(self, refusals: Sequence[Refusal], error: StoreError | None) -> None:
        self._refusals, self._error = refusals, error

    def __await__(self) -> Generator[None, None, Sequence[Refusal]]:
        if self._error is not None:
            raise self._error
        return self._refusals
        # Not reached: it makes this method a generator.
        yield


class MemoryStore:
    """See `millpond.agents.ports.Store`. Two stores of one partition on one server fence each other."""

    def __init__(self, partition: Partition, server: MemoryServer) -> None:
        self._partition, self._server = partition, server
        self._loaded = False
        # The fence as this store last loaded or wrote it.
        self._fence: Applied | None = None

    async def load(self) -> LoadedState:
        """See `millpond.agents.ports.Store`. A fault is raised at once: without a clock there is no back-off."""
        self._server.fault("load", self._partition)
        self._loaded, self._fence = True, self._stored_fence()
        journal = {
            int(sequence): msgspec.json.decode(outputs, type=list[Output])
            for sequence, outputs in self._server.of(keys.journal(self._partition), Hash).items()
        }
        rules = self._server.text(keys.rules(self._partition))
        return LoadedState(
            applied=self._fence,
            journal=dict(sorted(journal.items())),
            rules=None if rules is None else rules.decode(),
            seen=(self._seen(0), self._seen(1)),
        )

    def _stored_fence(self) -> Applied | None:
        packed = self._server.text(keys.applied(self._partition))
        return None if packed is None else msgspec.json.decode(packed, type=Applied)

    def _seen(self, generation: int) -> tuple[str, ...]:
        lines = self._server.text(keys.seen(self._partition, generation)) or b""
        return tuple(msgspec.json.decode(line, type=str) for line in lines.splitlines())

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        self._server.fault("read", self._partition)
        return [self._answer(read) for read in reads]

    def _answer(self, read: Read) -> Any:
        match read:
            case ReadStates(names, table):
                states = self._server.of(keys.table(self._partition, table), Hash)
                return {name: states.get(name) for name in names}
            case ReadAllStates(_, table):
                return 0, dict(self._server.of(keys.table(self._partition, table), Hash))
            case ReadBelow(index, before, limit):
                entries = self._server.of(keys.index(self._partition, index), Zset).ordered()
                return [entry for entry in entries if entry[1] < before][:limit]
            case ReadDue(limit):
                return self._server.of(keys.due(self._partition), Zset).ordered()[:limit]
            case ReadIndex(topic, limit, after):
                entries = self._public(keys.message_index(topic), Zset).ordered()
                return [entry for entry in entries if entry[1] > after][:limit]
            case ReadLast(topic, until):
                entries = self._public(keys.message_index(topic), Zset).ordered()
                return [entry for entry in entries if entry[1] <= until][-1:]
            case ReadEntry(topic, message_id):
                return self._public(keys.message_index(topic), Zset).get(message_id)
            case ReadSubscriptions(client_id):
                filters = self._own_or_foreign(keys.subscriptions(client_id), Hash)
                if isinstance(filters, WrongType):
                    return filters
                return {name.encode(): qos for name, qos in filters.items()}
            case ReadNames(other, index, prefix, after, limit):
                entries = self._server.of(
                    keys.index(other or self._partition, index), Zset
                ).ordered()
                rest = [name for name, _ in entries if name.encode() > after.encode()]
                return [name for name in rest if name.startswith(prefix)][:limit]
            case ReadRetained(topic):
                entry = self._own_or_foreign(keys.retained(topic), Zset)
                return entry if isinstance(entry, WrongType) else next(iter(entry), None)
            case ReadBody(message_id):
                return dict(self._public(keys.message_body(message_id), Hash))

    def _own_or_foreign(self, key: str, kind: type[Kind]) -> Kind | WrongType:
        """Return the value of a public key whose foreign type an output has to know."""
        try:
            return self._server.of(key, kind)
        except RefusedError as error:
            return WrongType(key, str(error))

    def _public(self, key: str, kind: type[Kind]) -> Kind:
        """Return the value of a public key. A key of another type, which another program wrote, counts as empty."""
        value = self._server.values.get(key)
        return value if isinstance(value, kind) else kind()

    def pack(self, transaction: Transaction) -> Transaction:
        return transaction

    def commit(self, packed: Transaction) -> Awaitable[Sequence[Refusal]]:
        """See `millpond.agents.ports.Store`. The transaction is applied by the call, not when it is awaited."""
        assert self._loaded, "call load() first, and again after every failure"
        refusals: list[Refusal] = []
        try:
            self._server.fault("before", self._partition)
            if not self._stored_fence() == self._fence == packed.expected:
                raise self._fenced()
            refusals, self._fence = self._apply(packed), packed.applied
            self._server.fault("after", self._partition)
        except StoreError as error:
            self._loaded = False
            return _Result((), error)
        return _Result(refusals, None)

    async def check(self) -> None:
        assert self._loaded, "call load() first, and again after every failure"
        try:
            self._server.fault("read", self._partition)
            if self._stored_fence() != self._fence:
                raise self._fenced()
        except StoreError:
            self._loaded = False
            raise

    def _fenced(self) -> Fenced:
        return Fenced(f"{self._partition}: another writer has changed its state")

    def _apply(self, transaction: Transaction) -> list[Refusal]:
        writer = EffectWriter(self._server, self._partition)
        writer.write(transaction.effects)
        journal = self._server.of(keys.journal(self._partition), Hash)
        for sequence in transaction.produced:
            journal.pop(str(sequence), None)
        if transaction.outputs:
            outputs = msgspec.json.encode(transaction.outputs)
            journal[str(transaction.applied.sequence)] = outputs
        self._server.keep(keys.journal(self._partition), journal)
        self._server.keep(keys.applied(self._partition), msgspec.json.encode(transaction.applied))
        return writer.refusals()

    async def close(self) -> None:
        self._loaded = False
