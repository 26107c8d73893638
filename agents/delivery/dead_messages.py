"""Messages given up on: kept in the store with the reason, until an operator decides or their time is over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

import msgspec
from msgspec import Struct, structs

from millpond.agents.delivery.window import Holder
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


class RetractableCounter(Protocol):
    """Counts the dead messages that have holders."""

    retractable: int


# Who had a copy of a dead message, the id that the broker gave the copy, and for which subscriber; a queue has none.
DeadHolder = tuple[str, str | None, str]


class DeadMessage(Struct, frozen=True, kw_only=True):
    """A message given up on `at` (ms), after so many deliveries; in pubsub by these subscribers, the latest one last.

    Its body is kept as long as this is, also when it was `requeued` to them; `score` is its place in the log. A late
    acknowledgement of one of its `holders` takes it back. Its body is `kept` even then, if a requeue may still need it.
    """

    topic: str
    message_id: str
    reason: str
    deliveries: int
    at: int
    score: int = 0
    subscribers: tuple[str, ...] = ()
    requeued: bool = False
    holders: tuple[DeadHolder, ...] = ()
    kept: bool = False


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(DeadMessage).decode


def unpack(packed: bytes | None) -> DeadMessage | None:
    """A dead message as it is stored."""
    return None if packed is None else _decode(packed)


def _unpack_alias(packed: bytes | None) -> str | None:
    return None if packed is None else packed.decode()


def dead_holders(holders: Iterable[Holder], subscriber: str = "") -> tuple[DeadHolder, ...]:
    """The holders of a message that dies."""
    return tuple((client_id, alias, subscriber) for client_id, alias in holders)


class DeadMessages:
    """Those of one partition, by message id; and the message ids by the ids that brokers gave their copies."""

    def __init__(self, due: DueTimes, counters: RetractableCounter) -> None:
        """None known."""
        self._due, self._counters = due, counters
        self.held: StateCache[DeadMessage | None] = StateCache(unpack)
        self.aliases: StateCache[str | None] = StateCache(_unpack_alias)

    def unknown(self, message_ids: Iterable[str]) -> list[ReadStates]:
        """The reads for those that are not known."""
        unknown = self.held.unknown(message_ids)
        return [ReadStates(unknown, "dead")] if unknown else []

    def unknown_acked(self, ids: Sequence[str]) -> list[ReadStates]:
        """The reads for what acknowledgements with these ids may take back. There is nothing to take back, mostly."""
        if not self._counters.retractable:
            return []
        unknown = self.aliases.unknown(ids)
        if unknown:
            return [ReadStates(unknown, "aliases")]
        return self.unknown(dict.fromkeys((*ids, *map(self.known_as, ids))))

    def supply(self, read: ReadStates, answer: Mapping[str, bytes | None]) -> None:
        """The answer to one of these reads."""
        if read.table == "dead":
            self.held.supply(answer)
        else:
            self.aliases.supply(answer)

    def known_as(self, message_id: str) -> str:
        """The dead message's own id, by any id that one of its copies has had."""
        return self.aliases.get(message_id) or message_id

    def held_by(
        self, topic: str, client_id: str, acked: str, subscriber: str | None = None
    ) -> tuple[DeadMessage, str] | None:
        """The dead message that a client acknowledges by any of its ids, and for which subscriber, if it had a copy."""
        dead = self.held.get(self.known_as(acked))
        if dead is None or dead.topic != topic:
            return None
        mine = [
            each for each in dead.holders if each[0] == client_id and subscriber in (None, each[2])
        ]
        exactly = [each for each in mine if each[1] == acked]
        return (dead, (exactly or mine)[0][2]) if mine else None

    def add(self, offset: int, dead: DeadMessage) -> list[Effect | Output]:
        """One more; its body has no lifetime of its own any more, and everybody hears of it."""
        message_id = dead.message_id
        if self.held.get(message_id) is None:
            self.held.supply({message_id: None})  # it was not dead before
        self._change(offset, message_id, dead)
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
        self._change(offset, message_id, None)
        return [SetDue(due_member(DEAD, topic, message_id), None)]

    def requeued(self, offset: int, dead: DeadMessage) -> None:
        """It is nobody's dead message any more, but its body is kept until its time is over."""
        after = structs.replace(dead, subscribers=(), holders=(), requeued=True)
        self._change(offset, dead.message_id, after)

    def acked_for(self, offset: int, dead: DeadMessage, subscriber: str) -> DeadMessage:
        """A subscriber has done with it after all."""
        after = structs.replace(
            dead,
            subscribers=tuple(each for each in dead.subscribers if each != subscriber),
            holders=tuple(each for each in dead.holders if each[2] != subscriber),
        )
        self._change(offset, dead.message_id, after)
        return after

    def _change(self, offset: int, message_id: str, after: DeadMessage | None) -> None:
        before = self.held[message_id]
        was = () if before is None else before.holders
        now = () if after is None else after.holders
        self.held.change(offset, message_id, after)
        self._counters.retractable += bool(now) - bool(was)
        known = {alias for _, alias, _ in now}
        for alias in dict.fromkeys(alias for _, alias, _ in (*was, *now)):
            if alias is None:
                continue
            if self.aliases.get(alias) is None:
                had = any(alias == each for _, each, _ in was)
                self.aliases.supply({alias: message_id.encode() if had else None})
            self.aliases.change(offset, alias, message_id if alias in known else None)

    def finish(self) -> list[Effect]:
        """The end of a batch."""
        effects: list[Effect] = [
            SetState(key, None if after is None else _encode(after), "dead")
            for _, key, _, after in self.held.finish()
        ]
        effects += [
            SetState(alias, None if after is None else after.encode(), "aliases")
            for _, alias, _, after in self.aliases.finish()
        ]
        return effects

    def settled(self) -> None:
        """The oldest batch finished and not yet settled is in the store."""
        self.held.settled()
        self.aliases.settled()
