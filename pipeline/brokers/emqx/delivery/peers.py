"""Notes between the bridge processes of one host: acknowledged copies, ended sessions, gaps in the hooks' events.

Kafka assigns a client's commands to one process. EMQX's calls for that client may come to another process. So a process
that learns of an acknowledgement sends a note to the others. Notes are datagrams through Unix sockets in the spool
directory, `process-{number}.socket`; only this user may write there.

A process that starts sends an empty datagram to the others, so they know it before it carries out commands.

A note may get lost. A lost acknowledgement takes room in the client's window until the copy expires. A lost gap delays
the correction until the next snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeAlias

import msgspec

from millpond.pipeline.brokers.emqx.delivery.sender import BulkSender

logger = logging.getLogger(__name__)

COLLECT_S: Final = 0.005  # how long notes are collected for one datagram
ATTEMPTS_MAX: Final = 20  # to send a datagram to a peer whose buffer is full, `COLLECT_S` apart
DATAGRAM_BYTES_MAX: Final = 64 * 1024
RECEIVE_BYTES_MAX: Final = 1024 * 1024
PENDING_MAX: Final = 10_000  # notes that wait to be sent; later ones are lost
SEARCH_INTERVAL_S: Final = 2.0  # for peers whose greeting was lost, and for peers that have ended
GREETING: Final = b"[]"
NAME: Final = "process-{}.socket"

# ("acked", client id, alias of the copy), ("ended", client id, "") or ("gap", node, "").
Note: TypeAlias = tuple[Literal["acked", "ended", "gap"], str, str]

_decoder: msgspec.json.Decoder[list[Note]] = msgspec.json.Decoder(list[Note])


class PeerProcesses:
    """One per process. It passes on what the hooks report: to the own sender, and to the peers."""

    def __init__(
        self,
        directory: Path,
        number: int,
        sender: BulkSender,
        on_gap: Callable[[], None] | None = None,
    ) -> None:
        """`number` is the process's own among its peers. Only the process that takes snapshots has `on_gap`."""
        self._path = directory / NAME.format(number)
        self._sender, self._on_gap = sender, on_gap
        self._peers: list[str] = []  # paths of their sockets
        self._pending: list[Note] = []
        self._added = asyncio.Event()
        self._socket: socket.socket | None = None  # None: the process cannot exchange notes

    # -- reports of the hooks

    def acked(self, client_id: str, alias: str) -> None:
        """Pass on that a client acknowledged a copy."""
        if not self._sender.acked(client_id, alias):
            self._add(("acked", client_id, alias))

    def session_ended(self, client_id: str) -> None:
        """Pass on that a session was terminated or discarded."""
        self._sender.session_ended(client_id)
        self._add(("ended", client_id, ""))

    def gap(self, node: str = "") -> None:
        """Ask for a snapshot, because events of a node before now may be missing."""
        if self._on_gap is not None:
            self._on_gap()
        else:
            self._add(("gap", node, ""))

    def _add(self, note: Note) -> None:
        if self._peers and len(self._pending) < PENDING_MAX:
            self._pending.append(note)
            self._added.set()

    # -- notes

    async def run(self) -> NoReturn:
        """Exchange notes with the peers, until cancelled."""
        self._open()
        self._find_peers()
        for peer in self._peers:
            await self._send(GREETING, peer)
        # Calls before this start may have had no answer, so their events may be missing.
        self.gap()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._search())
                tasks.create_task(self._send_notes())
            raise AssertionError("the tasks run until they are cancelled")
        finally:
            self._close()

    def _open(self) -> None:
        # A process that was killed leaves its socket behind.
        self._path.unlink(missing_ok=True)
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        opened.setblocking(False)
        try:
            opened.bind(str(self._path))
            self._path.chmod(0o600)
        except OSError as error:
            # For example: the path is longer than the system allows (108 bytes).
            logger.warning(
                "%s: the bridge processes cannot exchange notes, so deliveries may wait for expired copies:"
                " use a shorter [bridge] spool_directory, or one process: %s",
                self._path, error,
            )  # fmt: skip
            opened.close()
            return
        self._socket = opened
        asyncio.get_running_loop().add_reader(opened.fileno(), self._receive)

    def _close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._path.unlink(missing_ok=True)

    async def _search(self) -> NoReturn:
        while True:
            await asyncio.sleep(SEARCH_INTERVAL_S)
            self._find_peers()

    def _find_peers(self) -> None:
        found = self._path.parent.glob(NAME.format("*"))
        self._peers = [str(path) for path in found if path != self._path]

    async def _send_notes(self) -> NoReturn:
        while True:
            await self._added.wait()
            await asyncio.sleep(COLLECT_S)
            self._added.clear()
            pending, self._pending = self._pending, []
            for datagram in _datagrams(pending):
                for peer in self._peers:
                    await self._send(datagram, peer)

    async def _send(self, datagram: bytes, peer: str) -> None:
        """Send a datagram to one peer. It is lost if the peer has ended, or does not read for about 0.1 s."""
        if self._socket is None:
            return
        for _ in range(ATTEMPTS_MAX):
            try:
                self._socket.sendto(datagram, peer)
            except BlockingIOError:
                await asyncio.sleep(COLLECT_S)
            except OSError:
                return
            else:
                return

    def _receive(self) -> None:
        assert self._socket is not None, "the loop reads an open socket"
        with contextlib.suppress(BlockingIOError):
            while True:
                datagram, peer = self._socket.recvfrom(RECEIVE_BYTES_MAX)
                if peer and peer not in self._peers:
                    self._peers.append(peer)
                for note in _notes(datagram):
                    self._received(*note)

    def _received(self, kind: str, of: str, alias: str) -> None:
        if kind == "acked":
            self._sender.acked(of, alias)
        elif kind == "ended":
            self._sender.session_ended(of)
        elif self._on_gap is not None:
            self._on_gap()


def _notes(datagram: bytes) -> list[Note]:
    try:
        return _decoder.decode(datagram)
    except (msgspec.DecodeError, RecursionError):
        logger.warning(
            "ignored a datagram of %d bytes: it is not a note of a bridge process", len(datagram)
        )
        return []


def _datagrams(notes: Iterable[Note]) -> Iterable[bytes]:
    """Pack notes into datagrams of at most `DATAGRAM_BYTES_MAX`. A longer note gets a datagram of its own."""
    encoded: list[bytes] = []
    size = 0
    for note in notes:
        part = msgspec.json.encode(note)
        if encoded and size + len(part) > DATAGRAM_BYTES_MAX:
            yield b"[" + b",".join(encoded) + b"]"
            encoded, size = [], 0
        encoded.append(part)
        size += len(part) + 1
    if encoded:
        yield b"[" + b",".join(encoded) + b"]"
