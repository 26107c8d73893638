"""Ctrl-C at any moment ends every command that runs for long: soon, and with its exit code."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from tests.support import given
from tests.support.inspection import command
from tests.support.world import World, running

MOMENTS = 4
END_TIMEOUT_S = 30.0  # generous: machines are shared
LATEST_S = 1.0  # a command is interrupted within this time of its first connection
# Every port that a command could listen at is a free one.
FREE_PORTS = {f"MILLPOND_{name}_PORT": "0" for name in ("WEB", "BRIDGE_MQTT", "BRIDGE_WEBSOCKET")}


@pytest.fixture(scope="module")
def world(
    kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("interrupts")
    yield from running(
        "interrupted", kafka, redis_server, directory, [given.store("#")], "messages"
    )


async def connected(process: asyncio.subprocess.Process) -> None:
    """Wait until the command has opened a connection or listens."""
    while not psutil.Process(process.pid).net_connections():
        assert process.returncode is None
        await asyncio.sleep(0.02)


async def interrupted(arguments: list[str], after_s: float) -> int:
    """Start a command, interrupt it, and return its exit code."""
    process = await asyncio.create_subprocess_exec(
        *arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **FREE_PORTS},
    )  # fmt: skip
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await connected(process)
        await asyncio.sleep(after_s)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(END_TIMEOUT_S):
            return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["lag", "--watch", "--json", "--interval", "0.2"], 0),
        (["sub", "-t", "a"], 0),
        (["pub", "-l", "-t", "a"], 130),
        (["web"], 0),
        (["worker", "queue"], 0),
        (["bridge", "embedded"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
async def test_ctrl_c_ends_a_command_at_any_moment(
    world: World, arguments: list[str], exit_code: int
) -> None:
    chance = random.Random(arguments[0])
    if arguments[0] in ("sub", "pub"):
        arguments = [*arguments, "--port", str(world.port)]
    moments = [chance.uniform(0, LATEST_S) for _ in range(MOMENTS)]
    codes = await asyncio.gather(
        *(interrupted(command(world, *arguments), after_s) for after_s in moments)
    )
    assert codes == [exit_code] * MOMENTS
