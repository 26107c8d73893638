"""Who may connect to the embedded broker."""

from __future__ import annotations

from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session


class AcceptEveryone(BaseAuthPlugin):
    """amqtt's own anonymous access also makes sessions forget what comes while a client is away."""

    async def authenticate(self, *, session: Session) -> bool:
        """Let everybody in: the broker listens on loopback."""
        return True
