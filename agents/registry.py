"""Which agents there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from agents.messages.machine import MessagesMachine
from agents.ports import Machine
from agents.pubsub.machine import PubsubMachine
from agents.queue.machine import QueueMachine
from agents.sessions.machine import SessionsMachine
from schemas.events import AgentName

MACHINES: Final[Mapping[AgentName, Callable[[], Machine]]] = {
    "sessions": SessionsMachine,
    "messages": MessagesMachine,
    "queue": QueueMachine,
    "pubsub": PubsubMachine,
}
AGENT_NAMES: Final = tuple(MACHINES)
