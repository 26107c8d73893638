"""What one bridge process tells the others of its machine: acknowledged copies, ended sessions, gaps in what it heard.

A client's commands are read by one process, and its calls come to another. They talk by datagrams in the spool
directory, which nobody else may write to. One that is lost costs a copy's room until its validity ends, or a snapshot
until the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal, NoReturn, Protocol, TypeAlias

import msgspec

logger = logging.getLogger(__name__)

COLLECT_S: Final = 0.005  # what is told waits for company
ATTEMPTS_MAX: Final = 20  # to tell one sibling, each after that time
DATAGRAM_BYTES_MAX: Final = 64 * 1024
RECEIVE_BYTES_MAX: Final = 1024 * 1024
PENDING_MAX: Final = 10_000  # not told yet; what is more is lost
LOOK_INTERVAL_S: Final = 2.0  # how late a new sibling is noticed
NAME: Final = "process-{}.socket"

# A client, and the alias of what it acknowledged; or a client whose session ended; or a node.
Note: TypeAlias = tuple[Literal["acked", "ended", "gap"], str, str]

_decoder: msgspec.json.Decoder[list[Note]] = msgspec.json.Decoder(list[Note])


class Copies(Protocol):
    """Whose room is given back: a `Sender`."""

    def acked(self, client_id: str, alias: str) -> bool:
        """Whether its commands are carried out here."""

    def session_ended(self, client_id: str) -> None:
        """Nothing is held for it any more."""


class PeerProcesses:
    """One per process, between what its hooks hear and the senders of all."""

    def __init__(
        self, directory: Path, number: int, own: Copies, on_gap: Callable[[], None] | None = None
    ) -> None:
        """`number` tells the process from its siblings; `on_gap` is that of the one which takes snapshots."""
        self._path = directory / NAME.format(number)
        self._own, self._on_gap = own, on_gap
        self._others: list[str] = []
        self._pending: list[Note] = []
        self._added = asyncio.Event()
        self._socket: socket.socket | None = None

    # -- what the hooks hear

    def acked(self, client_id: str, alias: str) -> None:
        """A client acknowledged a copy."""
        if not self._own.acked(client_id, alias):
            self._tell(("acked", client_id, alias))

    def session_ended(self, client_id: str) -> None:
        """A session was terminated or discarded."""
        self._own.session_ended(client_id)
        self._tell(("ended", client_id, ""))

    def gap(self, node: str = "") -> None:
        """What happened at a node before now is not known."""
        if self._on_gap is not None:
            self._on_gap()
        else:
            self._tell(("gap", node, ""))

    def _tell(self, note: Note) -> None:
        if self._others and len(self._pending) < PENDING_MAX:
            self._pending.append(note)
            self._added.set()

    # -- what is told

    async def run(self) -> NoReturn:
        """Until cancelled."""
        self._open()
        self._find()
        self.gap()  # nobody has heard what came to this process before it was there
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._look())
                tasks.create_task(self._tell_others())
            raise AssertionError("none of them ever returns")
        finally:
            self._close()

    def _open(self) -> None:
        self._path.unlink(missing_ok=True)  # of a process that was killed
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        opened.setblocking(False)
        try:
            opened.bind(str(self._path))
            self._path.chmod(0o600)
        except OSError as error:
            # As when the path is longer than the system allows (108 bytes).
            logger.warning("%s: processes cannot tell each other: %s", self._path, error)
            opened.close()
            return
        self._socket = opened
        asyncio.get_running_loop().add_reader(opened.fileno(), self._receive)

    def _close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._path.unlink(missing_ok=True)

    async def _look(self) -> NoReturn:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            self._find()

    def _find(self) -> None:
        found = self._path.parent.glob(NAME.format("*"))
        self._others = [str(path) for path in found if path != self._path]

    async def _tell_others(self) -> NoReturn:
        while True:
            await self._added.wait()
            await asyncio.sleep(COLLECT_S)
            self._added.clear()
            pending, self._pending = self._pending, []
            for datagram in _datagrams(pending):
                for other in self._others:
                    await self._send(datagram, other)

    async def _send(self, datagram: bytes, other: str) -> None:
        """One that does not listen for so long, or is gone, does without: see above."""
        if self._socket is None:
            return
        for _ in range(ATTEMPTS_MAX):
            try:
                self._socket.sendto(datagram, other)
            except BlockingIOError:
                await asyncio.sleep(COLLECT_S)
            except OSError:
                return
            else:
                return

    def _receive(self) -> None:
        assert self._socket is not None, "it is being read"
        with contextlib.suppress(BlockingIOError):
            while True:
                datagram = self._socket.recv(RECEIVE_BYTES_MAX)
                for note in _notes(datagram):
                    self._hear(*note)

    def _hear(self, kind: str, of: str, alias: str) -> None:
        if kind == "acked":
            self._own.acked(of, alias)
        elif kind == "ended":
            self._own.session_ended(of)
        elif self._on_gap is not None:
            self._on_gap()


def _notes(datagram: bytes) -> list[Note]:
    try:
        return _decoder.decode(datagram)
    except (msgspec.DecodeError, RecursionError):
        logger.warning("a datagram of %d bytes is not a sibling's", len(datagram))
        return []


def _datagrams(notes: Iterable[Note]) -> Iterable[bytes]:
    """Several notes to one."""
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
