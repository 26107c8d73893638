"""`millpond replay`: into which database, from where to where, and compared with what."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

from msgspec import structs

from millpond.pipeline.compare import differences
from millpond.pipeline.compare.differences import Comparing, Comparison
from millpond.pipeline.compare.owned_keys import OwnedKeys
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.signals import on_signal
from millpond.pipeline.replay.folding import Folding
from millpond.pipeline.replay.log_extent import LogExtent, LogExtents, horizon, source
from millpond.pipeline.replay.target import Marker, check_not_live, claim, write_marker
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.keyspace import Keyspace, keyspace
from millpond.pipeline.stores.registry import open_store
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.rules.pool import Pool

EARLIEST: Final = "earliest"
LATEST: Final = "latest"

Result = TypeVar("Result")


class ReplayRequest(NamedTuple):
    """What is asked for: times are ISO, or `earliest` and `latest`; `live` is what to compare with, if anything."""

    agents: Sequence[AgentName]
    into: Pool
    begins: str = EARLIEST
    ends: str = LATEST
    live: Pool | None = None


class ReplayResult(NamedTuple):
    """What came of it: offsets gone by, notes on what is missing, and what differs, if that was asked."""

    records: int
    notes: list[str]
    compared: Comparison | None


class Replay:
    """One run. `total` and `folded` are offsets, for who watches; `notes` are complete when folding begins."""

    def __init__(self, settings: Settings, rules: Rules, wish: ReplayRequest) -> None:
        """Nothing is opened before `run`.

        Raises:
            ConfigError: the wish makes no sense.
        """
        self.settings, self.rules, self.wish = settings, rules, wish
        self._begins_ms = None if wish.begins == EARLIEST else time_of(wish.begins, "--from")
        self._ends_ms = None if wish.ends == LATEST else time_of(wish.ends, "--to")
        if wish.live is not None and self._ends_ms is not None:
            raise ConfigError("--diff compares with what live has applied now: leave --to out")
        self.total = 0
        self.notes: list[str] = []
        self._foldings: dict[AgentName, Folding] = {}

    @property
    def folded(self) -> int:
        """How far it has come: offsets of all agents, without what an interrupted run had folded."""
        return sum(folding.folded for folding in self._foldings.values())

    @property
    def agent(self) -> str:
        """Whose log is being folded."""
        return next(reversed(self._foldings), "")

    async def run(self) -> ReplayResult:
        """Fold and compare.

        Raises:
            MillpondError: why it cannot be done; the target stays marked as incomplete once it was begun.
        """
        wish = self.wish
        async with AsyncExitStack() as stack:
            kafka = await stack.enter_async_context(source(self.settings.kafka))
            target = await stack.enter_async_context(keyspace(wish.into))
            await target.check_primary()
            live = None
            if wish.live is not None:
                live = await stack.enter_async_context(keyspace(wish.live))
            await self._check_target(target)
            markers = await self._claim(kafka, target, live)
            stack.push_async_callback(self._stop)
            for agent in wish.agents:
                await self._fold(agent, markers[agent], markers[agent].ends)
            compared = None if live is None else await self._compare(live, target, markers)
            for agent, marker in markers.items():
                ends = {**marker.ends, **self._foldings[agent].positions}
                done = structs.replace(marker, ends=ends, complete=True)
                await write_marker(target, self.settings.app, agent, done)
        return ReplayResult(self.folded, self.notes, compared)

    async def _stop(self) -> None:
        for folding in self._foldings.values():
            await folding.stop()

    async def _check_target(self, target: Keyspace) -> None:
        pools = {self.rules.pool(agent).name: self.rules.pool(agent) for agent in self.wish.agents}
        live = [*pools.values(), *([] if self.wish.live is None else [self.wish.live])]
        await check_not_live(target, self.wish.into, live)

    async def _claim(
        self, kafka: LogExtents, target: Keyspace, live: Keyspace | None
    ) -> dict[AgentName, Marker]:
        """What of each agent's log is to be folded; the target is marked as being in the middle of it."""
        app, wish = self.settings.app, self.wish
        applied = {} if live is None else await self._applied(live, kafka.cluster_id)
        markers: dict[AgentName, Marker] = {}
        of_topics = {
            topic: await kafka.extents(topic)
            for topic in set(map(keys.SOURCE_TOPIC.__getitem__, wish.agents))
        }
        for agent in wish.agents:
            topic = keys.SOURCE_TOPIC[agent]
            extents = of_topics[topic]
            starts, ends = await self._bounds(kafka, topic, extents)
            if live is not None:
                ends = {
                    number: applied.get(Partition(app, agent, number), starts[number])
                    for number in extents
                }
                _check_ends(live, agent, ends, extents)
            wanted = Marker(
                cluster_id=kafka.cluster_id, begins=wish.begins, starts=starts, ends=ends
            )
            self._note(agent, extents, starts)
            markers[agent] = await claim(target, app, agent, self.rules, wanted)
        self.total = sum(
            max(end - marker.starts[number], 0)
            for marker in markers.values()
            for number, end in marker.ends.items()
        )
        return markers

    async def _bounds(
        self, kafka: LogExtents, topic: str, extents: Mapping[int, LogExtent]
    ) -> tuple[dict[int, int], dict[int, int]]:
        starts = {number: extent.start for number, extent in extents.items()}
        ends = {number: extent.end for number, extent in extents.items()}
        if self._begins_ms is not None:
            starts = await kafka.at(topic, self._begins_ms)
        if self._ends_ms is not None:
            ends = await kafka.at(topic, self._ends_ms)
        return starts, ends

    def _note(
        self, agent: AgentName, extents: Mapping[int, LogExtent], starts: Mapping[int, int]
    ) -> None:
        lost = horizon(agent, extents)
        if lost is not None:
            self.notes.append(f"{agent}: {lost}")
        if any(starts[number] > extent.start for number, extent in extents.items()):
            self.notes.append(
                f"{agent}: begins at {self.wish.begins} with empty state: what was there before is missing,"
                " and the rules are this configuration's until the log names others"
            )

    async def _applied(self, live: Keyspace, cluster_id: str) -> dict[Partition, int]:
        found = await differences.offsets(live, self._partitions(), cluster_id)
        if not found:
            agents = ", ".join(self.wish.agents)
            raise MillpondError(
                f"{live.where} holds nothing of {self.settings.app!r} by {agents}: there is nothing to compare with"
            )
        return found

    def _partitions(self) -> list[Partition]:
        app, count = self.settings.app, self.settings.kafka.partitions
        return [
            Partition(app, agent, number) for agent in self.wish.agents for number in range(count)
        ]

    async def _fold(self, agent: AgentName, marker: Marker, ends: Mapping[int, int]) -> None:
        folding = self._foldings.get(agent)
        if folding is None:
            folding = self._foldings[agent] = Folding(
                agent, self.settings, self.rules,
                lambda partition: open_store(self.wish.into, partition),
                marker.cluster_id, marker.starts, again=self.wish.live is not None,
            )  # fmt: skip
        await folding.fold_to(ends)

    async def _compare(
        self, live: Keyspace, target: Keyspace, markers: Mapping[AgentName, Marker]
    ) -> Comparison:
        async def go_on(offsets: Mapping[Partition, int]) -> None:
            for agent in (
                self.wish.agents
            ):  # the sessions' first: their commands may touch what pubsub shows
                ends = {each.number: end for each, end in offsets.items() if each.agent == agent}
                await self._fold(agent, markers[agent], ends)

        owned = OwnedKeys(self.settings.app, self.wish.agents, self.rules)
        cluster_id = next(iter(markers.values())).cluster_id
        comparing = Comparing(live, target, self._partitions(), cluster_id, go_on)
        return await comparing.run(owned)


def _check_ends(
    live: Keyspace, agent: AgentName, ends: Mapping[int, int], extents: Mapping[int, LogExtent]
) -> None:
    """What live has applied must be in the log, or it would be waited for without end."""
    for number, extent in extents.items():
        if ends[number] > max(extent.end, extent.start):
            raise MillpondError(
                f"{live.where} holds the state of {agent} up to offset {ends[number] - 1} of"
                f" {keys.SOURCE_TOPIC[agent]}[{number}], but the log ends before {extent.end}: was the topic deleted and created again?"
            )


def time_of(text: str, what: str) -> int:
    """An ISO time, of this machine's zone if it names none, in ms since the epoch.

    Raises:
        ConfigError: it is none; `what` names the option.
    """
    try:
        return int(datetime.fromisoformat(text).astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        named = {"--from": EARLIEST, "--to": LATEST}[what]
        raise ConfigError(f"{what}: {text!r} is neither {named} nor an ISO time") from error


@asynccontextmanager
async def stopped_by_signals() -> AsyncIterator[None]:
    """SIGINT and SIGTERM end the task that is inside as if it were cancelled."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "signals are for a task"
    on_signal(task.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def run_until_done(work: Callable[[], Coroutine[Any, Any, Result]], interrupted: str) -> Result:
    """Run to the end, or to a signal.

    Raises:
        MillpondError: a signal came; `interrupted` says what that means.
    """

    async def run() -> Result:
        async with stopped_by_signals():
            return await work()

    use_uvloop()
    try:
        return asyncio.run(run())
    except (asyncio.CancelledError, KeyboardInterrupt) as error:
        raise MillpondError(interrupted) from error
