"""What the parts of an EMQX bridge ask of each other."""

from __future__ import annotations

import asyncio
from typing import Protocol

from schemas.events import Event


class Entering(Protocol):
    """Where events go to be kept: an `Inlet`."""

    def enter(
        self, topic: str, event: Event, partition: int | None = None, *, hook: str
    ) -> asyncio.Future[None]:
        """The future is done when the event is kept, and fails with `NotKept` if it cannot be."""


class WayBack(Protocol):
    """Where a copy is published so that the hook knows it again: a `Returning`."""

    def topic_for(self, lease: str, client_id: str, message_id: str, topic: str) -> str:
        """`topic` is where it is to be routed to; `lease` may be empty."""


class Mounting(Protocol):
    """How one client is reached alone: a `Mountpoint`."""

    def can_serve(self, client_id: str) -> bool:
        """Whether it can be."""

    def mount(self, client_id: str, topic: str) -> str:
        """The topic as this client's subscriptions have it."""


class OwnFilter(Protocol):
    """A filter that the broker holds, as its client asked for it: `Translator.own_filter`."""

    def __call__(self, client_id: str, mounted_at: str, told: str) -> tuple[str, bool]:
        """And whether what is delivered there reaches this client alone.

        Raises:
            DecodeError: it is none.
        """
