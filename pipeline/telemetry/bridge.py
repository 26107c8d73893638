"""Metrics and health of a bridge: events, the broker's waiting time, commands and deliveries, the spool.

The classes here only show numbers. The parts of a bridge count them. Each request for metrics reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from millpond.pipeline.kafka.dead_letters import DeadLetters
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.telemetry.families import Metric, counter, gauge, histogram
from millpond.pipeline.telemetry.histogram import Histogram, histogram_of
from millpond.pipeline.telemetry.http import KAFKA_TIMEOUT_S


class BridgeHealth:
    """The health of a bridge. See `millpond.pipeline.telemetry.http.Health`."""

    def __init__(
        self,
        stopping: Callable[[], bool],
        producer: Producer | None,
        complaints: Callable[[], Sequence[str]],
    ) -> None:
        """Wire the bridge's parts.

        `complaints` returns the bridge's own reasons for not being ready, for example a full spool. A bridge without a
        `producer` is ready while Kafka is down, too.
        """
        self._stopping, self._producer, self._complaints = stopping, producer, complaints

    async def not_alive(self) -> list[str]:
        return ["the bridge was asked to stop"] if self._stopping() else []

    async def not_ready(self) -> list[str]:
        kafka = None
        if self._producer is not None:
            kafka = await self._producer.why_unreachable(KAFKA_TIMEOUT_S)
        return [*([kafka] if kafka else []), *self._complaints()]


class HookMetrics:
    """The calls of a broker's hooks, and how long the broker waited for the answers."""

    def __init__(self, refused: Mapping[str, int]) -> None:
        """`refused` counts refused calls and publishes by reason. Each request for metrics reads it."""
        self._refused = refused
        self.answered: Counter[tuple[str, str]] = Counter()  # by hook and outcome
        self.seconds: dict[str, Histogram] = {}  # from call to answer, by hook

    def observe(self, name: str, seconds: float, outcome: str) -> None:
        """Count an answered call of the hook `name`. Both texts become labels, so each may have only a few values."""
        self.answered[name, outcome] += 1
        histogram_of(self.seconds, name).add(seconds)

    def metrics(self) -> Sequence[Metric]:
        seconds = {(name,): each for name, each in self.seconds.items()}
        # fmt: off
        return [
            counter("millpond_bridge_hook_calls_total", "Calls of the broker's hooks, by outcome.", ("hook", "outcome"), self.answered),
            counter("millpond_bridge_hook_refusals_total", "Calls and publishes that the bridge did not accept, by reason.", ("reason",), self._refused),
            histogram("millpond_bridge_hook_duration_seconds", "From a call of a hook to its answer: how long the broker waits.", ("hook",), seconds),
        ]
        # fmt: on


class EventCounts(Protocol):
    """The part of a bridge that produces events to Kafka, and counts them."""

    @property
    def entered(self) -> Mapping[str, int]:
        """Events from the broker, by type of event or by hook."""
        ...

    @property
    def lost(self) -> Mapping[str, int]:
        """Events that are neither in Kafka nor in the spool, by the same types."""
        ...


class SpoolCounts(EventCounts, Protocol):
    """The same part, with a spool on disk."""

    @property
    def spooled(self) -> Mapping[str, int]:
        """Events written to the spool, by hook."""
        ...

    @property
    def spooling(self) -> bool:
        """True while events go to the spool."""
        ...

    @property
    def depth(self) -> tuple[int, int]:
        """The number of records in the spool, and their size in bytes."""
        ...

    @property
    def complaint(self) -> str | None:
        """Why events are refused now; None while they are accepted."""
        ...


def entered_metrics(entered: EventCounts) -> list[Metric]:
    """Return the metrics of events that every bridge has."""
    # Every type is shown with 0 lost events. Prometheus cannot see an increase of a series that did not exist.
    lost = {**dict.fromkeys(entered.entered, 0), **entered.lost}
    # fmt: off
    return [
        counter("millpond_bridge_events_total", "Events from the broker.", ("type",), entered.entered),
        counter("millpond_bridge_events_lost_total", "Events that are neither in Kafka nor in the spool.", ("type",), lost),
    ]
    # fmt: on


class SpoolMetrics:
    """The events and the spool of a bridge with a spool."""

    def __init__(self, durable_producer: SpoolCounts) -> None:
        self._durable_producer = durable_producer

    def metrics(self) -> Sequence[Metric]:
        durable_producer = self._durable_producer
        records, size = durable_producer.depth
        # fmt: off
        return [
            *entered_metrics(durable_producer),
            counter("millpond_bridge_events_spooled_total", "Events that were written to the spool.", ("type",), durable_producer.spooled),
            gauge("millpond_bridge_spool_records", "Events in the spool.", (), {(): records}),
            gauge("millpond_bridge_spool_bytes", "The size of the spool.", (), {(): size}),
            gauge("millpond_bridge_spooling", "1 while events go to the spool, else 0.", (), {(): float(durable_producer.spooling)}),
            gauge("millpond_bridge_refusing", "1 while publishes are refused, else 0.", (), {(): float(durable_producer.complaint is not None)}),
        ]
        # fmt: on


class ProducerMetrics:
    """The events of a bridge without a spool."""

    def __init__(self, event_producer: Any) -> None:
        self._event_producer = event_producer

    def metrics(self) -> Sequence[Metric]:
        event_producer = self._event_producer
        # fmt: off
        return [
            *entered_metrics(event_producer),
            gauge("millpond_bridge_events_unacknowledged", "Events that Kafka has not acknowledged yet.", (), {(): len(event_producer.unacknowledged)}),
            histogram("millpond_bridge_event_duration_seconds", "Until Kafka has an event, and so until a publisher gets its acknowledgement.", (), {(): event_producer.kept_s}),
        ]
        # fmt: on


class DeadLetterMetrics:
    """The dead letters that a bridge makes itself. Workers count theirs under the same name."""

    def __init__(self, dead_letters: DeadLetters) -> None:
        self._dead_letters = dead_letters

    def metrics(self) -> Sequence[Metric]:
        reader, counts = self._dead_letters.reader, self._dead_letters.counts
        values = {(reader, reason): count for reason, count in counts.items()}
        # fmt: off
        return [
            counter("millpond_dead_letters_total", "Records that the bridge gave up.", ("agent", "reason"), values),
        ]
        # fmt: on


class CommandMetrics:
    """The commands of the agents, and the deliveries that they led to."""

    def __init__(self, command_consumer: Any, deliveries: Any) -> None:
        self._command_consumer, self._deliveries = command_consumer, deliveries

    def metrics(self) -> Sequence[Metric]:
        command_consumer, deliveries = self._command_consumer, self._deliveries
        latency = {(name,): each for name, each in deliveries.delivery_s.items()}
        # fmt: off
        return [
            counter("millpond_bridge_commands_total", "Commands of the agents, by type.", ("type",), command_consumer.taken),
            gauge("millpond_bridge_commands_unfinished", "Commands whose report is not in Kafka yet.", (), {(): command_consumer.unfinished}),
            histogram("millpond_bridge_command_to_report_seconds", "From a command in Kafka until its report is in Kafka.", (), {(): command_consumer.seconds}),
            counter("millpond_bridge_deliveries_total", "Copies that the bridge sent to clients, or failed to send, by outcome.", ("agent", "outcome"), deliveries.outcomes),
            histogram("millpond_publish_to_client_seconds", "From a publish until a copy is sent to a client, waiting included.", ("agent",), latency),
        ]
        # fmt: on
