"""What the settings allow that weakens a guarantee: named by `millpond config check`, decided by the user."""

from __future__ import annotations

from agents.registry import AGENT_NAMES
from pipeline.settings import Settings
from schemas.events import AgentName
from schemas.rules import Rules

AGENTS: tuple[AgentName, ...] = ("sessions", "messages", "queue", "pubsub")


async def weaknesses(settings: Settings, rules: Rules) -> list[str]:
    """One sentence each."""
    return [*_missing_agents(rules), *_kafka(settings, rules)]


def _missing_agents(rules: Rules) -> list[str]:
    return [
        f"rules for the agent {agent} are accepted, but this version has no such agent:"
        " what it would do waits in Kafka"
        for agent in AGENTS
        if agent not in AGENT_NAMES and rules.run_by(agent)
    ]


def _kafka(settings: Settings, rules: Rules) -> list[str]:
    kafka = settings.kafka
    found = []
    if kafka.min_insync_replicas < 2:
        found.append(
            "[kafka] min_insync_replicas is 1: an acknowledged publish is on one broker only"
        )
    longest = max((rule.expired_time or 0 for rule in rules.rules), default=0)
    if longest > kafka.retention_hours * 3600:
        found.append(
            f"[kafka] retention_hours is {kafka.retention_hours}, but messages are kept {longest} s:"
            " Redis can be rebuilt only as far back as the log goes"
        )
    return found
