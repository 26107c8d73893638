"""Traces from a publish to its delivery, if they are wanted: what bridges and workers call. Off, nobody calls anything.

A bridge begins a trace with a publish and puts its context into the Kafka record (W3C Trace Context). A worker keeps
the contexts of what it has fetched and not folded yet beside the records, so that a record is the same with and
without; it puts the context on the commands that come of them. A bridge ends the trace with the delivery.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from millpond.agents.driver.observer import Observer
from millpond.agents.ports import Log
from millpond.schemas.commands import Command
from millpond.schemas.events import MessagePublished

Headers: TypeAlias = tuple[tuple[str, bytes], ...]


class TraceSpan(Protocol):
    """A publish that is traced, until it is kept."""

    headers: Headers

    def end(self, *, failed: bool = False) -> None:
        """Kafka has it, or not."""
        ...

    def answered(self, kept: asyncio.Future[Any]) -> None:
        """The end, by what became of a future."""
        ...


class BridgeTracing(Protocol):
    """The spans of a bridge."""

    def publish(self, event: MessagePublished) -> TraceSpan | None:
        """A publish begins; None if it is not traced."""
        ...

    def deliver(self, headers: Sequence[tuple[str, bytes]], command: Command) -> TraceSpan | None:
        """A command begins; None if what it comes from is not traced. It ends when Kafka knows what became of it."""
        ...

    def close(self) -> None:
        """Send what is left. May take some seconds."""
        ...


class WorkerTracing(Protocol):
    """The spans of a worker."""

    def fetched(self, topic_partition: Any, records: Sequence[Any]) -> None:
        """Records of a partition, as aiokafka has them."""
        ...

    def observer(self, inside: Observer, number: int) -> Observer:
        """Who looks on besides `inside`."""
        ...

    def log(self, inside: Log) -> Log:
        """A log that passes contexts on with what is produced."""
        ...

    def close(self) -> None:
        """Send what is left. May take some seconds."""
        ...
