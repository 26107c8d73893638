"""Records on their way to become one transaction, and that transaction on its way into the store."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import NamedTuple

from msgspec import Struct, field

from millpond.agents.effects import DeadLetter, Refusal
from millpond.agents.ports import Record, Transaction
from millpond.schemas.events import Event


class FoldedEvent(NamedTuple):
    """An owned event with its record and the log's time at it."""

    record: Record
    event: Event
    now_ms: int


class Batch(Struct):
    """Records in order, skipped ones among them; what was read of them, and which cannot be read."""

    records: list[Record] = field(default_factory=list)
    folded: list[FoldedEvent] = field(default_factory=list)
    unreadable: list[DeadLetter] = field(default_factory=list)

    @property
    def owned(self) -> bool:
        """Whether any of it is this agent's."""
        return bool(self.folded or self.unreadable)

    def add(self, record: Record, found: Event | DeadLetter | None, now_ms: int) -> None:
        """One more record, with what the intake found in it."""
        self.records.append(record)
        if isinstance(found, DeadLetter):
            self.unreadable.append(found)
        elif found is not None:
            self.folded.append(FoldedEvent(record, found, now_ms))


class HalfWrittenEvent(NamedTuple):
    """An event of which the store refused a part."""

    event: Event
    refusal: Refusal


class InFlight(NamedTuple):
    """A transaction on its way, with what is needed once it is in. It cleans up after `cleaned`."""

    transaction: Transaction
    batch: Batch
    cleaned: Sequence[HalfWrittenEvent]
    committing: Awaitable[Sequence[Refusal]]


def sort_out(
    batch: Batch, refusals: Sequence[Refusal]
) -> tuple[list[HalfWrittenEvent], list[DeadLetter], list[str]]:
    """What refusals come to: the half written events, one dead letter for each, and what no event asked for."""
    events = {folded.record.offset: folded.event for folded in batch.folded}
    half_written: list[HalfWrittenEvent] = []
    reasons: dict[int, list[str]] = {}
    others: list[str] = []
    for refusal in refusals:
        reason = f"the store refused its {refusal.part}: {refusal.reason}"
        event = events.get(
            refusal.offset
        )  # never of NO_SOURCE, nor of what cleans up after an earlier batch
        if event is None:
            others.append(reason)
        else:
            half_written.append(HalfWrittenEvent(event, refusal))
            reasons.setdefault(refusal.offset, []).append(reason)
    letters = [DeadLetter(offset, "; ".join(why)) for offset, why in reasons.items()]
    return half_written, letters, others
