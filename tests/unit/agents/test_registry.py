"""Every agent has a machine of its own name."""

from __future__ import annotations

import pytest

from millpond.agents.registry import AGENT_NAMES, MACHINES
from millpond.schemas.events import AgentName


@pytest.mark.parametrize("agent", AGENT_NAMES)
def test_an_agents_machine_bears_its_name(agent: AgentName) -> None:
    assert MACHINES[agent]().agent == agent
