"""What a bridge tells: what it entered, how long its broker waited, what became of commands, what waits on its disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.telemetry.families import Metric, counter, gauge, histogram
from millpond.pipeline.telemetry.histogram import Histogram, histogram_of
from millpond.pipeline.telemetry.http import KAFKA_PATIENCE_S


class BridgeHealth:
    """See `millpond.pipeline.telemetry.http.Health`."""

    def __init__(
        self,
        stopping: Callable[[], bool],
        producer: Producer | None,
        complaints: Callable[[], Sequence[str]],
    ) -> None:
        """`complaints` says what else keeps the bridge from its work: a spool that is full, a broker that is not up.
        Without a `producer` it works while Kafka is away, too.
        """
        self._stopping, self._producer, self._complaints = stopping, producer, complaints

    async def not_alive(self) -> list[str]:
        return ["it was asked to stop"] if self._stopping() else []

    async def not_ready(self) -> list[str]:
        kafka = None
        if self._producer is not None:
            kafka = await self._producer.complaint(KAFKA_PATIENCE_S)
        return [*([kafka] if kafka else []), *self._complaints()]


class HookMetrics:
    """How long a broker waited for the answers to its calls."""

    def __init__(self, refused: Mapping[str, int]) -> None:
        """None so far; `refused` counts what was not taken, by reason, and is read when somebody asks."""
        self._refused = refused
        self.answered: Counter[tuple[str, str]] = Counter()  # by hook and outcome
        self.seconds: dict[str, Histogram] = {}  # by hook

    def observe(self, name: str, seconds: float, outcome: str) -> None:
        """One call of the hook `name` was answered; both texts are of a few that there are."""
        self.answered[name, outcome] += 1
        histogram_of(self.seconds, name).add(seconds)

    def metrics(self) -> Sequence[Metric]:
        seconds = {(name,): each for name, each in self.seconds.items()}
        # fmt: off
        return [
            counter("millpond_bridge_hook_calls_total", "Calls of the broker's, by what they were answered.", ("hook", "outcome"), self.answered),
            counter("millpond_bridge_hook_refusals_total", "What the broker told or asked, and was not taken.", ("reason",), self._refused),
            histogram("millpond_bridge_hook_duration_seconds", "From a call of the broker's to its answer.", ("hook",), seconds),
        ]
        # fmt: on


class EventCounts(Protocol):
    """What a bridge enters its events with, and counts."""

    @property
    def entered(self) -> Mapping[str, int]:
        """By type of event or hook."""
        ...

    @property
    def lost(self) -> Mapping[str, int]:
        """The same, of what nobody will ever have."""
        ...


class SpoolCounts(EventCounts, Protocol):
    """One that has a disk to fall back on."""

    @property
    def spooled(self) -> Mapping[str, int]:
        """By hook, what was written to the disk."""
        ...

    @property
    def spooling(self) -> bool:
        """Whether events go to the disk now."""
        ...

    @property
    def depth(self) -> tuple[int, int]:
        """Records on the disk, and their bytes."""
        ...

    @property
    def complaint(self) -> str | None:
        """Why events are refused."""
        ...


def entered_metrics(entered: EventCounts) -> list[Metric]:
    """Of any bridge. Prometheus sees no increase in what was not there before: nothing lost is shown as that."""
    lost = {**dict.fromkeys(entered.entered, 0), **entered.lost}
    # fmt: off
    return [
        counter("millpond_bridge_events_total", "Events told by the broker.", ("type",), entered.entered),
        counter("millpond_bridge_events_lost_total", "Events that are neither in Kafka nor on the disk.", ("type",), lost),
    ]
    # fmt: on


class SpoolMetrics:
    """The spool of a bridge, and the way into it."""

    def __init__(self, durable_producer: SpoolCounts) -> None:
        """Reads what `inlet` counts, when somebody asks."""
        self._durable_producer = durable_producer

    def metrics(self) -> Sequence[Metric]:
        durable_producer = self._durable_producer
        records, size = durable_producer.depth
        # fmt: off
        return [
            *entered_metrics(durable_producer),
            counter("millpond_bridge_events_spooled_total", "Events written to the spool.", ("type",), durable_producer.spooled),
            gauge("millpond_bridge_spool_records", "Events in the spool.", (), {(): records}),
            gauge("millpond_bridge_spool_bytes", "Size of the spool.", (), {(): size}),
            gauge("millpond_bridge_spooling", "1 while events go to the spool.", (), {(): float(durable_producer.spooling)}),
            gauge("millpond_bridge_refusing", "1 while events are refused.", (), {(): float(durable_producer.complaint is not None)}),
        ]
        # fmt: on


class ProducerMetrics:
    """What a bridge without a spool has entered."""

    def __init__(self, event_producer: Any) -> None:
        """Reads what an embedded broker's `Recorder` counts, when somebody asks."""
        self._event_producer = event_producer

    def metrics(self) -> Sequence[Metric]:
        event_producer = self._event_producer
        # fmt: off
        return [
            *entered_metrics(event_producer),
            gauge("millpond_bridge_events_unacknowledged", "Events that Kafka has not acknowledged.", (), {(): len(event_producer.unacknowledged)}),
            histogram("millpond_bridge_event_duration_seconds", "Until Kafka has an event, and a publisher its acknowledgement.", (), {(): event_producer.kept_s}),
        ]
        # fmt: on


class CommandMetrics:
    """What became of the agents' commands."""

    def __init__(self, command_consumer: Any, deliveries: Any) -> None:
        """Reads what a bridge's `Commander` and `Deliveries` count, when somebody asks."""
        self._command_consumer, self._deliveries = command_consumer, deliveries

    def metrics(self) -> Sequence[Metric]:
        command_consumer, deliveries = self._command_consumer, self._deliveries
        latency = {(name,): each for name, each in deliveries.delivery_s.items()}
        # fmt: off
        return [
            counter("millpond_bridge_commands_total", "Commands of the agents, by type.", ("type",), command_consumer.taken),
            gauge("millpond_bridge_commands_unfinished", "Commands of which Kafka does not know what became of them.", (), {(): command_consumer.unfinished}),
            histogram("millpond_bridge_command_to_report_seconds", "From a command in Kafka until Kafka knows what became of it.", (), {(): command_consumer.seconds}),
            counter("millpond_bridge_deliveries_total", "Copies handed to clients, or why not.", ("agent", "outcome"), deliveries.outcomes),
            histogram("millpond_publish_to_client_seconds", "From a publish until a copy is handed to a client, waiting included.", ("agent",), latency),
        ]
        # fmt: on
