"""A command that is interrupted ends, even if a library swallows its cancellation."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from millpond.pipeline.process import signals


async def interrupted(swallowed: int) -> str:
    """Wait after SIGINT, and catch the first cancellations, as `asyncio.wait_for` of Python 3.11 can."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(swallowed):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue
    await asyncio.sleep(60)
    return "not interrupted"


@pytest.mark.parametrize("swallowed", [0, 1, 3])
def test_an_interrupt_ends_a_command_that_swallows_cancellations(
    swallowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "CANCEL_AGAIN_S", 0.01)
    with pytest.raises(KeyboardInterrupt):
        signals.run(interrupted(swallowed))


def test_a_command_returns_what_its_work_returns() -> None:
    async def work() -> int:
        return 7

    assert signals.run(work()) == 7


def test_after_the_block_the_signal_is_the_processs_own_again() -> None:
    before = signal.getsignal(signal.SIGINT)

    async def work() -> None:
        async with signals.cancelled_by(signal.SIGINT):
            pass
        assert asyncio.get_running_loop().remove_signal_handler(signal.SIGINT) is False

    asyncio.run(work())
    assert signal.getsignal(signal.SIGINT) is before
