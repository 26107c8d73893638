"""The name of a lease: which agent and partition gave it out, and its number there."""

from __future__ import annotations

from typing import NamedTuple, get_args

from millpond.schemas.errors import DecodeError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition

NUMBER_DIGITS_MAX = 18  # below 2**63, as Kafka's offsets are


class LeaseName(NamedTuple):
    """`{agent}/{partition}/{number}`."""

    agent: AgentName
    partition: int
    number: int

    def __str__(self) -> str:
        return f"{self.agent}/{self.partition}/{self.number}"


def lease_name(partition: Partition, number: int) -> str:
    """The name of a lease of this partition."""
    return f"{partition.agent}/{partition.number}/{number}"


def parse_lease(name: str) -> LeaseName:
    """The parts of a lease's name: reports go to the partition that gave it out.

    Raises:
        DecodeError: it is no such name.
    """
    parts = name.split("/")
    if len(parts) == 3:
        agent, partition, number = parts
        if agent in get_args(AgentName) and _is_number(partition) and _is_number(number):
            return LeaseName(agent, int(partition), int(number))  # type: ignore[arg-type]  # checked above
    raise DecodeError(f"not the name of a lease: {name[:100]!r}")


def lease_number(name: str) -> int:
    """The number of a lease, to whom it concerns; 0, which no lease has, if it is not the name of one."""
    try:
        return int(name[name.rfind("/") + 1 :])
    except ValueError:
        return 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= NUMBER_DIGITS_MAX
