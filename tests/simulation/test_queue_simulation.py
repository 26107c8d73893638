"""Seeded worlds of a queue partition under faults.

The store fails before and after writes. New owners start, and old ones continue without knowing. The bridge loses commands.
Then the faults end, clients take and acknowledge everything, and every message must be acknowledged or dead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from millpond.agents.topics import dedup
from millpond.pipeline.stores.memory.server import Moment
from millpond.schemas import keys
from millpond.schemas.errors import StoreDown
from millpond.schemas.keys import Partition
from tests.simulation import judge, queue_judge
from tests.simulation.player import FILTERS, Player
from tests.simulation.queue_judge import QUEUE
from tests.simulation.small_limits import small_limits
from tests.simulation.test_queue_properties import OTHER_RULES, TABLES, a_script
from tests.support.partition import Driver

SEEDS, CHUNK = 400, 50
STEPS_TO_DRAIN_MAX = 200


@pytest.fixture(autouse=True, scope="module")
def _small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small_limits(patch)
        patch.setattr(dedup, "DEDUP_WINDOW_MS", 1_000_000)
        yield


class Simulated:
    """One run of one seed.

    - `fault_rate`: the probability of a fault at each moment of the store.
    - `new_owner_rate`: the probability of a new owner after each step.
    - `old_owners`: earlier owners that do not know that they are fenced.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.name = self.random.choice(list(TABLES))
        self.player = Player(*TABLES[self.name], other_rules=OTHER_RULES)
        self.world = self.player.world
        self.happened: Counter[str] = Counter()
        self.fault_rate = self.random.choice([0, 0.01, 0.1])
        self.new_owner_rate = self.random.choice([0, 0.05, 0.3])
        self.old_owners: list[Driver] = []

    def play(self) -> None:
        """Run the script with faults, then without, and check the end."""
        self.world.server.fault = self._fault
        for step in a_script(self.random):
            self.player.play(step)
            if self.random.random() < self.new_owner_rate:
                self._start_owner()
            if self.random.random() < 0.1:
                self.world.commit(self.world.driver)
        self.world.server.fault = lambda _moment, _partition: None
        self.world.settle()
        self._judge()
        self._drain()
        self._judge()

    def _fault(self, moment: Moment, partition: Partition) -> None:
        if self.random.random() < self.fault_rate:
            self.happened[f"down: {moment}"] += 1
            raise StoreDown(f"down at {moment}")

    def _start_owner(self) -> None:
        """Start a new owner. An old one may process records once more: it is fenced, or takes the fence back."""
        self.happened["new owner"] += 1
        self.old_owners = [*self.old_owners[-1:], self.world.driver]
        self.world.driver = self.world.started()
        if self.random.random() < 0.5:
            self.happened["an old owner continues"] += 1
            self.world.feed(self.random.choice(self.old_owners))
        self.world.settle()

    def _judge(self) -> None:
        state = queue_judge.check(self.world)
        rules = self.world.driver.machine.rules
        queue_judge.check_nothing_idle(state, rules, self.world.now_ms)
        clean = judge.clean_fold(self.player.records, self.world.rules, partition=QUEUE)
        judge.check_equal(self.world.server, clean, QUEUE)

    def _drain(self) -> None:
        """End all sessions; then let three clients take everything and acknowledge each command once."""
        world = self.world
        for client in "abc":
            self.player.clock += 1
            clock = self.player.clock
            for each in FILTERS:
                world.leave(client, each, session=clock, source_offset=clock)
            world.join(
                client, "queue/#", session=self.player.clock, source_offset=self.player.clock
            )
        for _ in range(STEPS_TO_DRAIN_MAX):
            new = world.take()
            world.sent(new)
            for command in new:
                world.ack(command.client_id, command.message_id, topic=command.topic)
            if not new:
                if not self._left():
                    return
                world.at(world.now_ms + 2_000)
        raise AssertionError(f"stuck with {self._left()}")

    def _left(self) -> list[str]:
        windows = queue_judge.State(self.world.server, {}).windows
        return [topic for topic, window in windows.items() if window.length or window.leases]


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_after_any_faults_every_message_is_acknowledged_or_dead(
    first: int,
) -> None:
    for seed in range(first, first + CHUNK):
        # Shown if it fails.
        print(f"seed {seed}")
        simulated = Simulated(seed)
        simulated.play()
        server = simulated.world.server
        assert not any(server.values.get(keys.message_index(f"queue/{x}")) for x in "abc")


def test_every_fault_occurs_in_a_few_seeds() -> None:
    happened: Counter[str] = Counter()
    for seed in range(CHUNK):
        simulated = Simulated(seed)
        simulated.play()
        happened.update(simulated.happened)
    assert happened.keys() >= {
        "down: load", "down: read", "down: before", "down: after", "new owner", "an old owner continues",
    }  # fmt: skip
