"""The agents, and the machine of each. A new agent is one more line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from millpond.agents.messages.machine import MessagesMachine
from millpond.agents.ports import Machine
from millpond.agents.pubsub.machine import PubsubMachine
from millpond.agents.queue.machine import QueueMachine
from millpond.agents.sessions.machine import SessionsMachine
from millpond.schemas.events import AgentName

# Each call makes a machine without state, for one partition. The driver restores it.
MACHINES: Final[Mapping[AgentName, Callable[[], Machine]]] = {
    "sessions": SessionsMachine,
    "messages": MessagesMachine,
    "queue": QueueMachine,
    "pubsub": PubsubMachine,
}
AGENT_NAMES: Final = tuple(MACHINES)
