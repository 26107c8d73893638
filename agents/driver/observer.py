"""Observers watch the folding of one partition, for metrics and traces. The driver calls them once a batch, and for a dead letter
that no batch has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from millpond.agents.driver.batch import Batch
from millpond.agents.effects import DeadLetter
from millpond.agents.ports import Transaction


class Observer(Protocol):
    """Watches one partition. No call may wait or raise."""

    def stepping(self, sequence: int) -> None:
        """The driver begins to step a batch. Without an error it becomes the transaction with this sequence."""
        ...

    def applied(
        self, batch: Batch, transaction: Transaction, refused: Sequence[DeadLetter]
    ) -> None:
        """The store has applied a batch. `refused` has a dead letter for each record with a refused part."""
        ...

    def dead_letter(self, reason: str) -> None:
        """The driver produces a dead letter that neither the outputs nor `refused` of a batch have."""
        ...


class NullObserver:
    """Ignores everything."""

    def stepping(self, sequence: int) -> None:
        pass

    def applied(
        self, batch: Batch, transaction: Transaction, refused: Sequence[DeadLetter]
    ) -> None:
        pass

    def dead_letter(self, reason: str) -> None:
        pass
