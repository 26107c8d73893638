"""What the page shows, looked up with the functions of the command line; every list has a bound."""

from __future__ import annotations

import asyncio
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
from millpond.pipeline.operate import dead_letters as letters
from millpond.pipeline.operate.clients import clients
from millpond.pipeline.operate.dead_letter_snapshot import DeadLetterSnapshot
from millpond.pipeline.operate.dead_letters import FoundDeadLetter
from millpond.pipeline.operate.lag import AgentLag, LagReader, lags
from millpond.pipeline.settings import Settings
from millpond.schemas.errors import MillpondError, StoreError
from millpond.schemas.events import AgentName
from millpond.schemas.rules import Rules

LISTED_MAX: Final = 100  # of anything that is listed
SUBSCRIPTIONS_MAX: Final = 10  # of each client in the list
FRESH_S: Final = 1.0  # so long an answer serves everybody
REST_RATIO: Final = 4  # a look that took long is not repeated for so many times as long
REMEMBERED_MAX: Final = 100  # looks with a name: one for each topic that somebody has open
KAFKA_TIMEOUT_S: Final = 25.0  # longer than each of the clients' own limits, which say more
CLOSE_TIMEOUT_S: Final = 5.0
RATE_WINDOW_S: Final = 10.0
RATE_STALE_S: Final = 60.0  # what was applied before nobody looked for so long says nothing of now

Answer = TypeVar("Answer")


class SharedLookup(Generic[Answer]):
    """One look at a time, however many ask: its answer, or its error, is everybody's for a while."""

    def __init__(self, look: Callable[[], Awaitable[Answer]]) -> None:
        """Nothing is looked at before somebody asks."""
        self._look = look
        self._task: asyncio.Task[Answer] | None = None
        self._fresh_until = 0.0

    async def get(self) -> Answer:
        """The answer.

        Raises:
            Whatever the look does.
        """
        now = asyncio.get_running_loop().time()
        if self._task is None or (self._task.done() and now >= self._fresh_until):
            self._task = asyncio.create_task(self._timed())
        return await asyncio.shield(self._task)

    async def _timed(self) -> Answer:
        clock = asyncio.get_running_loop().time
        began, rest_s = clock(), FRESH_S
        try:
            answer = await self._look()
            rest_s = max(FRESH_S, REST_RATIO * (clock() - began))
            return answer
        finally:
            self._fresh_until = clock() + rest_s


class SharedLookups(Generic[Answer]):
    """Looks with a name, the latest so many."""

    def __init__(self, look: Callable[[str], Awaitable[Answer]]) -> None:
        """None yet."""
        self._look = look
        self._lookups: OrderedDict[str, SharedLookup[Answer]] = OrderedDict()

    async def get(self, name: str) -> Answer:
        """The answer of the look with this name."""
        if name not in self._lookups:
            self._lookups[name] = SharedLookup(lambda: self._look(name))
        self._lookups.move_to_end(name)
        if len(self._lookups) > REMEMBERED_MAX:
            self._lookups.popitem(last=False)
        return await self._lookups[name].get()


class Rates:
    """Records that each agent applies in a second, from successive applied offsets."""

    def __init__(self) -> None:
        """Nothing is known before the second look."""
        self._lookups: deque[tuple[float, dict[tuple[AgentName, int], int]]] = deque()

    def note(self, at_s: float, found: Sequence[AgentLag]) -> None:
        """What is applied at that time, by a clock that never goes back."""
        applied = {
            (each.agent, each.partition): each.applied
            for agent in found
            for each in agent.partitions
            if each.applied is not None
        }
        self._lookups.append((at_s, applied))
        while at_s - self._lookups[0][0] > (
            RATE_WINDOW_S if len(self._lookups) > 2 else RATE_STALE_S
        ):
            self._lookups.popleft()

    def of(self, agent: AgentName) -> float | None:
        """Records a second; None until it is known."""
        if len(self._lookups) < 2:
            return None
        (since, before), (at, after) = self._lookups[0], self._lookups[-1]
        gone = sum(
            # An agent that is rebuilt begins anew.
            max(after[each] - offset, 0)
            for each, offset in before.items()
            if each[0] == agent and each in after
        )
        return gone / (at - since) if at > since else None


class Lags:
    """Lag and rate of all agents. The connection to Kafka is kept from look to look, and made anew once it failed."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        """Not connected yet."""
        self._settings, self._rules = settings, rules
        self._rates = Rates()
        self._offsets: LagReader | None = None

    async def look(self) -> dict[str, Any]:
        """Each agent, with its partitions.

        Raises:
            MillpondError, KafkaError: Kafka or Redis is away.
        """
        try:
            async with asyncio.timeout(KAFKA_TIMEOUT_S):
                found = await self._lags()
        except StoreError:
            raise  # Kafka's connection is as good as it was
        except (KafkaError, MillpondError):
            await self.close()
            raise
        except TimeoutError as error:
            await self.close()
            raise MillpondError(f"Kafka has not answered for {KAFKA_TIMEOUT_S:g} s") from error
        self._rates.note(asyncio.get_running_loop().time(), found)
        return {"at": now_ms(), "agents": [self._described(each) for each in found]}

    async def _lags(self) -> list[AgentLag]:
        if self._offsets is None:
            self._offsets = LagReader(self._settings.kafka, self._settings.app)
            await self._offsets.__aenter__()
        return await lags(self._offsets, self._settings, self._rules)

    def _described(self, found: AgentLag) -> dict[str, Any]:
        return {
            "agent": found.agent,
            "behind": found.behind,
            "uncommitted": found.uncommitted,
            "oldest_at": found.oldest_at,
            "rate": self._rates.of(found.agent),
            "partitions": [
                {**msgspec.to_builtins(one), "behind": one.behind} for one in found.partitions
            ],
        }

    async def close(self) -> None:
        """Disconnect from Kafka, which may not answer."""
        offsets, self._offsets = self._offsets, None
        if offsets is not None:
            with suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await offsets.__aexit__(None, None, None)


class Lookups:
    """All that the page shows."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        """Nothing is read before somebody looks."""
        self._settings, self._rules = settings, rules
        self._lags = Lags(settings, rules)
        self.agents = SharedLookup(self._lags.look)
        self.topics = SharedLookup(self._topics)
        self.topic = SharedLookups(self._topic)
        self.clients = SharedLookups(self._clients)
        self.dead_letters = SharedLookup(self._dead_letters)

    async def close(self) -> None:
        """Let go of Kafka."""
        await self._lags.close()

    async def _topics(self) -> dict[str, Any]:
        found = await deepest(self._settings, self._rules, LISTED_MAX)
        return {"at": now_ms(), **msgspec.to_builtins(found)}

    async def _topic(self, topic: str) -> dict[str, Any]:
        """Of its members, subscribers and leases the first so many, and how many there are."""
        found = msgspec.to_builtins(await explain(self._settings, self._rules, topic))
        for name in ("members", "subscribers", "leases"):
            found[f"{name}_total"], found[name] = len(found[name]), found[name][:LISTED_MAX]
        return {"at": now_ms(), **found}

    async def _clients(self, part: str) -> dict[str, Any]:
        """Those whose id contains this part: who is online first, then who was last."""
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
        """The newest first."""
        with DeadLetterSnapshot() as snapshot:
            async for found in letters.scan(self._settings, self._rules, None):
                snapshot.add(*found)
            total, newest = len(snapshot), snapshot.newest(LISTED_MAX)[::-1]
        listed = [
            {
                "carried_out": letters.carried_out(self._rules, found),
                **found.describe(),
                "subscribers": [*map(shown, found.dead.subscribers[:SUBSCRIPTIONS_MAX])],
            }
            for found in (FoundDeadLetter(*each) for each in newest)
        ]
        return {"at": now_ms(), "dead_letters": listed, "total": total}


def _shortened(client: dict[str, Any]) -> dict[str, Any]:
    held = client["subscriptions"]
    return {**client, "subscriptions": held[:SUBSCRIPTIONS_MAX], "subscriptions_total": len(held)}


def _first(kept: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    def order(client: dict[str, Any]) -> tuple[bool, int, str]:
        since = max(client["online_at"] or 0, client["offline_at"] or 0)
        return not client["online"], -since, client["client_id"]

    return sorted(kept.values(), key=order)[:LISTED_MAX]
