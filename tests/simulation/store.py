"""A store behind a network that loses, delays and breaks.

- `Store` is the server: the content, and the transactions in flight to it. The world decides when each of them arrives,
  and whether its reply does.
- `Connection` is a worker's client. It implements `millpond.agents.ports.Store`.

The server remembers which worker wrote which transaction, and which offsets no worker could read. So the judge knows the
content that a clean fold would give.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, cast

from millpond.agents.effects import Refusal
from millpond.agents.ports import Applied, LoadedState, Transaction
from millpond.agents.reads import Read
from millpond.pipeline.stores.memory.server import MemoryServer
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.schemas.errors import Fenced, StoreDown
from tests.simulation.points import Pause, Reply
from tests.support.partition import PARTITION, run


class Packed(NamedTuple):
    """A transaction of one worker. `missing` are the offsets that it skips, because the log had lost them."""

    writer: int
    transaction: Transaction
    missing: frozenset[int]


class Session:
    """One connection to the server. `watched` is the version of the fence at its WATCH."""

    def __init__(self, watched: int) -> None:
        self.watched = watched


class SentTransaction(NamedTuple):
    """A transaction in flight. It may arrive at any time, or never."""

    session: Session
    packed: Packed
    reply: Reply


class Content(NamedTuple):
    """The content of a server, the offsets that it lacks because the log had lost them, and the writer of each sequence."""

    server: MemoryServer
    missing: frozenset[int]
    writers: dict[int, int]

    @classmethod
    def empty(cls) -> Content:
        return cls(MemoryServer(), frozenset(), {})

    def copy(self) -> Content:
        values = {name: copy.copy(value) for name, value in self.server.values.items()}
        server = MemoryServer(values, dict(self.server.expires_at))
        return Content(server, self.missing, dict(self.writers))


class Store:
    """The server.

    - `snapshots`: the last contents, oldest first. A failover returns to the oldest.
    - `in_flight`: transactions that were sent and have not arrived.
    - `version`: the number of writes of the fence. A WATCH notices every write, also one of the same value.
    """

    def __init__(self) -> None:
        self.content = Content.empty()
        self.snapshots: list[Content] = []
        self.in_flight: list[SentTransaction] = []
        self.down = False
        self.failovers = self.fenced = 0
        self.version = 0

    @property
    def stored(self) -> LoadedState:
        return run(MemoryStore(PARTITION, self.content.server).load())

    @property
    def applied(self) -> Applied | None:
        return self.stored.applied

    def arrive(self, sent: SentTransaction, *, reply_lost: bool) -> None:
        """Apply the transaction, or fence it. Send the reply unless it is lost."""
        self.in_flight.remove(sent)
        if sent.session.watched != self.version:
            self.fenced += 1
            self._reply(
                sent,
                lambda: sent.reply.fail(Fenced("another writer has changed its state")),
                reply_lost,
            )
            return
        writer, transaction, missing = sent.packed
        store = MemoryStore(PARTITION, self.content.server)
        run(store.load())
        before = self.content.missing if transaction.expected is not None else frozenset()
        refused = run(_wait(store.commit(transaction)))
        self.version += 1
        sent.session.watched = self.version
        writers = {**self.content.writers, transaction.applied.sequence: writer}
        self.content = Content(self.content.server, before | missing, writers)
        self.snapshots = [*self.snapshots[-3:], self.content.copy()]
        self._reply(sent, lambda: sent.reply.answer(refused), reply_lost)

    def _reply(self, sent: SentTransaction, reply: Callable[[], None], reply_lost: bool) -> None:
        if sent.reply.decided:
            # The worker has given up.
            return
        if reply_lost:
            sent.reply.fail(StoreDown("the reply was lost"))
        else:
            reply()

    def lose(self, sent: SentTransaction) -> None:
        """Lose the transaction, and break the worker's connection."""
        self.in_flight.remove(sent)
        self.give_up(sent)

    def give_up(self, sent: SentTransaction) -> None:
        """Let the worker time out. The transaction may still arrive."""
        if not sent.reply.decided:
            sent.reply.fail(StoreDown("no reply"))

    def empty(self) -> None:
        self.version += 1
        self.content = Content.empty()
        self.snapshots = []

    def fail_over(self) -> None:
        """Let a replica take over that lacks the last writes."""
        if self.snapshots:
            self.failovers += 1
            self.version += 1
            self.content = self.snapshots[0].copy()
            self.snapshots = self.snapshots[:1]


class Connection:
    """A worker's connection to the store. See `millpond.agents.ports.Store`."""

    def __init__(
        self,
        store: Store,
        writer: int,
        loaded: Callable[[LoadedState], None],
        missing: Callable[[int, int], frozenset[int]],
    ) -> None:
        """`loaded` is called after each load. `missing` returns the offsets of a range that the worker could not read."""
        self._store, self._writer, self._loaded, self._missing = store, writer, loaded, missing
        self._session = Session(-1)

    async def load(self) -> LoadedState:
        await Pause()
        while self._store.down:
            await Pause()
        stored = self._store.stored
        self._session = Session(self._store.version)
        self._loaded(stored)
        return stored

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        await self._reach()
        return await MemoryStore(PARTITION, self._store.content.server).read(reads)

    async def _reach(self) -> None:
        await Pause()
        if self._store.down:
            raise StoreDown("down")

    def pack(self, transaction: Transaction) -> Packed:
        before = -1 if transaction.expected is None else transaction.expected.offset
        missing = self._missing(before + 1, transaction.applied.offset + 1)
        return Packed(self._writer, transaction, missing)

    def commit(self, packed: Packed) -> Awaitable[Sequence[Refusal]]:
        sent = SentTransaction(self._session, packed, Reply())
        self._store.in_flight.append(sent)
        return cast(Awaitable[Sequence[Refusal]], sent.reply)

    async def check(self) -> None:
        await self._reach()
        if self._session.watched != self._store.version:
            raise Fenced("another writer has changed its state")

    async def close(self) -> None:
        """Keep the transactions in flight."""


async def _wait(committing: Awaitable[Sequence[Refusal]]) -> Sequence[Refusal]:
    return await committing
