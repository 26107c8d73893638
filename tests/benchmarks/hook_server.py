"""The part of an EMQX bridge that answers hook calls: events go into Kafka, or its spool. Not a test."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import NoReturn

from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.exhook.calls import Calls
from millpond.pipeline.brokers.emqx.exhook.server import HookServer
from millpond.pipeline.brokers.spool.directory import Spool
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.settings import BridgeSettings, KafkaSettings
from millpond.pipeline.telemetry.bridge import HookMetrics
from millpond.schemas.rules import default_rules
from tests.support.emqx.trace import Heard

SPOOL_BYTES_MAX = 1024 * 1024 * 1024


class Deaf(Heard):
    """Nobody asks what was heard: it is not kept."""

    def acked(self, client_id: str, message_id: str) -> None: ...

    def retainable(self, topic: str, event: object) -> None: ...


async def main(bootstrap: str, partitions: int, listen: str) -> NoReturn:
    """Until killed."""
    producer = Producer(KafkaSettings(bootstrap_servers=(bootstrap,)))
    spool = Spool(Path(os.environ["BENCH_DIRECTORY"]) / "spool", SPOOL_BYTES_MAX)
    spool.open()
    durable_producer = DurableProducer(producer, spool)
    listener = Deaf().listener
    calls = Calls(
        default_rules(), None, CopyTopic("secret"), durable_producer, listener, partitions
    )
    server = HookServer(
        BridgeSettings(exhook_listen=listen), calls, durable_producer, HookMetrics({}).observe
    )
    await server.start()
    running = asyncio.gather(durable_producer.run(), server.run())
    await durable_producer.connected.wait()
    Path(os.environ["MILLPOND_READY_FILE"]).touch()
    await running
    raise AssertionError("neither ever returns")


if __name__ == "__main__":
    use_uvloop()
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
