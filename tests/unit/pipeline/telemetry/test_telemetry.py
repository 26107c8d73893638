"""Metrics: their names and labels, what a batch counts as, lag, and readiness."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import LoadedState
from millpond.agents.reads import Read
from millpond.agents.registry import MACHINES
from millpond.pipeline.brokers.commands.deliveries import Deliveries, published_at_s
from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.commands.reports import Reports
from millpond.pipeline.kafka.dead_letters import REASONS, DeadLetters
from millpond.pipeline.stores.memory.server import Hash
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.pipeline.telemetry.agent import LETTERS, AgentCounts, PartitionObserver
from millpond.pipeline.telemetry.bridge import (
    CommandMetrics,
    DeadLetterMetrics,
    HookMetrics,
    ProducerMetrics,
    SpoolMetrics,
)
from millpond.pipeline.telemetry.families import Metric
from millpond.pipeline.telemetry.histogram import SHORT_S, Histogram
from millpond.pipeline.telemetry.http import registry_of
from millpond.pipeline.telemetry.timed_store import TimedStore
from millpond.pipeline.telemetry.worker import STORE_TIMEOUT_S, WorkerTelemetry
from millpond.schemas import keys
from millpond.schemas.errors import StoreDown
from millpond.schemas.events import AgentName, ClientConnected, DeliveryFailed
from millpond.schemas.keys import Partition
from tests.benchmarks import telemetry as benchmark
from tests.support import given
from tests.support.partition import World, once, run

# The allowed labels. Each has few values: agents, partitions, types of events, outcomes. Never a topic or a client.
LABELS = {
    "agent", "partition", "type", "outcome", "reason", "operation", "state", "hook", "process",
    "version", "le", "generation",
}  # fmt: skip
BASE_UNITS = ("_seconds", "_bytes", "_records", "_partitions", "_info", "_total")
# Gauges without one of these endings. Their names say what they count.
COUNTS = {
    "millpond_partitions", "millpond_leases_unconfirmed", "millpond_windows_waiting", "millpond_bridge_spooling",
    "millpond_bridge_refusing", "millpond_bridge_events_unacknowledged", "millpond_bridge_commands_unfinished",
}  # fmt: skip


class SpooledEvents:
    """The counts of a bridge with a spool that was used."""

    entered = {"message.publish": 5}  # noqa: RUF012
    spooled = {"message.publish": 3}  # noqa: RUF012
    lost = {"message.publish": 1}  # noqa: RUF012
    spooling, depth, complaint = True, (2, 4096), "the spool is full"


def bridge_parts() -> list[Any]:
    event_producer = SimpleNamespace(
        entered={}, lost={}, unacknowledged=(), kept_s=Histogram(SHORT_S)
    )
    command_consumer = SimpleNamespace(taken={}, unfinished=0, seconds=Histogram(SHORT_S))
    deliveries = SimpleNamespace(outcomes={}, delivery_s={})
    return [
        HookMetrics({}),
        ProducerMetrics(event_producer),
        CommandMetrics(command_consumer, deliveries),
    ]


async def no_ends(numbers: Sequence[int]) -> dict[int, int]:
    return {}


class Owned:
    """A stub of the partitions that a worker owns."""

    def __init__(self) -> None:
        self.of: dict[int, PartitionDriver[Any]] = {}
        self.loading: list[int] = []
        self.assigned = True

    def drivers(self) -> dict[int, PartitionDriver[Any]]:
        return self.of


def worker_telemetry(agent: AgentName = "queue") -> WorkerTelemetry:
    owned = Owned()
    return WorkerTelemetry(agent, lambda: owned, no_ends)


def every_family() -> list[Metric]:
    """All metric families of all processes."""
    registries = (
        registry_of("worker queue", [worker_telemetry()]),
        registry_of("bridge embedded", bridge_parts()),
        registry_of("bridge emqx", [HookMetrics({}), SpoolMetrics(SpooledEvents())]),
    )
    return [family for registry in registries for family in registry.collect()]


OURS = {family.name: family for family in every_family() if family.name.startswith("millpond")}


# -- names and labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_name_ends_with_its_unit_and_a_help_text_is_a_sentence(name: str) -> None:
    family = OURS[name]
    assert re.fullmatch(r"millpond(_[a-z]+)+", name)
    assert not name.endswith("_total"), "the library adds it"
    if family.type == "histogram":
        assert name.endswith(("_seconds", "_records"))
    elif family.type == "gauge":
        assert name.endswith(BASE_UNITS) or name in COUNTS
    else:
        assert family.type == "counter"
    assert family.documentation.endswith(".")


def test_a_family_without_samples_is_still_shown() -> None:
    assert {"millpond_events", "millpond_bridge_hook_duration_seconds"} <= OURS.keys()


def test_labels_have_few_values() -> None:
    counts = AgentCounts()
    telemetry = worker_telemetry()
    telemetry.counts = counts
    counts.events["message.published", "applied"] = 1
    hooks = HookMetrics({})
    hooks.observe("message.publish", 0.1, "kept")
    for registry in (
        registry_of("p", [telemetry]),
        registry_of("p", [hooks, SpoolMetrics(SpooledEvents())]),
    ):
        for family in registry.collect():
            if family.name.startswith("millpond"):
                assert {name for sample in family.samples for name in sample.labels} <= LABELS


def test_the_exposition_can_be_parsed_again() -> None:
    hooks = HookMetrics({})
    for seconds in (0.0005, 0.002, 0.003, 20.0):
        hooks.observe("message.publish", seconds, "kept")
    samples = shown(registry_of("bridge emqx", [hooks, SpoolMetrics(SpooledEvents())]))
    bucket, kept = "millpond_bridge_hook_duration_seconds", {"hook": "message.publish"}
    assert value(samples, f"{bucket}_bucket", **kept, le="0.001") == 1
    assert value(samples, f"{bucket}_bucket", **kept, le="0.0025") == 2
    assert value(samples, f"{bucket}_bucket", **kept, le="10.0") == 3
    assert value(samples, f"{bucket}_bucket", **kept, le="+Inf") == 4
    assert value(samples, f"{bucket}_count", **kept) == 4
    assert value(samples, f"{bucket}_sum", **kept) == pytest.approx(20.0055)
    assert value(samples, "millpond_bridge_hook_calls_total", **kept, outcome="kept") == 4
    assert value(samples, "millpond_bridge_spool_records") == 2
    assert value(samples, "millpond_bridge_spool_bytes") == 4096
    assert value(samples, "millpond_bridge_spooling") == 1
    assert value(samples, "millpond_bridge_refusing") == 1
    assert value(samples, "millpond_bridge_events_spooled_total", type="message.publish") == 3
    assert value(samples, "millpond_bridge_events_lost_total", type="message.publish") == 1
    assert value(samples, "millpond_build_info", process="bridge emqx") == 1
    assert value(samples, "process_resident_memory_bytes") > 0


def shown(registry: CollectorRegistry) -> list[Any]:
    text = generate_latest(registry).decode()
    return [each for family in text_string_to_metric_families(text) for each in family.samples]


def value(samples: Iterable[Any], name: str, **labels: str) -> float:
    (found,) = [
        sample.value for sample in samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]  # fmt: skip
    assert isinstance(found, float)
    return found


# -- what is counted ------------------------------------------------------------------------------------


class ObservedPartition:
    """A partition in memory, with an observer that counts."""

    def __init__(self, agent: AgentName, *rules: str) -> None:
        self.world = World(*rules, partition=Partition("millpond", agent, 0))
        self.counts = AgentCounts()
        self.observer = PartitionObserver(self.counts)
        self.driver = PartitionDriver(
            self.world.partition, MACHINES[agent](), MemoryStore(self.world.partition, self.world.server),
            self.world.log, self.world.rules, self.world.notices.append, self.observer,
        )  # fmt: skip
        run(self.driver.start())
        self.world.feed(self.driver)

    def fold(self, *events: Any) -> None:
        self.world.append(*events)
        self.world.feed(self.driver)


def test_an_event_counts_when_the_store_has_it() -> None:
    observed = ObservedPartition("messages", given.store())
    observed.world.server.fault = once("before")
    observed.fold(
        given.published("a"), given.published("b"), given.published("a"), given.acked("a")
    )
    assert observed.counts.events == {
        ("rules.changed", "applied"): 1,
        ("message.published", "applied"): 3,
        ("message.acked", "applied"): 1,
    }
    assert observed.counts.seen_ids == 2
    assert sum(observed.counts.batch_records.counts) == 2  # the failed batch does not count
    assert observed.counts.batch_records.sum == 5
    assert observed.observer.fence is not None
    assert observed.observer.fence.offset == 4
    assert observed.observer._began_s == {}  # the failed batch was dropped


def test_a_dead_letter_counts_by_event_type_and_by_reason() -> None:
    observed = ObservedPartition("messages", given.store(), given.command("INCR t"))
    observed.world.append_raw(b"t", b"no event")
    observed.world.server.values["t"] = b"no number"  # so that the command fails
    observed.fold(given.published("a"))
    events, letters = observed.counts.events, observed.counts.dead_letters
    assert events["unreadable", "dead_letter"] == 1
    assert events["message.published", "dead_letter"] == 1
    assert events["message.published", "applied"] == 0
    assert (letters["unreadable"], letters["refused"], letters["failed"]) == (1, 1, 0)


def test_an_unreadable_record_counts_once_although_the_store_lost_its_data() -> None:
    observed = ObservedPartition("messages", given.store())
    world, driver = observed.world, observed.driver
    world.append_raw(b"t", b"no event")
    world.feed(driver)
    # The second one is on its way when the store is emptied. Both are folded again, in one batch.
    world.server.fault = once("before")
    run(driver.process([world.append_raw(b"t", b"no event")]))
    world.server.values.clear()
    run(driver.maintain())
    assert set(world.dead_letter_counts.values()) == {1}
    assert observed.counts.dead_letters["unreadable"] == 2
    assert observed.counts.events["unreadable", "dead_letter"] == 2


def test_a_dead_letter_of_invalid_subscriptions_is_counted() -> None:
    lookup = given.a_rule(hook="client.connected", action="on_subscribe_lookup")
    observed = ObservedPartition("sessions", lookup)
    observed.world.server.keep(keys.subscriptions("c"), Hash({"a/#/b": b"1"}))
    observed.fold(
        ClientConnected(at=0, node="n", client_id="c", connection_id="n 1", connected_at=0)
    )
    assert len(observed.world.dead_letters) == 1
    assert observed.counts.dead_letters["subscriptions"] == 1


def test_deliveries_reports_and_leases_are_counted() -> None:
    observed = ObservedPartition(
        "queue", given.store(), given.queue(ack_timeout_s=1, max_deliveries=2)
    )
    observed.fold(given.joined("anna", "queue/a"))
    observed.fold(given.published("a", "queue/a"), given.published("b", "queue/a"))
    counts = observed.counts
    assert (counts.leases, counts.redeliveries) == (2, 0)
    assert counts.outputs["hand_out"] == 2
    assert sum(counts.delivery_s.counts) == 2
    fence = observed.observer.fence
    assert fence is not None
    assert fence.machine["delivery"]["unconfirmed"] == 2
    failed = DeliveryFailed(
        at=0, node="n", agent="queue", lease="queue/0/1", client_id="anna", message_id="a",
        reason="no_client",
    )  # fmt: skip
    observed.fold(failed)
    assert counts.deliveries == {"no_client": 1}


def test_a_message_that_waited_for_a_client_has_no_latency() -> None:
    observed = ObservedPartition("queue", given.store(), given.queue())
    observed.fold(given.published("a", "queue/a"))
    observed.fold(given.joined("anna", "queue/a"))
    assert observed.counts.leases == 1
    assert sum(observed.counts.delivery_s.counts) == 0


def test_records_of_other_agents_are_counted_although_no_batch_has_them() -> None:
    observed = ObservedPartition("messages", given.store(), given.queue())
    owned, telemetry = Owned(), worker_telemetry("messages")
    telemetry._owned = lambda: owned
    observed.world.append(given.published("a", "queue/a"))
    observed.world.feed(observed.driver)
    telemetry.watch(0, observed.driver.store)
    owned.of[0] = observed.driver
    for _ in range(2):  # a second request adds nothing
        samples = shown(registry_of("w", [telemetry]))
    assert value(samples, "millpond_records_skipped_total", agent="messages") == 1


# -- lag -------------------------------------------------------------------------------------------------


async def test_lag_counts_the_records_not_known_to_be_in_the_store(monkeypatch: Any) -> None:
    observed = ObservedPartition("messages", given.store())
    ends, now = {0: 1}, 100.0
    owned = Owned()

    async def ends_now(numbers: Sequence[int]) -> dict[int, int]:
        return ends

    telemetry = WorkerTelemetry("messages", lambda: owned, ends_now)
    telemetry.watch(0, observed.driver.store)[0].loaded = observed.world.applied
    owned.of[0] = observed.driver
    clock = SimpleNamespace(time=lambda: now)
    monkeypatch.setattr("millpond.pipeline.telemetry.worker.time", clock)
    # Before the first sample there is no lag
    assert not has_lag(telemetry)
    await telemetry.sample()
    assert lag_and_age(telemetry) == (0, 0)
    # Two records arrive and are not folded. They arrived after the sample at 100 s, whose end was reached.
    now, ends[0] = 107.0, 3
    await telemetry.sample()
    now = 109.0
    assert lag_and_age(telemetry) == (2, 9)
    observed.fold(given.published("a"), given.published("b"))
    assert lag_and_age(telemetry) == (0, 0)


def has_lag(telemetry: WorkerTelemetry) -> bool:
    samples = shown(registry_of("w", [telemetry]))
    return any(sample.name == "millpond_lag_records" for sample in samples)


def lag_and_age(telemetry: WorkerTelemetry) -> tuple[float, float]:
    samples = shown(registry_of("w", [telemetry]))
    where = {"agent": "messages", "partition": "0"}
    return (
        value(samples, "millpond_lag_records", **where),
        value(samples, "millpond_lag_seconds", **where),
    )


async def test_a_partition_whose_state_is_not_loaded_has_no_lag() -> None:
    async def ends_now(numbers: Sequence[int]) -> dict[int, int]:
        return {0: 1_000}

    owned = Owned()
    telemetry = WorkerTelemetry("messages", lambda: owned, ends_now)
    world = World(given.store())
    owned.of[0] = world.owner()
    telemetry.watch(0, owned.of[0].store)
    await telemetry.sample()
    assert not has_lag(telemetry)
    run(owned.of[0].start())
    assert lag_and_age(telemetry)[0] == 1_000


async def test_an_error_while_sampling_is_logged_and_the_next_sample_shows_the_lag_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("millpond.pipeline.telemetry.worker.SAMPLE_INTERVAL_S", 0)
    samples = iter([{0: 1}, None, {0: 2}])
    asked, answer = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def ends_now(numbers: Sequence[int]) -> dict[int, int]:
        asked.release()
        await answer.acquire()
        ends = next(samples)
        assert ends is not None, "a bug of ours"
        return ends

    observed = ObservedPartition("messages", given.store())
    owned = Owned()
    telemetry = WorkerTelemetry("messages", lambda: owned, ends_now)
    telemetry.watch(0, observed.driver.store)
    owned.of[0] = observed.driver
    sampling = asyncio.ensure_future(telemetry.run())
    shown_after: list[bool] = []
    await asked.acquire()
    for _ in range(3):
        answer.release()
        await asked.acquire()
        shown_after.append(has_lag(telemetry))
    sampling.cancel()
    assert shown_after == [True, False, True]
    assert "a bug of ours" in caplog.text


def test_a_released_partition_is_no_longer_shown() -> None:
    observed = ObservedPartition("messages", given.store())
    owned = Owned()
    telemetry = WorkerTelemetry("messages", lambda: owned, no_ends)
    telemetry.watch(0, observed.driver.store)
    assert telemetry.not_ready_reasons() == []
    assert telemetry._watched == {}


# -- ready ----------------------------------------------------------------------------------------------


async def test_a_store_that_does_not_answer_makes_the_worker_not_ready(monkeypatch: Any) -> None:
    observed = ObservedPartition("messages", given.store())
    owned = Owned()
    telemetry = WorkerTelemetry("messages", lambda: owned, no_ends)
    answer: asyncio.Future[LoadedState] = asyncio.get_running_loop().create_future()

    async def silent() -> LoadedState:
        return await answer

    store, _ = telemetry.watch(3, SimpleNamespace(load=silent))
    owned.of[3] = observed.driver
    owned.loading = [3]
    began = asyncio.ensure_future(store.load())
    await asyncio.sleep(0)
    assert telemetry.not_ready_reasons() == ["partitions 3 are not loaded yet"]
    store._waiting["load"] -= STORE_TIMEOUT_S + 1
    assert telemetry.not_ready_reasons()[1] == "the store has not answered for 4 s: partitions 3"
    owned.loading = []
    answer.set_result(run(observed.driver.store.load()))
    await began
    assert telemetry.not_ready_reasons() == []
    assert store.loaded == observed.world.applied
    owned.assigned = False
    assert telemetry.not_ready_reasons() == ["Kafka has not assigned any partitions yet"]


async def test_a_measured_store_raises_the_same_errors() -> None:
    counts = AgentCounts()

    class Down:
        """A store whose calls all fail."""

        async def read(self, reads: Sequence[Read]) -> list[Any]:
            raise StoreDown("away")

        async def commit(self, packed: Any) -> None:
            raise StoreDown("away")

    store: TimedStore[Any] = TimedStore(Down(), counts)  # type: ignore[arg-type]
    for call in (store.read([]), store.commit(())):
        with pytest.raises(StoreDown):
            await call
    assert counts.store_failures == {"load": 0, "read": 1, "commit": 1, "check": 0}
    assert counts.store_s == {}
    assert store.unanswered_s == 0


# -- bridges --------------------------------------------------------------------------------------------


def test_the_time_of_a_publish_comes_from_its_message_id() -> None:
    us = 1_700_000_000_123_456
    assert published_at_s(f"{us:016X}{'0' * 16}") == pytest.approx(1_700_000_000.123456)
    for foreign in ("m1", "x" * 32, "0" * 32, "F" * 32):
        assert published_at_s(foreign) is None


def test_copies_without_a_lease_are_counted_too() -> None:
    deliveries = Deliveries("n", Reports(SimpleNamespace(node="n")))
    pending = PendingCommand("c", None, 0, "", 0, lambda: None, lambda: False)
    deliveries.sent(pending, 0)
    assert deliveries.drop_if_over(pending)
    assert deliveries.outcomes == {("none", "sent"): 1, ("none", "stale"): 1}


def test_counters_for_alerts_exist_before_the_first_increase() -> None:
    """Prometheus cannot see an increase of a series that did not exist."""
    durable_producer = SpooledEvents()
    durable_producer.lost = {}
    samples = shown(registry_of("bridge emqx", [SpoolMetrics(durable_producer)]))
    assert value(samples, "millpond_bridge_events_lost_total", type="message.publish") == 0
    nothing: Any = None  # no dead letter is sent
    letters = DeadLetterMetrics(DeadLetters(nothing, "bridge"))
    samples = shown(registry_of("bridge emqx-kafka", [letters]))
    for reason in REASONS:
        assert value(samples, "millpond_dead_letters_total", agent="bridge", reason=reason) == 0
    samples = shown(registry_of("worker queue", [worker_telemetry()]))
    for reason in LETTERS:
        assert value(samples, "millpond_dead_letters_total", reason=reason) == 0
    for operation in ("load", "read", "commit", "check"):
        assert value(samples, "millpond_store_failures_total", operation=operation) == 0
    assert value(samples, "millpond_records_lost_total") == 0


# -- cost -----------------------------------------------------------------------------------------------


def test_telemetry_costs_little() -> None:
    """The benchmark has the limit. Five times the limit would mean that telemetry works for each record."""
    for _, _, share in benchmark.measure():
        assert share < 5 * benchmark.SHARE_MAX  # machines are shared


def test_every_agent_can_be_observed() -> None:
    for agent in get_args(AgentName):
        observed = ObservedPartition(agent, given.store(), given.queue(), given.pubsub())
        assert observed.counts.events["rules.changed", "applied"] == 1
