"""What a worker tells: its agent's counts, how far each partition is, and whether it is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import Applied, Store
from millpond.pipeline.telemetry.agent import AgentCounts, PartitionObserver
from millpond.pipeline.telemetry.families import Metric, counter, gauge, histogram
from millpond.pipeline.telemetry.timed_store import TimedStore
from millpond.schemas.events import AgentName

SAMPLE_INTERVAL_S: Final = 5.0  # between questions to Kafka about the ends of the partitions
# A store that has not answered for so long is away: an answer takes milliseconds, a state that is loaded more.
STORE_PATIENCE_S: Final = 3.0

Ends = Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]


class OwnedPartitions(Protocol):
    """The partitions of a worker."""

    def drivers(self) -> Mapping[int, PartitionDriver[Any]]:
        """Of those that are this worker's now."""
        ...

    @property
    def loading(self) -> Sequence[int]:
        """Those whose state is not loaded yet."""
        ...

    @property
    def assigned(self) -> bool:
        """Whether Kafka has said which partitions are this worker's, if only that none is."""
        ...


class _Watched:
    """One partition, as long as it has the same owner."""

    def __init__(self, counts: AgentCounts, store: Store[Any]) -> None:
        self.observer = PartitionObserver(counts)
        self.store = TimedStore(store, counts)
        self.end: int | None = None  # of the log, when it was last asked for
        self._end_asked_at = 0.0
        self._caught_up_at = 0.0  # all that was in the log by then is in the store
        self._skipped = self._lost = 0

    def take_end(self, end: int, asked_at: float) -> None:
        """Note where the log ends, once Kafka has answered."""
        self.end, self._end_asked_at = end, asked_at

    def lag(self, driver: PartitionDriver[Any]) -> int | None:
        """Records that are not known to be in the store; None before the end of the log is known."""
        if self.end is None:
            return None
        behind = max(self.end - _done(driver), 0)
        if not behind:
            self._caught_up_at = max(self._caught_up_at, self._end_asked_at)
        return behind

    @property
    def fence(self) -> Applied | None:
        """The fence, as far as it is known."""
        return self.observer.fence or self.store.loaded

    def age_s(self, now: float) -> float:
        """How old the oldest record that waits can be at most; 0 while nothing is known."""
        applied_ms = 0 if self.fence is None else self.fence.timestamp
        since = max(self._caught_up_at, applied_ms / 1000)
        return max(now - since, 0) if since else 0.0

    def count_others(self, counts: AgentCounts, driver: PartitionDriver[Any]) -> None:
        """What the driver has counted since the last time."""
        counts.records_skipped += driver.records_skipped - self._skipped
        counts.records_lost += driver.records_lost - self._lost
        self._skipped, self._lost = driver.records_skipped, driver.records_lost


def _done(driver: PartitionDriver[Any]) -> int:
    return driver.next_offset if driver.committable is None else driver.committable


class WorkerTelemetry:
    """One per worker process."""

    def __init__(self, agent: AgentName, owned: Callable[[], OwnedPartitions], ends: Ends) -> None:
        """`ends` asks Kafka for the end of each of these partitions."""
        self.agent, self.counts = agent, AgentCounts()
        self._owned, self._ends = owned, ends
        self._watched: dict[int, _Watched] = {}

    def watch(self, number: int, store: Store[Any]) -> tuple[TimedStore[Any], PartitionObserver]:
        """A partition begins: its store, watched, and who looks on."""
        watched = self._watched[number] = _Watched(self.counts, store)
        return watched.store, watched.observer

    async def run(self) -> NoReturn:
        """Ask Kafka from time to time how long the partitions are, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            await self.sample()

    async def sample(self) -> None:
        """How long the partitions are now."""
        asked_at = time.time()
        ends = await self._ends(sorted(self._owned().drivers()))
        for number, _, watched in self._now():
            if number in ends:
                watched.take_end(ends[number], asked_at)
        self._take_stock()

    def _now(self) -> list[tuple[int, PartitionDriver[Any], _Watched]]:
        drivers = self._owned().drivers()
        for number in self._watched.keys() - drivers.keys():
            del self._watched[number]
        return [(number, driver, self._watched[number]) for number, driver in drivers.items()]

    def _take_stock(self) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
        """Lag and age of each partition."""
        lags: dict[tuple[str, ...], float] = {}
        ages: dict[tuple[str, ...], float] = {}
        now = time.time()
        for number, driver, watched in self._now():
            watched.count_others(self.counts, driver)
            lag = watched.lag(driver)
            if lag is not None:
                labels = (self.agent, str(number))
                lags[labels] = lag
                ages[labels] = watched.age_s(now) if lag else 0.0
        return lags, ages

    # -- ready

    def complaints(self) -> list[str]:
        """Why it is not ready, as far as that is known without asking."""
        owned = self._owned()
        if not owned.assigned:
            return ["Kafka has not assigned any partitions yet"]
        loading = owned.loading
        found = []
        if loading:
            found.append(f"partitions {', '.join(map(str, sorted(loading)))} are not loaded yet")
        silent = {
            number: watched.store.silent_s
            for number, _, watched in self._now()
            if watched.store.silent_s > STORE_PATIENCE_S
        }
        if silent:
            numbers = ", ".join(map(str, sorted(silent)))
            found.append(
                f"the store has not answered for {max(silent.values()):.0f} s: partitions {numbers}"
            )
        return found

    # -- metrics

    def metrics(self) -> Sequence[Metric]:
        lags, ages = self._take_stock()
        of_partition = ("agent", "partition")
        return [
            *self._counted(),
            *self._gauges(),
            gauge("millpond_lag_records", "Records in Kafka not known to be in the store.", of_partition, lags),
            gauge("millpond_lag_seconds",
                  "Age, at most, of the oldest record not known to be in the store.", of_partition, ages),
        ]  # fmt: skip

    def _counted(self) -> list[Metric]:
        counts, agent = self.counts, self.agent
        one, mine = ("agent",), {(agent,): 0.0}

        def of(values: Mapping[Any, int]) -> dict[tuple[str, ...], float]:
            return {
                (agent, *(key if isinstance(key, tuple) else (key,))): number
                for key, number in values.items()
            }

        stores = {(agent, name): each for name, each in counts.store_s.items()}
        # fmt: off
        return [
            counter("millpond_events_total", "Events of this agent, by type and by what came of them.", ("agent", "type", "outcome"), of(counts.events)),
            counter("millpond_records_skipped_total", "Records of other agents' topics.", one, mine | {(agent,): counts.records_skipped}),
            counter("millpond_records_lost_total", "Records that were gone from Kafka before they were read.", one, mine | {(agent,): counts.records_lost}),
            counter("millpond_outputs_total", "What was asked of Kafka, by type.", ("agent", "type"), of(counts.outputs)),
            counter("millpond_dead_letters_total", "Records and messages given up on.", ("agent", "reason"), of(counts.dead_letters)),
            counter("millpond_leases_total", "Messages handed out that have to be confirmed.", one, {(agent,): counts.leases}),
            counter("millpond_redeliveries_total", "Messages handed out once more.", one, {(agent,): counts.redeliveries}),
            counter("millpond_deliveries_total", "What bridges report of messages handed out.", ("agent", "outcome"), of(counts.deliveries)),
            counter("millpond_seen_ids_total", "Message ids remembered, to know them again.", one, {(agent,): counts.seen_ids}),
            counter("millpond_store_failures_total", "Questions that the store did not answer.", ("agent", "operation"), of(counts.store_failures)),
            histogram("millpond_batch_records", "Events of this agent in one transaction.", one, {(agent,): counts.batch_records}),
            histogram("millpond_batch_duration_seconds", "From the first step of a batch until it is in the store.", one, {(agent,): counts.batch_s}),
            histogram("millpond_store_duration_seconds", "Round trips to the store.", ("agent", "operation"), stores),
            histogram("millpond_publish_to_command_seconds", "From a publish to its first command, if somebody had room.", one, {(agent,): counts.delivery_s}),
        ]
        # fmt: on

    def _gauges(self) -> list[Metric]:
        owned, one = self._owned(), ("agent",)
        loading = len(owned.loading)
        states = {
            (self.agent, "loading"): float(loading),
            (self.agent, "loaded"): float(len(owned.drivers()) - loading),
        }
        fences = [watched.fence for _, _, watched in self._now()]
        delivery = [fence.machine.get("delivery", {}) for fence in fences if fence is not None]

        def total(name: str) -> dict[tuple[str, ...], float]:
            return {(self.agent,): float(sum(each.get(name, 0) for each in delivery))}

        # fmt: off
        return [
            gauge("millpond_partitions", "Partitions of this process.", ("agent", "state"), states),
            gauge("millpond_leases_unconfirmed", "Messages handed out of which no bridge has said a word yet.", one, total("unconfirmed")),
            gauge("millpond_leasing_paused_partitions", "Partitions that hand out nothing, since too much is unconfirmed.", one, total("paused")),
            gauge("millpond_windows_waiting", "Topics (of pubsub: readers) with messages that nobody has room for.", one, total("waiting")),
        ]
        # fmt: on
