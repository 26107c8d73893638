"""The states that a machine holds in memory, by record key, and which of them a batch has changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Generic, NamedTuple, TypeVar

STATES_HELD_MAX: Final = (
    2_000  # remembered beyond their batch: two MiB, if each is of a kilobyte, as a reader is
)

State = TypeVar("State")


class ChangedState(NamedTuple, Generic[State]):
    """A state that a batch has changed: by which record last, from what, to what."""

    offset: int
    key: str
    before: State
    after: State


class StateCache(Generic[State]):
    """A state once read stays right, because only the partition's owner changes it."""

    def __init__(self, unpack: Callable[[bytes | None], State]) -> None:
        """`unpack` makes a state from what is stored; of None, the state of a key that has none."""
        self._unpack = unpack
        self._held: dict[str, State] = {}
        self._touched: dict[str, tuple[int, State]] = {}  # last offset, state before the batch
        self._in_place: dict[
            str, int
        ] = {}  # last offset, of states that change without being replaced
        self._unsettled: deque[tuple[str, ...]] = deque()  # of each batch not yet in the store

    def __getitem__(self, key: str) -> State:
        return self._held[key]

    def get(self, key: str) -> State | None:
        """The state of a key, if it is held."""
        return self._held.get(key)

    def values(self) -> Iterable[State]:
        """All states that are held."""
        return self._held.values()

    def unknown(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the keys whose state is not held, each once."""
        return tuple(dict.fromkeys(name for name in names if name not in self._held))

    def supply(self, packed: Mapping[str, bytes | None]) -> None:
        """States as they are in the store."""
        for key, state in packed.items():
            self._held[key] = self._unpack(state)

    def change(self, offset: int, key: str, after: State) -> None:
        """The record at `offset` replaces the state of a key that is held."""
        before = self._held[key]
        self._touched[key] = offset, self._touched.get(key, (offset, before))[1]
        self._held[key] = after

    def touch(self, offset: int, key: str) -> State:
        """The state of a key that is held, which the record at `offset` changes in place."""
        self._in_place[key] = offset
        return self._held[key]

    def finish(self) -> Iterator[ChangedState[State]]:
        """The end of a batch: what it changed, each key once. A state changed in place is both before and after."""
        touched, self._touched = self._touched, {}
        in_place, self._in_place = self._in_place, {}
        self._unsettled.append((*touched, *in_place))
        for key, offset in in_place.items():
            yield ChangedState(offset, key, self._held[key], self._held[key])
        for key, (offset, before) in touched.items():
            if self._held[key] != before:
                yield ChangedState(offset, key, before, self._held[key])
        if len(self._held) > STATES_HELD_MAX:
            # What is on its way into the store cannot be read from there yet.
            self._held = {key: self._held[key] for batch in self._unsettled for key in batch}

    def settled(self) -> None:
        """The oldest batch finished and not yet settled is in the store."""
        self._unsettled.popleft()
