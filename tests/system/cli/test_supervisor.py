"""The supervisor, with small shell scripts as children."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from millpond.pipeline.stack.supervisor import Child, Supervisor
from millpond.schemas.errors import ConfigError, MillpondError

WAIT_S = 60.0


class World:
    """A supervisor, its printed lines, and children that are ready when they have touched a file."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.said = directory, asyncio.Queue[str]()
        self.supervisor = Supervisor(self.said.put_nowait, lambda: None)

    def child(self, name: str, script: str) -> Child:
        ready_file = self.directory / f"{name}.ready"

        async def ready() -> bool:
            return ready_file.exists()

        return Child(
            name,
            ["sh", "-c", script.replace("READY", str(ready_file))],
            self.directory / f"{name}.log",
            ready,
            before=lambda: ready_file.unlink(missing_ok=True),
        )

    async def next_line(self) -> str:
        return await asyncio.wait_for(self.said.get(), WAIT_S)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.supervisor.stop()


@pytest.mark.parametrize(("exit_code", "kind"), [(3, MillpondError), (2, ConfigError)])
async def test_the_error_about_a_child_that_ends_before_it_is_ready_is_its_last_line(
    world: World, exit_code: int, kind: type[MillpondError]
) -> None:
    child = world.child("broken", f"seq 1 20; echo millpond: no such grain; exit {exit_code}")
    with pytest.raises(MillpondError) as caught:
        await world.supervisor.start(child)
    assert type(caught.value) is kind
    assert str(caught.value) == f"broken ended with exit code {exit_code}: no such grain"
    assert (await world.next_line()).splitlines() == [
        f"The end of {child.log}:",
        *(f"  {number}" for number in range(12, 21)),
        "  millpond: no such grain",
    ]


async def test_a_group_starts_at_once_and_one_that_fails_fails_the_start(world: World) -> None:
    # Each waits for the other.
    here, rest = world.directory, "sleep 0.05; done; touch READY; exec sleep 600"
    group = [
        world.child(mine, f"touch {here}/{mine}; until [ -e {here}/{other} ]; do {rest}")
        for mine, other in (("one", "two"), ("two", "one"))
    ]
    async with asyncio.timeout(WAIT_S):
        await world.supervisor.start(*group)
    assert [child.is_ready for child in world.supervisor.children] == [True, True]
    with pytest.raises(MillpondError, match="broken ended with exit code 1: it printed nothing"):
        await world.supervisor.start(
            world.child("slow", "exec sleep 600"), world.child("broken", "exit 1")
        )


async def test_a_child_that_keeps_ending_is_restarted_after_a_growing_back_off(
    world: World,
) -> None:
    # It is ready, then it writes to its log and ends.
    child = world.child("brief", "touch READY; sleep 0.3; echo farewell; exit 1")
    await world.supervisor.start(child)
    said = [await world.next_line() for _ in range(5)]
    assert [line.splitlines()[0].partition("; ")[2] for line in said[::2]] == [
        "restarting it in 0.5 s. The end of " + f"{child.log}:",
        "restarting it in 1 s. The end of " + f"{child.log}:",
        "restarting it in 2 s. The end of " + f"{child.log}:",
    ]
    assert said[1::2] == ["brief is ready again"] * 2
    assert all("  farewell" in line for line in said[::2])
    assert child.restarts == 3


async def test_children_are_stopped_in_reverse_order(world: World) -> None:
    ends = world.directory / "ends"
    script = f"trap 'echo NAME >> {ends}; exit' TERM; touch READY; while :; do sleep 0.05; done"
    for name in ("first", "second"):
        await world.supervisor.start(world.child(name, script.replace("NAME", name)))
    await world.supervisor.stop()
    assert ends.read_text().split() == ["second", "first"]
    assert world.said.empty()


async def test_more_children_than_asyncio_has_threads_are_stopped(world: World) -> None:
    for number in range((os.cpu_count() or 1) + 8):
        await world.supervisor.start(world.child(f"child{number}", "touch READY; exec sleep 600"))
    async with asyncio.timeout(WAIT_S):
        await world.supervisor.stop()
