"""A batch: the records that become one transaction, and that transaction while the store applies it."""

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
    """Consecutive records, with what the decoder found in them.

    `records` has all of them, also those of other agents. `folded` has the owned events, `unreadable` one dead letter
    for each owned record that does not decode.
    """

    records: list[Record] = field(default_factory=list)
    folded: list[FoldedEvent] = field(default_factory=list)
    unreadable: list[DeadLetter] = field(default_factory=list)

    @property
    def owned(self) -> bool:
        """True if any record of the batch is this agent's."""
        return bool(self.folded or self.unreadable)

    def add(self, record: Record, found: Event | DeadLetter | None, now_ms: int) -> None:
        """Append a record with the result of `RecordDecoder.decode`."""
        self.records.append(record)
        if isinstance(found, DeadLetter):
            self.unreadable.append(found)
        elif found is not None:
            self.folded.append(FoldedEvent(record, found, now_ms))


class HalfWrittenEvent(NamedTuple):
    """An event of which the store refused a part and wrote the others."""

    event: Event
    refusal: Refusal


class InFlight(NamedTuple):
    """The transaction that the store is applying, with what the driver needs when the reply arrives.

    `cleaned` are the half-written events of earlier batches that this transaction cleans up.
    """

    transaction: Transaction
    batch: Batch
    cleaned: Sequence[HalfWrittenEvent]
    committing: Awaitable[Sequence[Refusal]]


def sort_refusals(
    batch: Batch, refusals: Sequence[Refusal]
) -> tuple[list[HalfWrittenEvent], list[DeadLetter], list[str]]:
    """Sort the store's refusals of a batch.

    Returns:
        The half-written events, one for each refusal. One dead letter for each record that has refusals. The reasons of
        refusals that belong to no event of the batch: the driver can only log them.
    """
    events = {folded.record.offset: folded.event for folded in batch.folded}
    half_written: list[HalfWrittenEvent] = []
    reasons: dict[int, list[str]] = {}
    others: list[str] = []
    for refusal in refusals:
        reason = f"the store refused its {refusal.part}: {refusal.reason}"
        # Expiry has no record (NO_SOURCE), and cleaning up belongs to a record of an earlier batch.
        event = events.get(refusal.offset)
        if event is None:
            others.append(reason)
        else:
            half_written.append(HalfWrittenEvent(event, refusal))
            reasons.setdefault(refusal.offset, []).append(reason)
    dead_letters = [DeadLetter(offset, "; ".join(parts)) for offset, parts in reasons.items()]
    return half_written, dead_letters, others
