"""A store at the other end of a wire that loses, delays and breaks; what it applied is remembered exactly."""

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
    """A transaction; `missing` are the offsets that it steps over because the log had lost them."""

    writer: int
    transaction: Transaction
    missing: frozenset[int]


class Session:
    """One connection to the server, with the version of the fence that it watches."""

    def __init__(self, watched: int) -> None:
        self.watched = watched


class OnTheWire(NamedTuple):
    """A transaction that was sent, and may arrive at any time."""

    session: Session
    packed: Packed
    reply: Reply


class Content(NamedTuple):
    """Everything a server holds, which records were lost before they could get in, and who wrote which sequence."""

    server: MemoryServer
    missing: frozenset[int]
    writers: dict[int, int]

    @classmethod
    def none(cls) -> Content:
        return cls(MemoryServer(), frozenset(), {})

    def copy(self) -> Content:
        values = {name: copy.copy(value) for name, value in self.server.values.items()}
        server = MemoryServer(values, dict(self.server.expires_at))
        return Content(server, self.missing, dict(self.writers))


class Store:
    """The server's side: one content, and the transactions on the wire to it."""

    def __init__(self) -> None:
        self.content = Content.none()
        self.snapshots: list[Content] = []
        self.wire: list[OnTheWire] = []
        self.down = False
        self.failovers = self.fenced = 0
        self.version = 0  # of the fence: a WATCH notices any write of it, even of the same value

    @property
    def stored(self) -> LoadedState:
        return run(MemoryStore(PARTITION, self.content.server).load())

    @property
    def applied(self) -> Applied | None:
        return self.stored.applied

    def arrive(self, sent: OnTheWire, *, reply_lost: bool) -> None:
        """The transaction is applied or fenced off; the worker hears of it, or not."""
        self.wire.remove(sent)
        if sent.session.watched != self.version:
            self.fenced += 1
            self._tell(
                sent, lambda: sent.reply.fail(Fenced("somebody else wrote its state")), reply_lost
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
        self._tell(sent, lambda: sent.reply.answer(refused), reply_lost)

    def _tell(self, sent: OnTheWire, tell: Callable[[], None], reply_lost: bool) -> None:
        if sent.reply.decided:
            return  # nobody listens any more
        if reply_lost:
            sent.reply.fail(StoreDown("the reply was lost"))
        else:
            tell()

    def lose(self, sent: OnTheWire) -> None:
        """The connection broke before the transaction arrived."""
        self.wire.remove(sent)
        self.give_up(sent)

    def give_up(self, sent: OnTheWire) -> None:
        """The worker waits no longer, but the transaction may still arrive."""
        if not sent.reply.decided:
            sent.reply.fail(StoreDown("no reply"))

    def empty(self) -> None:
        self.version += 1
        self.content = Content.none()
        self.snapshots = []

    def fail_over(self) -> None:
        """A replica that was behind takes over: the last writes are lost."""
        if self.snapshots:
            self.failovers += 1
            self.version += 1
            self.content = self.snapshots[0].copy()
            self.snapshots = self.snapshots[:1]


class Connection:
    """A worker's side of the store. See `millpond.agents.ports.Store`."""

    def __init__(
        self,
        store: Store,
        writer: int,
        loaded: Callable[[LoadedState], None],
        missing: Callable[[int, int], frozenset[int]],
    ) -> None:
        """`loaded` hears what was loaded; `missing` tells which offsets of a range were never read."""
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
        sent = OnTheWire(self._session, packed, Reply())
        self._store.wire.append(sent)
        return cast(Awaitable[Sequence[Refusal]], sent.reply)

    async def check(self) -> None:
        await self._reach()
        if self._session.watched != self._store.version:
            raise Fenced("somebody else wrote its state")

    async def close(self) -> None:
        """What is on the wire stays there."""


async def _wait(committing: Awaitable[Sequence[Refusal]]) -> Sequence[Refusal]:
    return await committing
