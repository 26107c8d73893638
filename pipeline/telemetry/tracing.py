"""The interface of tracing, from a publish to its delivery. Without an endpoint there is no tracing object.

1. A bridge begins a trace with a publish, and puts its context into a header of the Kafka record (W3C Trace Context).
2. A worker keeps the contexts of fetched records in memory, beside the records. So a record is the same with and
   without tracing, and an agent cannot see the context.
3. When the store has the publish, the worker adds a span. Its context goes into the header of each command for it.
4. A bridge ends the trace with a span for each delivery.
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
    """A span that has begun, of a publish or of a delivery."""

    headers: Headers  # for the Kafka record: the context of this span

    def end(self, *, failed: bool = False) -> None:
        """End the span, with the status of an error if it failed."""
        ...

    def answered(self, kept: asyncio.Future[Any]) -> None:
        """End the span with the result of a finished future. A callback of that future."""
        ...


class BridgeTracing(Protocol):
    """The spans of a bridge."""

    def publish(self, event: MessagePublished) -> TraceSpan | None:
        """Begin the span of a publish. None if the publish is not traced."""
        ...

    def deliver(self, headers: Sequence[tuple[str, bytes]], command: Command) -> TraceSpan | None:
        """Begin the span of a delivery. None if its publish is not traced.

        The caller ends the span when Kafka has the report.
        """
        ...

    def close(self) -> None:
        """Send the remaining spans. Blocks for up to some seconds."""
        ...


class WorkerTracing(Protocol):
    """The spans of a worker."""

    def fetched(self, topic_partition: Any, records: Sequence[Any]) -> None:
        """Remember the contexts of fetched records. The arguments are aiokafka's."""
        ...

    def observer(self, inner: Observer, number: int) -> Observer:
        """Return an observer of partition `number` that adds spans, and calls `inner` as well."""
        ...

    def log(self, inner: Log) -> Log:
        """Return a log that adds contexts to the commands that it produces."""
        ...

    def close(self) -> None:
        """Send the remaining spans. Blocks for up to some seconds."""
        ...
