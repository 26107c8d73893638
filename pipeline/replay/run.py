"""`millpond replay`: fold the logs of some agents into a database, and compare it with the live one.

1. Connect to Kafka, to the target, and to the live database if there is one to compare with.
2. Check that the target is not the live store.
3. Find the offsets to fold: from `--from` to `--to`, or to the applied offsets of the live database.
4. Claim the target: it must be empty, or have an interrupted replay of the same offsets.
5. Fold the agents one after the other.
6. Compare, and fold further as far as the comparison asks.
7. Mark the target as complete. After an error or a signal it stays marked as incomplete.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

from msgspec import structs

from millpond.pipeline.compare import differences
from millpond.pipeline.compare.differences import Comparer, Comparison
from millpond.pipeline.compare.owned_keys import OwnedKeys
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.signals import cancelled_by
from millpond.pipeline.replay.folding import Folding
from millpond.pipeline.replay.log_extent import LogExtent, LogExtents, describe_loss, open_extents
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
    """What to replay. `begins` and `ends` are ISO times, or `earliest` and `latest`. `live` is the database to compare with."""

    agents: Sequence[AgentName]
    into: Pool
    begins: str = EARLIEST
    ends: str = LATEST
    live: Pool | None = None


class ReplayResult(NamedTuple):
    """The result: the number of offsets folded, notes on missing records, and the comparison if there was one."""

    records: int
    notes: list[str]
    compared: Comparison | None


class Replay:
    """One run of the command. A progress bar reads `agent`, `total` and `folded`.

    - `total`: the number of offsets to fold; 0 until they are known.
    - `notes`: what the replay cannot contain; complete when folding begins.
    - `_foldings`: one `Folding` for each agent that has begun.
    """

    def __init__(self, settings: Settings, rules: Rules, request: ReplayRequest) -> None:
        """Nothing connects before `run`.

        Raises:
            ConfigError: a time cannot be read, or `--to` and `--diff` are combined.
        """
        self.settings, self.rules, self.request = settings, rules, request
        self._begins_ms = (
            None if request.begins == EARLIEST else parse_time(request.begins, "--from")
        )
        self._ends_ms = None if request.ends == LATEST else parse_time(request.ends, "--to")
        if request.live is not None and self._ends_ms is not None:
            raise ConfigError(
                "--diff compares with what the live database has applied now: leave --to out"
            )
        self.total = 0
        self.notes: list[str] = []
        self._foldings: dict[AgentName, Folding] = {}

    @property
    def folded(self) -> int:
        """The number of offsets that are folded, of all agents."""
        return sum(folding.folded for folding in self._foldings.values())

    @property
    def agent(self) -> str:
        """The agent whose log is being folded; empty before the first."""
        return next(reversed(self._foldings), "")

    async def run(self) -> ReplayResult:
        """Fold, and compare if requested.

        Raises:
            MillpondError: the replay is impossible or failed. A target that was claimed stays marked as incomplete.
        """
        request = self.request
        async with AsyncExitStack() as stack:
            kafka = await stack.enter_async_context(open_extents(self.settings.kafka))
            target = await stack.enter_async_context(keyspace(request.into))
            await target.check_primary()
            live = None
            if request.live is not None:
                live = await stack.enter_async_context(keyspace(request.live))
            await self._check_target(target)
            markers = await self._claim(kafka, target, live)
            stack.push_async_callback(self._stop)
            for agent in request.agents:
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
        pools = {
            self.rules.pool(agent).name: self.rules.pool(agent) for agent in self.request.agents
        }
        live = [*pools.values(), *([] if self.request.live is None else [self.request.live])]
        await check_not_live(target, self.request.into, live, self.settings.app)

    async def _claim(
        self, kafka: LogExtents, target: Keyspace, live: Keyspace | None
    ) -> dict[AgentName, Marker]:
        """Find the offsets to fold of each agent, and mark the target with them."""
        app, request = self.settings.app, self.request
        applied = {} if live is None else await self._applied(live, kafka.cluster_id)
        markers: dict[AgentName, Marker] = {}
        extents_of_topics = {
            topic: await kafka.extents(topic)
            for topic in set(map(keys.SOURCE_TOPIC.__getitem__, request.agents))
        }
        for agent in request.agents:
            topic = keys.SOURCE_TOPIC[agent]
            extents = extents_of_topics[topic]
            starts, ends = await self._bounds(kafka, topic, extents)
            if live is not None:
                ends = {
                    number: applied.get(Partition(app, agent, number), starts[number])
                    for number in extents
                }
                _check_ends(live, agent, ends, extents)
            wanted = Marker(
                cluster_id=kafka.cluster_id, begins=request.begins, starts=starts, ends=ends
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
            starts = await kafka.offsets_at(topic, self._begins_ms)
        if self._ends_ms is not None:
            ends = await kafka.offsets_at(topic, self._ends_ms)
        return starts, ends

    def _note(
        self, agent: AgentName, extents: Mapping[int, LogExtent], starts: Mapping[int, int]
    ) -> None:
        loss = describe_loss(agent, extents)
        if loss is not None:
            self.notes.append(f"{agent}: {loss}")
        if any(starts[number] > extent.start for number, extent in extents.items()):
            self.notes.append(
                f"{agent}: begins at {self.request.begins} with empty state: earlier state is missing,"
                " and the rules of this configuration are in force until the log names others"
            )

    async def _applied(self, live: Keyspace, cluster_id: str) -> dict[Partition, int]:
        found = await differences.next_offsets(live, self._partitions(), cluster_id)
        if not found:
            agents = ", ".join(self.request.agents)
            raise MillpondError(
                f"{live.where} holds no state of {agents} (app {self.settings.app!r}):"
                " there is nothing to compare with"
            )
        return found

    def _partitions(self) -> list[Partition]:
        app, count = self.settings.app, self.settings.kafka.partitions
        return [
            Partition(app, agent, number)
            for agent in self.request.agents
            for number in range(count)
        ]

    async def _fold(self, agent: AgentName, marker: Marker, ends: Mapping[int, int]) -> None:
        folding = self._foldings.get(agent)
        if folding is None:
            folding = self._foldings[agent] = Folding(
                agent, self.settings, self.rules,
                lambda partition: open_store(self.request.into, partition),
                marker.cluster_id, marker.starts, keep_connected=self.request.live is not None,
            )  # fmt: skip
        await folding.fold_to(ends)

    async def _compare(
        self, live: Keyspace, target: Keyspace, markers: Mapping[AgentName, Marker]
    ) -> Comparison:
        async def continue_to(offsets: Mapping[Partition, int]) -> None:
            # In the order of the request. User commands of sessions may write keys that pubsub writes, too.
            for agent in self.request.agents:
                ends = {each.number: end for each, end in offsets.items() if each.agent == agent}
                await self._fold(agent, markers[agent], ends)

        owned = OwnedKeys(self.settings.app, self.request.agents, self.rules)
        cluster_id = next(iter(markers.values())).cluster_id
        comparer = Comparer(live, target, self._partitions(), cluster_id, continue_to)
        return await comparer.run(owned)


def _check_ends(
    live: Keyspace, agent: AgentName, ends: Mapping[int, int], extents: Mapping[int, LogExtent]
) -> None:
    """Check that the log reaches the applied offsets of the live database.

    Without this check a replay of a shorter log would wait for ever.
    """
    for number, extent in extents.items():
        if ends[number] > max(extent.end, extent.start):
            raise MillpondError(
                f"{live.where} holds the state of {agent} up to offset {ends[number] - 1} of"
                f" {keys.SOURCE_TOPIC[agent]}[{number}], but the log ends before {extent.end}:"
                " was the topic deleted and created again?"
            )


def parse_time(text: str, option: str) -> int:
    """Convert an ISO time to ms since the epoch. A time without a zone is in the zone of this machine.

    Raises:
        ConfigError: it is not an ISO time.
    """
    try:
        return int(datetime.fromisoformat(text).astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        word = {"--from": EARLIEST, "--to": LATEST}[option]
        raise ConfigError(f"{option}: {text!r} is neither {word} nor an ISO time") from error


def run_until_done(work: Callable[[], Coroutine[Any, Any, Result]], interrupted: str) -> Result:
    """Run some work until it is done or a signal arrives.

    Raises:
        MillpondError: a signal arrived. `interrupted` is the message.
    """

    async def run() -> Result:
        async with cancelled_by(signal.SIGINT, signal.SIGTERM):
            return await work()

    use_uvloop()
    try:
        return asyncio.run(run())
    except (asyncio.CancelledError, KeyboardInterrupt) as error:
        raise MillpondError(interrupted) from error
