"""What a batch has been told of its topics' indexes, and what has left them since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from millpond.agents.reads import Read, ReadEntry, ReadIndex
from millpond.agents.topics.storage import oldest_entries


class Indexes:
    """Of one batch; it is no state."""

    def __init__(self) -> None:
        """Nothing told."""
        self.places: dict[
            tuple[str, str], int | None
        ] = {}  # of messages that a window may not know
        self.left: dict[tuple[str, str], None] = {}
        self.oldest: dict[
            str, tuple[Sequence[tuple[str, int]], int]
        ] = {}  # and how many were asked

    def unknown_places(self, messages: Iterable[tuple[str, str]]) -> list[Read]:
        """The reads for where these messages of topics are, if anywhere."""
        return [ReadEntry(*message) for message in messages if message not in self.places]

    def unknown_oldest(self, topics: Sequence[str]) -> list[Read]:
        """The reads for what a sweep of these topics looks at."""
        return [*oldest_entries(topics, self.oldest)]

    def supply(self, read: Read, answer: Any) -> None:
        """The answer to one of these."""
        if isinstance(read, ReadEntry):
            self.places[read.topic, read.message_id] = answer
            return
        assert isinstance(read, ReadIndex), "nothing else is wanted"
        self.oldest[read.topic] = answer, read.limit
        self.places |= {(read.topic, message_id): score for message_id, score in answer}

    def between(self, cursor: int, last: int, topic: str, message_id: str) -> bool:
        """Whether a message is in its topic's index behind a score and up to another, as far as was told."""
        message = topic, message_id
        return message not in self.left and cursor < (self.places.get(message) or 0) <= last
