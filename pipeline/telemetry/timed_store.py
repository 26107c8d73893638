"""Measures a partition's store: the time of each answer, and the age of the oldest open request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any, Generic

from millpond.agents.effects import Refusal
from millpond.agents.ports import Applied, LoadedState, Packed, Store, Transaction
from millpond.agents.reads import Read
from millpond.pipeline.telemetry.agent import AgentCounts
from millpond.pipeline.telemetry.histogram import histogram_of


class TimedStore(Generic[Packed]):
    """A store that passes every call to another one, and measures it. See `millpond.agents.ports.Store`."""

    def __init__(self, store: Store[Packed], counts: AgentCounts) -> None:
        self._store, self._counts = store, counts
        # Operation → start of its open request. Of one operation at most one request is open at a time.
        self._waiting: dict[str, float] = {}
        self.loaded: Applied | None = None  # the fence at the last load

    @property
    def unanswered_s(self) -> float:
        """The age of the oldest open request; 0 if no request is open."""
        return time.perf_counter() - min(self._waiting.values()) if self._waiting else 0.0

    async def load(self) -> LoadedState:
        stored: LoadedState = await self._timed("load", self._store.load())
        self.loaded = stored.applied
        return stored

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        answers: list[Any] = await self._timed("read", self._store.read(reads))
        return answers

    def pack(self, transaction: Transaction) -> Packed:
        return self._store.pack(transaction)

    def commit(self, packed: Packed) -> Awaitable[Sequence[Refusal]]:
        self._waiting["commit"] = time.perf_counter()
        committing = asyncio.ensure_future(self._store.commit(packed))
        committing.add_done_callback(partial(self._committed, self._waiting["commit"]))
        return committing

    def _committed(self, began: float, committing: asyncio.Future[Sequence[Refusal]]) -> None:
        failed = committing.cancelled() or committing.exception() is not None
        self._answered("commit", began, failed=failed)

    async def check(self) -> None:
        await self._timed("check", self._store.check())

    async def close(self) -> None:
        self._waiting.clear()
        await self._store.close()

    async def _timed(self, operation: str, answer: Awaitable[Any]) -> Any:
        began = self._waiting[operation] = time.perf_counter()
        failed = True
        try:
            result = await answer
            failed = False
            return result
        finally:
            self._answered(operation, began, failed=failed)

    def _answered(self, operation: str, began: float, *, failed: bool) -> None:
        self._waiting.pop(operation, None)
        if failed:
            self._counts.store_failures[operation] += 1
        else:
            seconds = time.perf_counter() - began
            histogram_of(self._counts.store_s, operation).add(seconds)
