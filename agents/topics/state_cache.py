"""The states that a machine has in memory, by key, and which of them a batch has changed.

Only the owner of a partition changes its states. So a state that was read once stays right until the next reload.

Beyond a limit, the states that no batch has asked for the longest are forgotten. They are in the store.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Generic, NamedTuple, TypeVar

# States remembered beyond their batch: 2 MiB, if each takes a kilobyte, as a reader of pubsub does.
STATES_HELD_MAX: Final = 2_000

State = TypeVar("State")


class ChangedState(NamedTuple, Generic[State]):
    """A state that a batch has changed. `offset` is that of the last record which changed it."""

    offset: int
    key: str
    before: State
    after: State


class StateCache(Generic[State]):
    """States by key. Its machine either replaces states (`change`), or changes them in place (`touch`), never both."""

    def __init__(self, unpack: Callable[[bytes | None], State]) -> None:
        """`unpack` makes a state from its stored bytes, and from None the state of a key without stored bytes."""
        self._unpack = unpack
        # In the order of their last use: every batch asks for its states, by `unknown` or with a change.
        self._states: OrderedDict[str, State] = OrderedDict()
        # Changed in this batch: key → last offset, and the state before the batch.
        self._replaced: dict[str, tuple[int, State]] = {}
        self._in_place: dict[str, int] = {}  # key → last offset
        # The changed keys of each batch that the store may have yet to apply, oldest batch first.
        self._unsettled: deque[tuple[str, ...]] = deque()

    def __getitem__(self, key: str) -> State:
        return self._states[key]

    def get(self, key: str) -> State | None:
        """Return the state of a key, or None if it is not in memory."""
        return self._states.get(key)

    def values(self) -> Iterable[State]:
        """Return all states in memory, the least recently used first."""
        return self._states.values()

    def unknown(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return those of the keys whose state is not in memory, each once. The others are in use."""
        asked = dict.fromkeys(keys)
        for key in asked:
            if key in self._states:
                self._states.move_to_end(key)
        return tuple(key for key in asked if key not in self._states)

    def supply(self, packed: Mapping[str, bytes | None]) -> None:
        """Take states that were read from the store."""
        for key, state in packed.items():
            self._states[key] = self._unpack(state)

    def change(self, offset: int, key: str, after: State) -> None:
        """Replace the state of a key in memory; the record at `offset` causes it."""
        before = self._states[key]
        self._replaced[key] = offset, self._replaced.get(key, (offset, before))[1]
        self._states[key] = after

    def touch(self, offset: int, key: str) -> State:
        """Return the state of a key in memory for a change in place; the record at `offset` causes it."""
        self._in_place[key] = offset
        return self._states[key]

    def finish(self) -> Iterator[ChangedState[State]]:
        """End a batch: yield each state that it changed, once. After a change in place, `before` is `after`."""
        replaced, self._replaced = self._replaced, {}
        in_place, self._in_place = self._in_place, {}
        self._unsettled.append((*replaced, *in_place))
        for key, offset in in_place.items():
            yield ChangedState(offset, key, self._states[key], self._states[key])
        for key, (offset, before) in replaced.items():
            if self._states[key] != before:
                yield ChangedState(offset, key, before, self._states[key])
        self._forget_unused()

    def _forget_unused(self) -> None:
        """Forget what was used the longest ago. A state of a batch in flight cannot be read from the store: it stays."""
        if len(self._states) <= STATES_HELD_MAX:
            return
        staying = {key: None for batch in self._unsettled for key in batch}
        limit = max(STATES_HELD_MAX, len(staying))
        while len(self._states) > limit:
            key = next(iter(self._states))
            if key in staying:
                self._states.move_to_end(key)
            else:
                del self._states[key]

    def settled(self) -> None:
        """Note that the store has applied the oldest unsettled batch."""
        self._unsettled.popleft()
