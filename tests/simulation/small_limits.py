"""Limits of the queue agent that are so small that short logs reach them."""

from __future__ import annotations

import pytest

from millpond.agents.delivery import leasing, members, membership, rounds, window
from millpond.agents.delivery import machine as delivery
from millpond.agents.queue import machine
from millpond.agents.topics import state_cache, storage

SEND_MS = 7_000


def small_limits(patch: pytest.MonkeyPatch) -> None:
    """Set the limits."""
    patch.setattr("millpond.agents.topics.due_times.SWEEP_DUE_MAX", 2)
    patch.setattr("millpond.agents.delivery.dead_messages.DEAD_LETTER_RETENTION_MS", 20_000)
    for where, name, limit in (
        (storage, "SWEEP_ENTRIES_MAX", 2), (state_cache, "STATES_HELD_MAX", 1), (window, "AHEAD_MAX", 2),
        (window, "HOLDERS_MAX", 2), (delivery, "READ_MIN", 1), (delivery, "AHEAD_TOTAL_MAX", 5),
        (rounds, "ROUNDS_MAX", 1), (rounds, "FILTERS_MAX", 1), (rounds, "PAGE_MAX", 1), (machine, "PAGE_MAX", 1),
        (machine, "QOS_0_WAITING_MAX", 3),
        (leasing, "UNCONFIRMED_MAX", 4), (leasing, "SEND_TIMEOUT_MS", SEND_MS),
        (members, "AWAKE_MAX", 1), (membership, "FORGET_MS", 3_000), (leasing, "COMMAND_VALID_FOR_S", 1),
    ):  # fmt: skip
        patch.setattr(where, name, limit)
