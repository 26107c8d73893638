"""Message ids seen lately: a repeat changes nothing. Two generations, the older one dropped whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from millpond.agents.effects import WriteSeen

# How long a repeat is surely recognised, unless more ids than this come in the meantime. Two generations of
# 8,192 ids of 32 characters are about 0.5 MiB of Redis and 2 MiB of a worker, per partition.
DEDUP_WINDOW_MS = 60_000
GENERATION_IDS_MAX = 8_192


class SeenIds:
    """The ids of one partition. Which generation an id is in depends on the log alone, never on batches."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.restore({}, ((), ()))

    def restore(self, partition_state: Mapping[str, int], seen: Sequence[Iterable[str]]) -> None:
        """Go on from what `partition_state` returned, and the ids of both parities."""
        self._generation = partition_state.get("seen_generation", 0)
        self._since_ms = partition_state.get("seen_since_ms", 0)
        parity = self._generation & 1
        self._current = dict.fromkeys(seen[parity])
        self._older = dict.fromkeys(seen[1 - parity])
        self._written = len(self._current)
        self._unwritten_older: WriteSeen | None = None
        self._fresh = False

    def partition_state(self) -> dict[str, int]:
        """What `restore` needs besides the ids."""
        return {"seen_generation": self._generation, "seen_since_ms": self._since_ms}

    def __contains__(self, message_id: str) -> bool:
        """Whether an id was seen lately."""
        return message_id in self._current or message_id in self._older

    def add(self, message_id: str, now_ms: int) -> bool:
        """Remember an id; False if it was seen before."""
        if message_id in self:
            return False
        full = len(self._current) >= GENERATION_IDS_MAX
        if full or now_ms - self._since_ms >= DEDUP_WINDOW_MS:
            self._turn(now_ms)
        self._current[message_id] = None
        return True

    def _turn(self, now_ms: int) -> None:
        if self._current:
            # The write of what is becoming the older generation is kept for the end of the batch.
            self._unwritten_older = self._write()
            self._older, self._current = self._current, {}
            self._generation += 1
            self._fresh, self._written = True, 0
        if self._generation and now_ms - self._since_ms >= 2 * DEDUP_WINDOW_MS:
            self._forget_older()
        self._since_ms = now_ms

    def _forget_older(self) -> None:
        """What was seen two windows ago is too old even for the older generation."""
        self._older = {}
        self._unwritten_older = WriteSeen(self._generation - 1, fresh=True, message_ids=())

    def _write(self) -> WriteSeen | None:
        unwritten = tuple(self._current)[self._written :]
        if not unwritten and not self._fresh:
            return None
        return WriteSeen(self._generation, self._fresh, unwritten)

    def finish(self) -> list[WriteSeen]:
        """The writes of a batch: at most one for each generation."""
        writes = [write for write in (self._unwritten_older, self._write()) if write is not None]
        self._unwritten_older, self._fresh, self._written = None, False, len(self._current)
        return writes
