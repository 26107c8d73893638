"""Where the parts of an EMQX bridge have their events kept."""

from __future__ import annotations

import asyncio
from typing import Protocol

from millpond.pipeline.telemetry.tracing import Headers
from millpond.schemas.events import Event


class Keeping(Protocol):
    """An `Inlet`. The order of events in Kafka is that of the calls of `enter`."""

    @property
    def complaint(self) -> str | None:
        """Why events are refused; None if all is well."""
        ...

    def enter(
        self,
        topic: str,
        event: Event,
        partition: int | None = None,
        *,
        hook: str,
        headers: Headers = (),
    ) -> asyncio.Future[None]:
        """The future is done when the event is kept, or raises a MillpondError if it is not."""
        ...
