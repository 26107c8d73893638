"""Bridges: what connects one kind of MQTT broker to Kafka."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Final, NoReturn

import uvloop
from aiokafka.errors import KafkaError

from pipeline.brokers.embedded.broker import EmbeddedBroker
from pipeline.brokers.embedded.commander import Commander
from pipeline.brokers.embedded.recorder import Recorder
from pipeline.producer import Producer
from pipeline.reach import unreachable
from pipeline.ready import say_ready
from pipeline.settings import Settings
from schemas.rules import Rules

logger = logging.getLogger(__name__)

# How long a bridge that is asked to stop waits for Kafka to take what is left: less than `millpond down` gives it.
STOP_TIMEOUT_S: Final = 10.0


def run_embedded(settings: Settings, rules: Rules) -> None:
    """Run the embedded broker and its bridge until SIGTERM or SIGINT.

    Raises:
        MillpondError: Kafka cannot be reached at the start, or a port is in use.
    """
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_run_embedded(settings, rules))


async def _run_embedded(settings: Settings, rules: Rules) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    producer = Producer(settings.kafka.client_options(), settings.kafka.message_bytes_max)
    recorder = Recorder(producer, rules, settings.bridge.node, settings.kafka.partitions)
    broker = EmbeddedBroker(settings.bridge, recorder)
    # Any of its steps may wait for Kafka as long as Kafka is away, and a signal must not.
    serving = asyncio.create_task(_serve(settings, producer, recorder, broker))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    try:
        if serving.done():
            await serving  # it never returns: this raises what ended it
        serving.cancel()
    finally:
        await _end(producer, recorder, broker)


async def _serve(
    settings: Settings, producer: Producer, recorder: Recorder, broker: EmbeddedBroker
) -> NoReturn:
    try:
        await producer.start()
    except KafkaError as error:
        raise await unreachable(settings.kafka) from error
    await broker.start()
    await recorder.drain()
    say_ready("bridge embedded")
    async with asyncio.TaskGroup() as parts:
        parts.create_task(Commander(settings, broker, recorder, producer).run())
        parts.create_task(_tell_snapshots(settings, broker))
    raise AssertionError("neither ever returns")


async def _tell_snapshots(settings: Settings, broker: EmbeddedBroker) -> NoReturn:
    while True:
        await asyncio.sleep(settings.bridge.sync_interval_s)
        await broker.snapshot()


async def _end(producer: Producer, recorder: Recorder, broker: EmbeddedBroker) -> None:
    """Close the connections and tell of it; without Kafka no longer than `STOP_TIMEOUT_S`."""
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            if broker.transitions.is_started():
                await broker.shutdown()
            await producer.stop()
    except TimeoutError:
        lost = len(recorder.unacknowledged)
        logger.warning("Kafka has not acknowledged %d events in time; not waiting longer", lost)
        for library in ("amqtt", "asyncio"):  # which would show a traceback for all that is cut off
            logging.getLogger(library).setLevel(logging.CRITICAL)
