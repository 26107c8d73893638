"""Bridges: what connects one kind of MQTT broker to Kafka."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Final

import uvloop

from pipeline.brokers.embedded.broker import EmbeddedBroker
from pipeline.brokers.embedded.recorder import Recorder
from pipeline.producer import Producer
from pipeline.settings import Settings
from schemas.rules import Rules

logger = logging.getLogger(__name__)

# How often everything connected and subscribed is told anew: what an event missed is put right by then.
SYNC_INTERVAL_S: Final = 300.0
# How long a bridge that is asked to stop waits for Kafka to acknowledge what it has entered.
DRAIN_TIMEOUT_S: Final = 10.0


def run_embedded(settings: Settings, rules: Rules) -> None:
    """Run the embedded broker and its bridge until SIGTERM or SIGINT."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_run_embedded(settings, rules))


async def _run_embedded(settings: Settings, rules: Rules) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    producer = Producer(settings.kafka.client_options(), settings.kafka.message_bytes_max)
    await producer.start()
    recorder = Recorder(producer, rules, settings.bridge.node, settings.kafka.partitions)
    broker = EmbeddedBroker(settings.bridge, recorder)
    try:
        await broker.start()
        await recorder.drain(DRAIN_TIMEOUT_S)
        _say_ready()
        while not stop.is_set():
            try:
                async with asyncio.timeout(SYNC_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                await broker.snapshot()
        await broker.shutdown()
        await recorder.drain(DRAIN_TIMEOUT_S)
    finally:
        await producer.stop()


def _say_ready() -> None:
    logger.info("bridge embedded is ready")
    ready_file = os.environ.get("MILLPOND_READY_FILE")
    if ready_file:
        Path(ready_file).touch()
