"""A process that answers hook calls as the bridge of an EMQX does, with events going into Kafka. Not a test."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import NoReturn

import uvloop

from pipeline.brokers.emqx.calls import Calls
from pipeline.brokers.emqx.returning import Returning
from pipeline.brokers.emqx.server import HookServer
from pipeline.producer import Producer
from pipeline.settings import BridgeSettings
from schemas.rules import default_rules
from tests.emqx import Heard
from tests.system.hooks import KafkaInlet


class Deaf(Heard):
    """Nobody asks what was heard: it is not kept."""

    def acked(self, client_id: str, message_id: str) -> None: ...

    def retainable(self, topic: str, event: object) -> None: ...


async def main(bootstrap: str, partitions: int, listen: str) -> NoReturn:
    """Until killed."""
    producer = Producer({"bootstrap_servers": [bootstrap]}, 4 * 1024 * 1024)
    await producer.start()
    inlet = KafkaInlet(producer)
    calls = Calls(default_rules(), None, Returning("secret"), inlet, Deaf(), partitions)
    server = HookServer(BridgeSettings(exhook_listen=listen), calls, inlet)
    await server.start()
    Path(os.environ["MILLPOND_READY_FILE"]).touch()
    await asyncio.gather(inlet.run(), server.run())
    raise AssertionError("neither ever returns")


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
