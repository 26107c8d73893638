"""SIGTERM and SIGINT: both ask a long-running process to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import NoReturn


def on_signal(call: Callable[[], object]) -> None:
    """Call `call` on each SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, call)


def asked_to_end() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    on_signal(stop.set)
    return stop


async def until_asked(running: asyncio.Task[NoReturn], stop: asyncio.Event) -> None:
    """Wait until `stop` is set. If `running` fails before, raise its error. Does not cancel `running`."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if running.done():
        await running
