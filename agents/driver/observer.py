"""Who looks on while a partition is folded, and changes nothing: asked once for each batch, never for a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from millpond.agents.driver.batch import Batch
from millpond.agents.effects import DeadLetter
from millpond.agents.ports import Transaction


class Observer(Protocol):
    """Of one partition. Neither call may wait or raise."""

    def stepping(self, sequence: int) -> None:
        """A batch begins, which will be the transaction of this sequence, if nothing comes between."""
        ...

    def applied(
        self, batch: Batch, transaction: Transaction, refused: Sequence[DeadLetter]
    ) -> None:
        """A batch is in the store; of these records it would not take a part."""
        ...


class NullObserver:
    """Nobody looks on."""

    def stepping(self, sequence: int) -> None:
        pass

    def applied(
        self, batch: Batch, transaction: Transaction, refused: Sequence[DeadLetter]
    ) -> None:
        pass
