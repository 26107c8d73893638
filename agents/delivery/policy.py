"""What each of the two delivery agents says and decides for itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from millpond.agents.delivery.leasing import Done, W
from millpond.agents.delivery.rounds import Rounds
from millpond.agents.reads import Read
from millpond.agents.topics.state_cache import StateCache
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import (
    Event,
    MessageAcked,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
)


class TopicPolicy(Rounds[W]):
    """The part of a delivery agent that is not shared."""

    @abstractmethod
    def new_windows(self) -> StateCache[W]:
        """No windows known."""

    @abstractmethod
    def touched_by(self, event: MessagePublished | MessageAcked) -> Iterable[str]:
        """The windows that an event of a message changes."""

    @abstractmethod
    def touched_by_operator(
        self, event: OperatorRequeue | OperatorDrop | OperatorRewind
    ) -> Iterable[str]:
        """The windows that an operator's order changes."""

    @abstractmethod
    def more_needed(self, key: str, publishes: int) -> int:
        """How many entries ahead so many publishes need, whoever has room."""

    @abstractmethod
    def wanted_besides(self, events: Sequence[Event]) -> list[Read]:
        """What else the steps of these events need."""

    @abstractmethod
    def wanted_by_due(self, overdue: Sequence[tuple[str, str, str]]) -> list[Read]:
        """What else a tick needs for what is due, by kind, key and message id."""

    def leaving(self, key: str, overdue: Sequence[tuple[str, str, str]]) -> int:
        """How many messages that wait in a window may go with what is due."""
        return 0

    @abstractmethod
    def supply_besides(self, read: Read, answer: Any) -> None:
        """The answer to something of these."""

    @abstractmethod
    def packed(self, window: W) -> bytes | None:
        """A window as it is stored; None if there is nothing to be remembered."""

    @abstractmethod
    def published(self, offset: int, event: MessagePublished, now_ms: int, score: int) -> Done:
        """ON published."""

    @abstractmethod
    def acked_by_client(self, offset: int, event: MessageAcked, now_ms: int) -> Done:
        """ON acked."""

    @abstractmethod
    def requeued(self, offset: int, event: OperatorRequeue, now_ms: int, score: int) -> Done:
        """ON requeue."""

    def rewound(self, offset: int, event: OperatorRewind, now_ms: int, score: int) -> Done:
        """ON rewind: only pubsub has read offsets."""
        raise DecodeError("only a subscriber of a pubsub topic can be rewound")

    @abstractmethod
    def came_due(
        self, offset: int, kind: str, key: str, message_id: str, now_ms: int, score: int
    ) -> Done:
        """ON tick: one thing that is due, and that only this agent knows of."""
