"""The part of an EMQX bridge that answers hook calls: events go into Kafka, or its spool. Not a test."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.brokers.emqx.calls import Calls
from pipeline.brokers.emqx.returning import Returning
from pipeline.brokers.emqx.server import HookServer
from pipeline.brokers.inlet import Inlet
from pipeline.brokers.spool import Spool
from pipeline.event_loop import use_uvloop
from pipeline.producer import Producer
from pipeline.settings import BridgeSettings
from pipeline.telemetry.bridge import Hooks
from schemas.rules import default_rules
from tests.emqx import Heard

SPOOL_BYTES_MAX = 1024 * 1024 * 1024


class Deaf(Heard):
    """Nobody asks what was heard: it is not kept."""

    def acked(self, client_id: str, message_id: str) -> None: ...

    def retainable(self, topic: str, event: object) -> None: ...


async def main(bootstrap: str, partitions: int, listen: str) -> NoReturn:
    """Until killed."""
    producer = Producer({"bootstrap_servers": [bootstrap]}, 4 * 1024 * 1024)
    spool = Spool(Path(os.environ["BENCH_DIRECTORY"]) / "spool", SPOOL_BYTES_MAX)
    spool.open()
    inlet = Inlet(producer, spool)
    calls = Calls(default_rules(), None, Returning("secret"), inlet, Deaf(), partitions)
    server = HookServer(BridgeSettings(exhook_listen=listen), calls, inlet, Hooks({}).observe)
    await server.start()
    running = asyncio.gather(inlet.run(), server.run())
    await inlet.connected.wait()
    Path(os.environ["MILLPOND_READY_FILE"]).touch()
    await running
    raise AssertionError("neither ever returns")


if __name__ == "__main__":
    use_uvloop()
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
