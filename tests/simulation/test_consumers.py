"""Seeded worlds of slow, frozen, late and absent consumers: no connection gets a message twice, nobody is given more than
it may have, everything is done in the end, and what somebody has done is no dead letter.

Bugs planted by hand, each caught here and by `tests/unit/agents/queue/test_turns.py`: a left copy takes no room; a message
that returned goes to a client that has a copy of it. An acknowledgement that is no sign of life is caught there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from millpond.agents.delivery import leasing
from tests.simulation.consumers import Consumers, Kind, World

SEEDS = 12
WORLDS: dict[str, tuple[Kind, ...]] = {
    "slow alone": ("slow",), "slow": ("slow", "slow", "slow"), "frozen alone": ("frozen",),
    "frozen": ("frozen", "slow"), "frozen and away": ("frozen", "away", "away"), "late": ("late", "slow", "late"), "away": ("away", "away"),
    "all": ("slow", "frozen", "late", "away"),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leasing, "COMMAND_VALID_FOR_S", 3)
        patch.setattr("millpond.agents.delivery.membership.FORGET_MS", 10_000)
        yield


@pytest.mark.parametrize("which", ["queue", "group", "single"])
@pytest.mark.parametrize("name", WORLDS)
def test_each_message_is_done_once_for_each_connection(name: str, which: World) -> None:
    for seed in range(SEEDS):
        print(f"seed {seed}")  # shown if it fails
        Consumers(seed, which, WORLDS[name]).live()
