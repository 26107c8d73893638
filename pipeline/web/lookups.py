"""The answers of the API, made by the functions behind the command line. Every list has a bound.

Many browsers may have the page open, and each asks every two seconds. A `SharedLookup` runs a lookup once and gives its
answer, or its error, to all who ask. The next run begins at the earliest FRESH_S later. A lookup that takes long is
repeated less often: at most a fifth of the time is spent on it.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import msgspec
from aiokafka.errors import KafkaError

from millpond.agents.pubsub.state import shown
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain.topic import explain
from millpond.pipeline.explain.topics import deepest
from millpond.pipeline.operate import dead_letters, unreadable
from millpond.pipeline.operate.clients import clients
from millpond.pipeline.operate.dead_letter_snapshot import DeadLetterSnapshot
from millpond.pipeline.operate.dead_letters import FoundDeadLetter
from millpond.pipeline.operate.lag import AgentLag, LagReader, lags
from millpond.pipeline.settings import Settings
from millpond.schemas.errors import MillpondError, StoreError
from millpond.schemas.events import AgentName
from millpond.schemas.rules import Rules

LISTED_MAX: Final = 100  # rows of each list
SUBSCRIPTIONS_MAX: Final = 10  # of each client, and subscribers of each dead letter
BEGIN_BYTES: Final = 200  # of an unreadable record, as text
# Each lookup connects to Kafka and reads the end of every partition.
UNREADABLE_FRESH_S: Final = 10.0
FRESH_S: Final = 1.0  # the shortest time for which an answer is shared
REST_RATIO: Final = 4  # an answer is shared for this multiple of the time that it took
REMEMBERED_MAX: Final = 100  # lookups with a name: one for each open topic or search of clients
KAFKA_TIMEOUT_S: Final = 25.0  # longer than the clients' own limits, whose errors say more
CLOSE_TIMEOUT_S: Final = 5.0
RATE_WINDOW_S: Final = 10.0  # a rate is the mean over this time
RATE_STALE_S: Final = 60.0  # without a request for this long, the earlier offsets are dropped

Answer = TypeVar("Answer")


class SharedLookup(Generic[Answer]):
    """One lookup, shared by all who ask at the same time."""

    def __init__(self, lookup: Callable[[], Awaitable[Answer]], fresh_s: float = 0.0) -> None:
        """The first `get` runs it. An answer is shared for FRESH_S, or for `fresh_s` if that is longer."""
        self._lookup, self._shared_s = lookup, fresh_s
        self._task: asyncio.Task[Answer] | None = None
        self._fresh_until = 0.0

    async def get(self) -> Answer:
        """Return the latest answer, or wait for the one in progress. Raises what the lookup raises."""
        now = asyncio.get_running_loop().time()
        if self._task is None or (self._task.done() and now >= self._fresh_until):
            self._task = asyncio.create_task(self._timed())
        return await asyncio.shield(self._task)

    async def _timed(self) -> Answer:
        clock = asyncio.get_running_loop().time
        began, rest_s = clock(), max(FRESH_S, self._shared_s)
        try:
            answer = await self._lookup()
            rest_s = max(FRESH_S, self._shared_s, REST_RATIO * (clock() - began))
            return answer
        finally:
            self._fresh_until = clock() + rest_s


class SharedLookups(Generic[Answer]):
    """Shared lookups by name. Only the names that were used last are remembered."""

    def __init__(self, lookup: Callable[[str], Awaitable[Answer]]) -> None:
        """`lookup` gets the name."""
        self._lookup = lookup
        self._lookups: OrderedDict[str, SharedLookup[Answer]] = OrderedDict()

    async def get(self, name: str) -> Answer:
        """Return the answer of the lookup with this name. Raises what the lookup raises."""
        if name not in self._lookups:
            self._lookups[name] = SharedLookup(lambda: self._lookup(name))
        self._lookups.move_to_end(name)
        if len(self._lookups) > REMEMBERED_MAX:
            self._lookups.popitem(last=False)
        return await self._lookups[name].get()


class Rates:
    """The rate at which each agent applies records, from successive applied offsets."""

    def __init__(self) -> None:
        """A rate needs two samples."""
        self._samples: deque[tuple[float, dict[tuple[AgentName, int], int]]] = deque()

    def note(self, at_s: float, found: Sequence[AgentLag]) -> None:
        """Add a sample of the applied offsets at this time of a monotonic clock."""
        applied = {
            (each.agent, each.partition): each.applied
            for agent in found
            for each in agent.partitions
            if each.applied is not None
        }
        self._samples.append((at_s, applied))
        # The last two samples may be further apart than the window: a lookup may take long.
        while at_s - self._samples[0][0] > (
            RATE_WINDOW_S if len(self._samples) > 2 else RATE_STALE_S
        ):
            self._samples.popleft()

    def of(self, agent: AgentName) -> float | None:
        """Records per second; None while it is unknown."""
        if len(self._samples) < 2:
            return None
        (since, before), (at, after) = self._samples[0], self._samples[-1]
        applied = sum(
            # After a rebuild has begun, an applied offset is lower than before.
            max(after[each] - offset, 0)
            for each, offset in before.items()
            if each[0] == agent and each in after
        )
        return applied / (at - since) if at > since else None


class Lags:
    """Lag and rate of all agents. The connection to Kafka is kept, and opened again after a failure."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        """The first lookup connects."""
        self._settings, self._rules = settings, rules
        self._rates = Rates()
        self._offsets: LagReader | None = None

    async def read(self) -> dict[str, Any]:
        """Read the lag of each agent and partition.

        Raises:
            MillpondError, KafkaError: Kafka or Redis does not answer.
        """
        try:
            async with asyncio.timeout(KAFKA_TIMEOUT_S):
                found = await self._lags()
        except StoreError:
            raise  # the connection to Kafka is not affected
        except (KafkaError, MillpondError):
            await self.close()
            raise
        except TimeoutError as error:
            await self.close()
            raise MillpondError(f"Kafka has not answered for {KAFKA_TIMEOUT_S:g} s") from error
        self._rates.note(asyncio.get_running_loop().time(), found)
        agents = [{**each.describe(), "rate": self._rates.of(each.agent)} for each in found]
        return {"at": now_ms(), "agents": agents}

    async def _lags(self) -> list[AgentLag]:
        if self._offsets is None:
            self._offsets = LagReader(self._settings.kafka, self._settings.app)
            await self._offsets.__aenter__()
        return await lags(self._offsets, self._settings, self._rules)

    async def close(self) -> None:
        """Disconnect from Kafka, within a time limit."""
        offsets, self._offsets = self._offsets, None
        if offsets is not None:
            with suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await offsets.__aexit__(None, None, None)


class Lookups:
    """The lookups of the API."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        """Nothing is read before the first request."""
        self._settings, self._rules = settings, rules
        self._lags = Lags(settings, rules)
        self.agents = SharedLookup(self._lags.read)
        self.topics = SharedLookup(self._topics)
        self.topic = SharedLookups(self._topic)
        self.clients = SharedLookups(self._clients)
        self.dead_letters = SharedLookup(self._dead_letters)
        self.unreadable = SharedLookup(self._unreadable, UNREADABLE_FRESH_S)

    async def close(self) -> None:
        """Disconnect from Kafka."""
        await self._lags.close()

    async def _topics(self) -> dict[str, Any]:
        found = await deepest(self._settings, self._rules, LISTED_MAX)
        return {"at": now_ms(), **msgspec.to_builtins(found)}

    async def _topic(self, topic: str) -> dict[str, Any]:
        """One topic, with the first members, subscribers and leases, and the totals."""
        found = msgspec.to_builtins(await explain(self._settings, self._rules, topic))
        for name in ("members", "subscribers", "leases"):
            found[f"{name}_total"], found[name] = len(found[name]), found[name][:LISTED_MAX]
        return {"at": now_ms(), **found}

    async def _clients(self, part: str) -> dict[str, Any]:
        """The clients whose id contains this part: online ones first, then those that were online last."""
        kept: dict[str, dict[str, Any]] = {}
        total = online = 0
        async for found in clients(self._settings, self._rules):
            if part not in found["client_id"]:
                continue
            total += 1
            online += found["online"]
            kept[found["client_id"]] = _shortened(found)
            if len(kept) >= 2 * LISTED_MAX:
                kept = {each["client_id"]: each for each in _first(kept)}
        return {"at": now_ms(), "clients": _first(kept), "total": total, "online": online}

    async def _dead_letters(self) -> dict[str, Any]:
        """The newest dead letters, the newest first."""
        with DeadLetterSnapshot() as snapshot:
            async for found in dead_letters.scan(self._settings, self._rules, None):
                snapshot.add(*found)
            total, newest = len(snapshot), snapshot.newest(LISTED_MAX)[::-1]
        listed = [
            {
                "carried_out": dead_letters.has_owner(self._rules, found),
                **found.describe(),
                "subscribers": [*map(shown, found.dead.subscribers[:SUBSCRIPTIONS_MAX])],
            }
            for found in (FoundDeadLetter(*each) for each in newest)
        ]
        return {"at": now_ms(), "dead_letters": listed, "total": total}

    async def _unreadable(self) -> dict[str, Any]:
        """The newest records that could not be read or stored, the newest first."""
        found = await unreadable.newest(self._settings, LISTED_MAX)
        listed = [
            {
                **msgspec.to_builtins(each),
                "begin": printable(b64decode(each.value)[:BEGIN_BYTES]),
            }
            for each in reversed(found.records)
        ]
        return {"at": now_ms(), "records": listed, "whole": found.whole}


def printable(value: bytes) -> str:
    """Bytes as text. What is no UTF-8, or would not be seen, is escaped."""
    text = value.decode("utf-8", "backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _shortened(client: dict[str, Any]) -> dict[str, Any]:
    subscriptions = client["subscriptions"]
    return {
        **client,
        "subscriptions": subscriptions[:SUBSCRIPTIONS_MAX],
        "subscriptions_total": len(subscriptions),
    }


def _first(kept: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The first clients in the order of the list."""

    def order(client: dict[str, Any]) -> tuple[bool, int, str]:
        since = max(client["online_at"] or 0, client["offline_at"] or 0)
        return not client["online"], -since, client["client_id"]

    return sorted(kept.values(), key=order)[:LISTED_MAX]
