"""Messages given up on: kept in the store with the reason, until an operator decides or their time is over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
from msgspec import Struct, structs

from millpond.agents.effects import (
    ClearBodyExpiry,
    DeadLetterMessage,
    Effect,
    Output,
    SetDue,
    SetState,
)
from millpond.agents.reads import ReadStates
from millpond.agents.topics.due_times import DEAD, DueTimes, due_member
from millpond.agents.topics.state_cache import StateCache

# A week is time enough to look at what went wrong; without an end, a flood of bad messages would fill the store.
DEAD_LETTER_RETENTION_MS: Final = 7 * 86_400_000


class DeadMessage(Struct, frozen=True, kw_only=True):
    """A message given up on `at` (ms), after so many deliveries; in pubsub by these subscribers, the latest one last.
    Its body is kept as long as this is, also when it was `requeued` to them; `score` is its place in the log.
    """

    topic: str
    message_id: str
    reason: str
    deliveries: int
    at: int
    score: int = 0
    subscribers: tuple[str, ...] = ()
    requeued: bool = False


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(DeadMessage).decode


def unpack(packed: bytes | None) -> DeadMessage | None:
    """A dead message as it is stored."""
    return None if packed is None else _decode(packed)


class DeadMessages:
    """Those of one partition, by message id."""

    def __init__(self, due: DueTimes) -> None:
        """None known."""
        self._due = due
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self.held: StateCache[DeadMessage | None] = StateCache(unpack)

    def unknown(self, message_ids: Iterable[str]) -> list[ReadStates]:
        """The reads for those that are not known."""
        unknown = self.held.unknown(message_ids)
        return [ReadStates(unknown, "dead")] if unknown else []

    def add(self, offset: int, dead: DeadMessage) -> list[Effect | Output]:
        """One more; its body has no lifetime of its own any more, and everybody hears of it."""
        message_id = dead.message_id
        if self.held.get(message_id) is None:
            self.held.supply({message_id: None})  # it was not dead before
        self.held.change(offset, message_id, dead)
        end = dead.at + DEAD_LETTER_RETENTION_MS
        return [
            ClearBodyExpiry(message_id),
            self._due.falls_due(due_member(DEAD, dead.topic, message_id), end),
            DeadLetterMessage(offset, dead.topic, message_id, dead.reason, dead.deliveries),
        ]

    def take(self, offset: int, topic: str, message_id: str) -> list[Effect | Output] | None:
        """It is dead no more; None if there is no such dead message."""
        dead = self.held[message_id]
        if dead is None or dead.topic != topic:
            return None
        self.held.change(offset, message_id, None)
        return [SetDue(due_member(DEAD, topic, message_id), None)]

    def requeued(self, offset: int, dead: DeadMessage) -> None:
        """It is nobody's dead message any more, but its body is kept until its time is over."""
        self.held.change(
            offset, dead.message_id, structs.replace(dead, subscribers=(), requeued=True)
        )

    def finish(self) -> list[Effect]:
        """The end of a batch."""
        return [
            SetState(key, None if after is None else _encode(after), "dead")
            for _, key, _, after in self.held.finish()
        ]
