"""Metrics and readiness of a worker: its agent's counts, the lag of each partition, and what keeps it from its work.

How lag is measured:

- Every `SAMPLE_INTERVAL_S` the worker asks Kafka for the end of each owned partition.
- A partition's lag in records is that end minus its committable offset. So records count until the store has them and
  Kafka has their outputs.
- Its lag in seconds is an upper bound for the age of the oldest such record. Two times bound it, and the later one
  counts: the timestamp of the applied record, and the last sample whose end was reached. The second one matters for a
  partition where nothing was published for a long time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import Applied, Store
from millpond.pipeline.telemetry.agent import AgentCounts, PartitionObserver
from millpond.pipeline.telemetry.families import Metric, counter, gauge, histogram
from millpond.pipeline.telemetry.timed_store import TimedStore
from millpond.schemas.events import AgentName

logger = logging.getLogger(__name__)

SAMPLE_INTERVAL_S: Final = 5.0  # between requests to Kafka for the ends of the partitions
# A store with an open request of this age makes the worker not ready. An answer takes milliseconds, a load longer.
STORE_TIMEOUT_S: Final = 3.0

Ends = Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]


class OwnedPartitions(Protocol):
    """The partitions that a worker owns. See `millpond.pipeline.worker.partitions.Partitions`."""

    def drivers(self) -> Mapping[int, PartitionDriver[Any]]:
        """Return the drivers of the owned partitions, by number."""
        ...

    @property
    def loading(self) -> Sequence[int]:
        """The partitions whose state is not loaded yet."""
        ...

    @property
    def assigned(self) -> bool:
        """True once Kafka has made an assignment, even an empty one."""
        ...


class _PartitionTelemetry:
    """The numbers of one partition, while this worker owns it."""

    def __init__(self, counts: AgentCounts, store: Store[Any]) -> None:
        self.observer = PartitionObserver(counts)
        self.store = TimedStore(store, counts)
        self.end: int | None = None  # the end of the log in the last sample
        self._end_asked_at = 0.0  # the time of that sample
        self._caught_up_at = 0.0  # the time of the last sample whose end was reached
        self._skipped = self._lost = 0  # what `counts` already has of the driver's numbers

    def set_end(self, end: int, asked_at: float) -> None:
        """Note the end of the log; `asked_at` is the time before Kafka was asked."""
        self.end, self._end_asked_at = end, asked_at

    def lag(self, driver: PartitionDriver[Any]) -> int | None:
        """Return the number of records not known to be in the store.

        None before the first sample, and before the state is loaded: until then it is unknown what the store has.
        """
        if self.end is None or not driver.loaded_once:
            return None
        behind = max(self.end - _applied_until(driver), 0)
        if not behind:
            self._caught_up_at = max(self._caught_up_at, self._end_asked_at)
        return behind

    @property
    def fence(self) -> Applied | None:
        """The last known fence: of the last batch, or of the last load."""
        return self.observer.fence or self.store.loaded

    def age_s(self, now: float) -> float:
        """Return the upper bound for the age of the oldest record of the lag; 0 while nothing is known."""
        applied_ms = 0 if self.fence is None else self.fence.timestamp
        since = max(self._caught_up_at, applied_ms / 1000)
        return max(now - since, 0) if since else 0.0

    def count_skipped_and_lost(self, counts: AgentCounts, driver: PartitionDriver[Any]) -> None:
        """Add the records that the driver skipped and lost since the last call."""
        counts.records_skipped += driver.records_skipped - self._skipped
        counts.records_lost += driver.records_lost - self._lost
        self._skipped, self._lost = driver.records_skipped, driver.records_lost


def _applied_until(driver: PartitionDriver[Any]) -> int:
    # Without a committable offset nothing was folded here yet, or its first batch is on its way.
    return driver.next_offset if driver.committable is None else driver.committable


class WorkerTelemetry:
    """The metrics and readiness of one worker process."""

    def __init__(self, agent: AgentName, owned: Callable[[], OwnedPartitions], ends: Ends) -> None:
        """`ends` asks Kafka for the ends of partitions. It answers with those that Kafka knows."""
        self.agent, self.counts = agent, AgentCounts()
        self._owned, self._ends = owned, ends
        self._watched: dict[int, _PartitionTelemetry] = {}

    def watch(self, number: int, store: Store[Any]) -> tuple[TimedStore[Any], PartitionObserver]:
        """Start to measure a partition. Return its measured store, and the observer for its driver."""
        watched = self._watched[number] = _PartitionTelemetry(self.counts, store)
        return watched.store, watched.observer

    async def run(self) -> NoReturn:
        """Sample every `SAMPLE_INTERVAL_S` until cancelled.

        A bug here must not stop the worker, nor leave old numbers that look like new ones.
        """
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            try:
                await self.sample()
            except Exception:
                logger.exception("worker %s: no lag is shown until the next sample", self.agent)
                for watched in self._watched.values():
                    watched.end = None

    async def sample(self) -> None:
        """Ask Kafka for the ends of the owned partitions, and note them."""
        asked_at = time.time()
        ends = await self._ends(sorted(self._owned().drivers()))
        for number, _, watched in self._owned_now():
            if number in ends:
                watched.set_end(ends[number], asked_at)
        # Notes which partitions have reached their end, even if nothing requests the metrics.
        self._lags_and_ages()

    def _owned_now(self) -> list[tuple[int, PartitionDriver[Any], _PartitionTelemetry]]:
        """Return the owned partitions. Drops the numbers of those that were released."""
        drivers = self._owned().drivers()
        for number in self._watched.keys() - drivers.keys():
            del self._watched[number]
        return [(number, driver, self._watched[number]) for number, driver in drivers.items()]

    def _lags_and_ages(self) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
        """Return the lag in records and in seconds of each partition, by labels."""
        lags: dict[tuple[str, ...], float] = {}
        ages: dict[tuple[str, ...], float] = {}
        now = time.time()
        for number, driver, watched in self._owned_now():
            watched.count_skipped_and_lost(self.counts, driver)
            lag = watched.lag(driver)
            if lag is not None:
                labels = (self.agent, str(number))
                lags[labels] = lag
                ages[labels] = watched.age_s(now) if lag else 0.0
        return lags, ages

    # -- ready

    def not_ready_reasons(self) -> list[str]:
        """Return why the worker is not ready, without asking Kafka or the store."""
        owned = self._owned()
        if not owned.assigned:
            return ["Kafka has not assigned any partitions yet"]
        loading = owned.loading
        reasons = []
        if loading:
            reasons.append(f"partitions {', '.join(map(str, sorted(loading)))} are not loaded yet")
        unanswered = {
            number: watched.store.unanswered_s
            for number, _, watched in self._owned_now()
            if watched.store.unanswered_s > STORE_TIMEOUT_S
        }
        if unanswered:
            numbers = ", ".join(map(str, sorted(unanswered)))
            longest = max(unanswered.values())
            reasons.append(f"the store has not answered for {longest:.0f} s: partitions {numbers}")
        return reasons

    # -- metrics

    def metrics(self) -> Sequence[Metric]:
        lags, ages = self._lags_and_ages()
        of_partition = ("agent", "partition")
        return [
            *self._counted(),
            *self._gauges(),
            gauge("millpond_lag_records", "Records in Kafka that are not known to be in the store.", of_partition, lags),
            gauge("millpond_lag_seconds",
                  "The age, at most, of the oldest record not known to be in the store.", of_partition, ages),
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
            counter("millpond_events_total", "Events whose effects the store has, and events that became dead letters.", ("agent", "type", "outcome"), of(counts.events)),
            counter("millpond_records_skipped_total", "Records that belong to other agents.", one, mine | {(agent,): counts.records_skipped}),
            counter("millpond_records_lost_total", "Records that Kafka had removed before the worker read them.", one, mine | {(agent,): counts.records_lost}),
            counter("millpond_outputs_total", "Outputs that the worker produces to Kafka, by type.", ("agent", "type"), of(counts.outputs)),
            counter("millpond_dead_letters_total", "Records and messages that the agent gave up.", ("agent", "reason"), of(counts.dead_letters)),
            counter("millpond_leases_total", "Deliveries that need a report and an ack.", one, {(agent,): counts.leases}),
            counter("millpond_redeliveries_total", "Deliveries after the first one of a message.", one, {(agent,): counts.redeliveries}),
            counter("millpond_deliveries_total", "Reports of bridges about deliveries, by outcome.", ("agent", "outcome"), of(counts.deliveries)),
            counter("millpond_seen_ids_total", "Message ids that were remembered, to recognise a repeat.", one, {(agent,): counts.seen_ids}),
            counter("millpond_store_failures_total", "Requests to the store without an answer.", ("agent", "operation"), of(counts.store_failures)),
            histogram("millpond_batch_records", "Events of this agent in one transaction.", one, {(agent,): counts.batch_records}),
            histogram("millpond_batch_duration_seconds", "From the first step of a batch until the store has it.", one, {(agent,): counts.batch_s}),
            histogram("millpond_store_duration_seconds", "Round trips to the store.", ("agent", "operation"), stores),
            histogram("millpond_publish_to_command_seconds", "From a publish to its first command, of messages that a client had room for at once.", one, {(agent,): counts.delivery_s}),
        ]
        # fmt: on

    def _gauges(self) -> list[Metric]:
        owned, one = self._owned(), ("agent",)
        loading = len(owned.loading)
        states = {
            (self.agent, "loading"): float(loading),
            (self.agent, "loaded"): float(len(owned.drivers()) - loading),
        }
        fences = [watched.fence for _, _, watched in self._owned_now()]
        delivery = [fence.machine.get("delivery", {}) for fence in fences if fence is not None]

        def total(name: str) -> dict[tuple[str, ...], float]:
            return {(self.agent,): float(sum(each.get(name, 0) for each in delivery))}

        # fmt: off
        return [
            gauge("millpond_partitions", "Partitions of this process.", ("agent", "state"), states),
            gauge("millpond_leases_unconfirmed", "Leases that no bridge has reported on yet.", one, total("unconfirmed")),
            gauge("millpond_leasing_paused_partitions", "Partitions that deliver nothing new, because too many leases wait for a report.", one, total("paused")),
            gauge("millpond_windows_waiting", "Topics (in pubsub: subscribers of topics) with messages that no client has room for.", one, total("waiting")),
        ]
        # fmt: on
