"""What the queue agent knows of a topic: its window, and how much is stored."""

from __future__ import annotations

from typing import Final

import msgspec

from millpond.agents.delivery.window import Window


class QueueWindow(Window, array_like=True, dict=True):
    """`length` counts the stored messages, leased ones among them; `last` is the place of the newest in the log (a score);
    `expiring` once a message came with an expiry of its own.
    """

    length: int = 0
    last: int = 0
    expiring: bool = False

    @property
    def ready(self) -> int:
        """How many are to be handed out."""
        return self.length - self.stored_leases

    def complete(self) -> bool:
        """Whether all that is ahead is in memory."""
        return self.read_to >= self.last or self.ready == len(self.returned) + len(self.ahead)

    def empty(self) -> bool:
        """Whether nothing is stored, nor in anybody's hands."""
        return not (self.length or self.leases)

    def blank(self) -> bool:
        """Whether it is as if there had never been a message."""
        return self.empty() and not self.turn

    def clear(self) -> None:
        """Forget the place in the log and the turn; it is empty."""
        self.cursor = self.last = 0
        self.turn, self.due, self.expiring = "", None, False
        self.forget_ahead()

    def first(self, score: int) -> None:
        """The topic's first message ever: what the index holds before it is somebody else's."""
        if self.last == 0:
            self.cursor = self.read_to = score - 1


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(QueueWindow).decode


def pack(window: QueueWindow) -> bytes:
    """The window as it is stored."""
    return _encode(window)


def unpack(packed: bytes | None) -> QueueWindow:
    """The window as it was stored; of a topic never heard of, an empty one."""
    return QueueWindow() if packed is None else _decode(packed)
