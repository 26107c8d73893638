"""Which agents there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from millpond.agents.messages.machine import MessagesMachine
from millpond.agents.ports import Machine
from millpond.agents.pubsub.machine import PubsubMachine
from millpond.agents.queue.machine import QueueMachine
from millpond.agents.sessions.machine import SessionsMachine
from millpond.schemas.events import AgentName

MACHINES: Final[Mapping[AgentName, Callable[[], Machine]]] = {
    "sessions": SessionsMachine,
    "messages": MessagesMachine,
    "queue": QueueMachine,
    "pubsub": PubsubMachine,
}
AGENT_NAMES: Final = tuple(MACHINES)
