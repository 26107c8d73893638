"""Seen ids: the message ids of the last minute or so. A repeated publish changes nothing.

There are two generations. A new id enters the current one. A current generation that is full or a window old becomes
the older one, and the former older one is dropped as a whole. The store has one set of ids for each parity of the
generation's number. Only the log decides when a generation ends, never the borders of batches: a replay repeats it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from millpond.agents.effects import WriteSeen

# A repeat is recognised for at least this long, unless a generation of newer ids comes in the meantime. Two generations
# of 8,192 ids of 32 characters take about 0.5 MiB of Redis and 2 MiB of a worker, for each partition.
DEDUP_WINDOW_MS = 60_000
GENERATION_IDS_MAX = 8_192


class SeenIds:
    """The seen ids of one partition."""

    def __init__(self) -> None:
        self.restore({}, ((), ()))

    def restore(self, partition_state: Mapping[str, int], seen: Sequence[Iterable[str]]) -> None:
        """Continue from an earlier `partition_state`, and the stored ids of both parities."""
        self._generation = partition_state.get("seen_generation", 0)
        self._since_ms = partition_state.get("seen_since_ms", 0)
        parity = self._generation & 1
        self._current = dict.fromkeys(seen[parity])
        self._older = dict.fromkeys(seen[1 - parity])
        self._written = len(self._current)  # so many of the current ids are in the store
        self._unwritten_older: WriteSeen | None = None
        self._fresh = False  # the store still has an old generation under this parity

    def partition_state(self) -> dict[str, int]:
        """Return what `restore` needs besides the ids."""
        return {"seen_generation": self._generation, "seen_since_ms": self._since_ms}

    def __contains__(self, message_id: str) -> bool:
        """True if an id is remembered."""
        return message_id in self._current or message_id in self._older

    def add(self, message_id: str, now_ms: int) -> bool:
        """Remember an id; return False if it was remembered before."""
        if message_id in self:
            return False
        full = len(self._current) >= GENERATION_IDS_MAX
        if full or now_ms - self._since_ms >= DEDUP_WINDOW_MS:
            self._start_generation(now_ms)
        self._current[message_id] = None
        return True

    def _start_generation(self, now_ms: int) -> None:
        if self._current:
            # The rest of this generation is still to be written at the end of the batch.
            self._unwritten_older = self._write()
            self._older, self._current = self._current, {}
            self._generation += 1
            self._fresh, self._written = True, 0
        if self._generation and now_ms - self._since_ms >= 2 * DEDUP_WINDOW_MS:
            self._drop_older()
        self._since_ms = now_ms

    def _drop_older(self) -> None:
        """Drop the older generation: after a silence of two windows, all its ids are too old."""
        self._older = {}
        self._unwritten_older = WriteSeen(self._generation - 1, fresh=True, message_ids=())

    def _write(self) -> WriteSeen | None:
        unwritten = tuple(self._current)[self._written :]
        if not unwritten and not self._fresh:
            return None
        return WriteSeen(self._generation, self._fresh, unwritten)

    def finish(self) -> list[WriteSeen]:
        """Return the writes of a batch, at most one for each generation."""
        writes = [write for write in (self._unwritten_older, self._write()) if write is not None]
        self._unwritten_older, self._fresh, self._written = None, False, len(self._current)
        return writes
