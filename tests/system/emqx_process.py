"""One process of the EMQX bridge, for tests: `python -m tests.system.emqx_process CONFIG`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

import uvloop

from pipeline.brokers.emqx.running import EmqxBridge
from pipeline.ready import say_ready
from pipeline.settings import load

STOP_TIMEOUT_S = 10.0


async def main(config: Path) -> None:
    bridge = EmqxBridge(*load(config))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await bridge.start()
    say_ready("bridge emqx")
    running, stopping = asyncio.create_task(bridge.run()), asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    try:
        if running.done():
            await running
        await bridge.finish()
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await bridge.stop(STOP_TIMEOUT_S)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main(Path(sys.argv[1])))
