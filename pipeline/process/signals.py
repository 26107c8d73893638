"""How a process that runs for long is asked to end, and notices."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import NoReturn


def on_signal(call: Callable[[], object]) -> None:
    """Call this at SIGTERM and at SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, call)


def asked_to_end() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    stop = asyncio.Event()
    on_signal(stop.set)
    return stop


async def until_asked(running: asyncio.Task[NoReturn], stop: asyncio.Event) -> None:
    """Until `stop` is set. What ends `running` before, which never returns, is raised."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if running.done():
        await running
