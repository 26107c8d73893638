"""Names of leases: `{agent}/{partition}/{number}`, for example `queue/7/18823`.

A `deliver` command carries the name to the bridge. The bridge's report carries it back to the partition that leased the
message. Numbers count from 1 in each partition; 0 is no lease.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

from millpond.schemas.errors import DecodeError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition

NUMBER_DIGITS_MAX = 18  # so every number is below 2**63, as Kafka's offsets are


class LeaseName(NamedTuple):
    """The parts of a lease's name."""

    agent: AgentName
    partition: int
    number: int

    def __str__(self) -> str:
        return f"{self.agent}/{self.partition}/{self.number}"


def lease_name(partition: Partition, number: int) -> str:
    """Return the name of a lease of this partition."""
    return f"{partition.agent}/{partition.number}/{number}"


def parse_lease(name: str) -> LeaseName:
    """Split the name of a lease into its parts.

    Raises:
        DecodeError: The text is not the name of a lease.
    """
    parts = name.split("/")
    if len(parts) == 3:
        agent, partition, number = parts
        if agent in get_args(AgentName) and _is_number(partition) and _is_number(number):
            return LeaseName(agent, int(partition), int(number))  # type: ignore[arg-type]  # checked above
    raise DecodeError(f"not the name of a lease: {name[:100]!r}")


def lease_number(name: str) -> int:
    """Return the number in a lease's name, without a check of the rest. 0 if the text ends with no number.

    A machine compares number, client id and message id with its own leases. So it needs no other check.
    """
    try:
        return int(name[name.rfind("/") + 1 :])
    except ValueError:
        return 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= NUMBER_DIGITS_MAX
