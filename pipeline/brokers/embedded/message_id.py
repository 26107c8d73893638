"""Message ids as EMQX makes them: 128 bits, 32 hex characters, in time order as text."""

from __future__ import annotations

import time
from collections.abc import Callable
from zlib import crc32


class MessageIds:
    """64 bits of µs since the epoch, 48 bits of node, 16 bits of sequence within one µs."""

    def __init__(self, node: str, process: int, now_us: Callable[[], int] | None = None) -> None:
        """`process` tells two runs of the same node apart."""
        self._now_us = now_us or (lambda: time.time_ns() // 1000)
        self._node = (crc32(node.encode()) << 16 | process & 0xFFFF) & 0xFFFF_FFFF_FFFF
        self._last_us = self._sequence = 0

    def next(self) -> str:
        """A new id, larger than all before, also when the clock steps back."""
        now_us = self._now_us()
        if now_us > self._last_us:
            self._last_us, self._sequence = now_us, 0
        elif self._sequence < 0xFFFF:
            self._sequence += 1
        else:
            self._last_us, self._sequence = self._last_us + 1, 0
        return f"{self._last_us:016X}{self._node:012X}{self._sequence:04X}"
