"""The states of topics that are held in memory, and which of them a batch has changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from agents.effects import ClearRetained, Effect, Retain, SetTopicState
from agents.messages.state import TopicState, pack, unpack

TOPICS_HELD_MAX: Final = 10_000  # states remembered beyond their batch: some MiB


class Topics:
    """A state once read stays right, because only the partition's owner changes it."""

    def __init__(self) -> None:
        """None read yet."""
        self._held: dict[str, TopicState | None] = {}
        self._touched: dict[
            str, tuple[int, TopicState | None]
        ] = {}  # last offset, state before the batch
        self._unsettled: deque[tuple[str, ...]] = deque()  # of each batch not yet in the store

    def __contains__(self, topic: str) -> bool:
        return topic in self._held

    def __getitem__(self, topic: str) -> TopicState | None:
        return self._held[topic]

    def get(self, topic: str) -> TopicState | None:
        """The state of a topic, if it has one and it is held."""
        return self._held.get(topic)

    def supply(self, packed: Mapping[str, bytes | None]) -> None:
        """States as they are in the store."""
        for topic, state in packed.items():
            self._held[topic] = unpack(state)

    def touch(self, offset: int, topic: str, after: TopicState | None) -> None:
        """The record at `offset` changes the state of a topic that is held."""
        before = self._held[topic]
        self._touched[topic] = offset, self._touched.get(topic, (offset, before))[1]
        self._held[topic] = after

    def finish(self) -> list[Effect]:
        """One write for each topic that the batch changed, however often."""
        effects: list[Effect] = []
        for topic, (offset, before) in self._touched.items():
            after = self._held[topic]
            if after == before:
                continue
            effects.append(SetTopicState(topic, pack(after)))
            if after is None:
                effects.append(ClearRetained(offset, topic))
            elif before is None or after.score != before.score:
                effects.append(Retain(offset, topic, after.message_id, after.score))
        self._unsettled.append(tuple(self._touched))
        self._touched = {}
        if len(self._held) > TOPICS_HELD_MAX:
            # What is on its way into the store cannot be read from there yet.
            self._held = {topic: self._held[topic] for batch in self._unsettled for topic in batch}
        return effects

    def settled(self) -> None:
        """The oldest batch finished and not yet settled is in the store."""
        self._unsettled.popleft()
