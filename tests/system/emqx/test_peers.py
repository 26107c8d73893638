"""The notes between the processes of one bridge, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from millpond.pipeline.brokers.emqx.delivery import peers as peers_module
from millpond.pipeline.brokers.emqx.delivery.peers import NAME, PENDING_MAX, PeerProcesses
from millpond.pipeline.brokers.emqx.delivery.sender import BulkSender
from tests.support.workers import until


class Sender(BulkSender):
    """The sender of one process: it has the commands of these clients, and records what it hears."""

    def __init__(self, *clients: str) -> None:
        self.clients, self.acks = clients, list[tuple[str, str]]()
        self.ended: list[str] = []
        self.gaps = 0

    def acked(self, client_id: str, alias: str) -> bool:
        if client_id in self.clients:
            self.acks.append((client_id, alias))
        return client_id in self.clients

    def session_ended(self, client_id: str) -> None:
        self.ended.append(client_id)

    def gap(self) -> None:
        self.gaps += 1


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: the name of a socket has at most 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="mp") as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def process(
    directory: Path, number: int, sender: Sender, *, first: bool = False
) -> AsyncIterator[PeerProcesses]:
    peers = PeerProcesses(directory, number, sender, sender.gap if first else None)
    running = asyncio.create_task(peers.run())
    await asyncio.sleep(0)
    try:
        yield peers
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait((running,))


async def test_an_acknowledgement_reaches_the_process_with_the_clients_commands(
    directory: Path,
) -> None:
    one, two = Sender("a"), Sender("b")
    async with process(directory, 1, two), process(directory, 0, one, first=True) as peers:
        peers.acked("a", "A1")
        peers.acked("b", "B1")

        async def arrived() -> bool:
            return bool(two.acks)

        await until(arrived, "the note at the other process")
        assert (one.acks, two.acks) == ([("a", "A1")], [("b", "B1")])


async def test_the_end_of_a_session_reaches_all_processes(directory: Path) -> None:
    one, two = Sender(), Sender()
    async with process(directory, 1, two), process(directory, 0, one, first=True) as peers:
        peers.session_ended("c")

        async def arrived() -> bool:
            return bool(two.ended)

        await until(arrived, "the note at the other process")
        assert one.ended == two.ended == ["c"]


async def test_a_gap_reaches_the_process_that_takes_snapshots(directory: Path) -> None:
    one, two = Sender(), Sender()
    async with process(directory, 0, one, first=True):
        assert one.gaps == 1
        async with process(directory, 1, two) as peers:
            peers.gap("node")

            async def arrived() -> bool:
                return one.gaps == 3  # one for its start

            await until(arrived, "the note at the first process")
        assert two.gaps == 0


async def test_a_process_that_starts_later_is_known_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is known it hears of no acknowledgement, and windows of its clients stay full."""
    monkeypatch.setattr(peers_module, "SEARCH_INTERVAL_S", 3_600)
    one, two = Sender(), Sender("b")
    async with process(directory, 0, one, first=True) as peers, process(directory, 1, two):

        async def known() -> bool:
            return bool(peers._peers)

        await until(known, "the greeting of the later process")
        peers.acked("b", "B")

        async def arrived() -> bool:
            return bool(two.acks)

        await until(arrived, "the note at the later process")


async def test_a_process_whose_greeting_was_lost_is_found(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "SEARCH_INTERVAL_S", 0.01)
    async with process(directory, 0, Sender(), first=True) as peers:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(str(directory / NAME.format(1)))

            async def known() -> bool:
                return bool(peers._peers)

            await until(known, "the other process")


async def test_the_socket_of_a_killed_process_is_replaced(directory: Path) -> None:
    path = directory / NAME.format(0)
    left = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    left.bind(str(path))
    left.close()
    async with process(directory, 0, Sender(), first=True):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_many_notes_take_several_datagrams_and_garbage_is_ignored(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two = Sender("x" * 300)
    async with process(directory, 1, two), process(directory, 0, Sender(), first=True) as peers:
        for number in range(1_000):
            peers.acked("x" * 300, str(number))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"\xff[", str(directory / NAME.format(1)))

        async def arrived() -> bool:
            return len(two.acks) >= 1_000

        await until(arrived, "all notes")
        assert [alias for _, alias in two.acks] == [str(number) for number in range(1_000)]
        assert "it is not a note of a bridge process" in caplog.text


async def test_pending_notes_are_bounded(directory: Path) -> None:
    async with (
        process(directory, 1, Sender()),
        process(directory, 0, Sender(), first=True) as peers,
    ):
        for number in range(PENDING_MAX + 10):
            peers.acked("b", str(number))
        assert len(peers._pending) <= PENDING_MAX


async def test_with_a_path_that_is_too_long_a_process_works_alone_and_logs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    sender = Sender("a")
    async with process(deep, 0, sender, first=True) as peers:
        peers.acked("a", "A")
        peers.acked("b", "B")
    assert sender.acks == [("a", "A")]
    assert "processes cannot exchange notes" in caplog.text
