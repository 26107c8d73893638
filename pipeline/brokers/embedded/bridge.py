"""The process of the embedded bridge: its parts, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Final, NamedTuple, NoReturn

from aiokafka.errors import KafkaError

from millpond.pipeline.brokers.commands.active_members import ActiveMembers, report_interval_s
from millpond.pipeline.brokers.commands.consumer import CommandConsumer
from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.reports import Reports
from millpond.pipeline.brokers.embedded.broker import EmbeddedBroker
from millpond.pipeline.brokers.embedded.event_producer import EventProducer
from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.readiness import report_ready
from millpond.pipeline.process.signals import stop_event, until_stopped
from millpond.pipeline.settings import Settings
from millpond.pipeline.telemetry.bridge import (
    BridgeHealth,
    CommandMetrics,
    DeadLetterMetrics,
    ProducerMetrics,
)
from millpond.pipeline.telemetry.http import serving as telemetry
from millpond.pipeline.telemetry.tracers import bridge_tracing
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

# How long a stopping bridge waits for Kafka to acknowledge the rest. `millpond down` waits longer before it kills.
STOP_TIMEOUT_S: Final = 10.0
STALE_CHECK_INTERVAL_S: Final = 1.0  # the delay with which a stale command is noticed, at most


def run_embedded(settings: Settings, rules: Rules) -> None:
    """Run the embedded broker and its bridge until SIGTERM or SIGINT.

    Raises:
        MillpondError: Kafka cannot be reached at the start, or a port is in use.
    """
    use_uvloop()
    asyncio.run(_run_embedded(settings, rules))


async def _run_embedded(settings: Settings, rules: Rules) -> None:
    stop = stop_event()
    producer = Producer(settings.kafka)
    tracing = bridge_tracing(settings.telemetry, "embedded")
    event_producer = EventProducer(
        producer, rules, settings.bridge.node, settings.kafka.partitions, tracing
    )
    reports = Reports(event_producer)
    deliveries = Deliveries(settings.bridge.node, reports)
    broker = EmbeddedBroker(settings.bridge, event_producer, deliveries, settings.web.port)
    command_consumer = CommandConsumer(settings, broker, deliveries, producer, tracing)
    # Every step of `_serve` may wait for Kafka without a limit. So it runs as a task that a signal can cancel.
    parts = _Parts(
        producer, event_producer, reports, deliveries.active_members, broker, command_consumer
    )
    shown = (
        ProducerMetrics(event_producer),
        CommandMetrics(command_consumer, deliveries),
        DeadLetterMetrics(command_consumer.dead_letters),
    )
    health = BridgeHealth(stop.is_set, producer, partial(_complaints, broker))
    async with telemetry(settings.telemetry.listen, "bridge embedded", shown, health):
        serving = asyncio.create_task(_serve(settings, rules, parts))
        try:
            await until_stopped(serving, stop)
            serving.cancel()
        finally:
            await _stop(parts)
            if tracing is not None:
                await asyncio.to_thread(tracing.close)


class _Parts(NamedTuple):
    producer: Producer
    event_producer: EventProducer
    reports: Reports
    active_members: ActiveMembers
    broker: EmbeddedBroker
    command_consumer: CommandConsumer


def _complaints(broker: EmbeddedBroker) -> list[str]:
    return [] if broker.transitions.is_started() else ["the broker does not listen yet"]


async def _serve(settings: Settings, rules: Rules, parts: _Parts) -> NoReturn:
    try:
        await parts.producer.start()
    except KafkaError as error:
        raise await unreachable(settings.kafka) from error
    await parts.broker.start()
    await parts.event_producer.drain()
    report_ready("bridge embedded")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(parts.reports.run())
        tasks.create_task(parts.command_consumer.run())
        tasks.create_task(_drop_stale(parts.broker))
        tasks.create_task(
            parts.active_members.run(report_interval_s(rules), parts.broker.unacknowledged)
        )
        tasks.create_task(_take_snapshots(settings, parts.broker))
    raise AssertionError("the tasks run until they are cancelled")


async def _drop_stale(broker: EmbeddedBroker) -> NoReturn:
    while True:
        await asyncio.sleep(STALE_CHECK_INTERVAL_S)
        broker.drop_stale()


async def _take_snapshots(settings: Settings, broker: EmbeddedBroker) -> NoReturn:
    while True:
        await asyncio.sleep(settings.bridge.sync_interval_s)
        await broker.snapshot()


async def _stop(parts: _Parts) -> None:
    """Close the client connections, and produce the events of that. Give up after `STOP_TIMEOUT_S`."""
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            if parts.broker.transitions.is_started():
                await parts.broker.shutdown()
            await parts.reports.flush()
            await parts.producer.stop()
    except TimeoutError:
        lost = len(parts.event_producer.unacknowledged)
        logger.warning(
            "Kafka has not acknowledged %d events in %g s; the bridge stops, these events may be lost",
            lost, STOP_TIMEOUT_S,
        )  # fmt: skip
        # These libraries would log a traceback for each task that is cut off.
        for library in ("amqtt", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
