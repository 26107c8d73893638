"""SIGTERM and SIGINT: both ask a process to stop.

A long-running process waits for them with an event (`stop_event`, `until_stopped`). A command that works until it is done
is cancelled by them (`run`, `cancelled_by`).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, TypeVar

# A library that catches the cancellation of one wait, as aiokafka and `asyncio.wait_for` of Python 3.11 can, continues with
# the next one. So a cancellation is repeated until the work has ended.
CANCEL_AGAIN_S: Final = 0.5

Result = TypeVar("Result")


def on_signal(call: Callable[[], object]) -> None:
    """Call `call` on each SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, call)


def stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    on_signal(stop.set)
    return stop


async def until_stopped(running: asyncio.Task[NoReturn], stop: asyncio.Event) -> None:
    """Wait until `stop` is set. If `running` fails before, raise its error. Does not cancel `running`."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if running.done():
        await running


@asynccontextmanager
async def cancelled_by(*numbers: signal.Signals) -> AsyncIterator[None]:
    """Cancel the task that runs the block when one of these signals arrives, until the block has ended."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "use this inside a task"
    again: asyncio.TimerHandle | None = None

    def cancel() -> None:
        nonlocal again
        task.cancel()
        if again is not None:
            again.cancel()
        again = loop.call_later(CANCEL_AGAIN_S, cancel)

    for number in numbers:
        loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        if again is not None:
            again.cancel()


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command until it is done.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it.
    """

    async def until_done() -> Result:
        async with cancelled_by(signal.SIGINT):
            return await work

    try:
        return asyncio.run(until_done())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
