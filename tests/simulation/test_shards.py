"""Seeded worlds of the messages agent on a Redis Cluster whose shards fail over without their last writes."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.messages.machine import MessagesMachine
from tests.simulation import judge
from tests.simulation.points import Pause
from tests.simulation.publisher import RULES, Publisher
from tests.simulation.shards import LEFT, SHARDS, ShardedStore, Shards
from tests.support.partition import PARTITION, Log

STEPS, STEPS_TO_SETTLE_MAX = 1_500, 20_000
SEEDS, CHUNK = 40, 10
PLACE = PARTITION.topic, PARTITION.number


class World:
    """One owner at a time, which may crash. The cluster replicates and fails over at random."""

    def __init__(self, seed: int, *, confirms: bool = True) -> None:
        self.random = Random(seed)
        self.now_ms = 1_000_000
        self.log = Log(lambda: self.now_ms, run_records_max=self.random.choice([1, 3, 100]))
        self.shards, self._confirms = Shards(), confirms
        self.happened: Counter[str] = Counter()
        self._publisher = Publisher(self.random, self.log)
        self._start()
        self._actions = {
            self._publish: 10.0, self._step: 60.0, self._replicate: self.random.choice([2, 10, 40]),
            self._pass_time: 2.0, self._fail_over: self.random.choice([0.5, 2]), self._crash: 0.5,
        }  # fmt: skip

    def play(self) -> None:
        for _ in range(STEPS):
            (action,) = self.random.choices(list(self._actions), list(self._actions.values()))
            action()
        self._settle()
        self._judge()

    def _start(self) -> None:
        store = ShardedStore(self.shards, confirms=self._confirms)
        self.driver = PartitionDriver(
            PARTITION, MessagesMachine(), store, self.log, RULES, self._notice
        )
        self._life = self._live()

    def _notice(self, notice: str) -> None:
        for reason in ("no replica acknowledges", "has failed over"):
            self.happened[reason] += reason in notice

    async def _live(self) -> None:
        driver = self.driver
        await driver.start()
        while True:
            records = self.log.records[PLACE]
            run = [x for x in records if x.offset >= driver.next_offset]
            await driver.process(run[: self.random.choice([1, 5, 20])])
            if self.random.random() < 0.5:
                await driver.maintain()
            tick = driver.tick(self.now_ms)
            if tick is not None:
                await self.log.produce([tick])
            await Pause()

    def _settle(self) -> None:
        for _ in range(STEPS_TO_SETTLE_MAX):
            self._step()
            for shard in range(SHARDS):
                self.shards.replicate(shard)
            fence = judge.stored_fence(self.shards.server)
            end = self.log.records[PLACE][-1].offset
            if fence is not None and fence.offset == end and LEFT not in self.shards.values:
                return
        raise AssertionError("stuck")

    def _judge(self) -> None:
        """Compare with a clean fold. A user command may run twice on a cluster, so counters do not count."""
        expected = judge.clean_fold(self.log.records[PLACE], RULES)
        for server in (self.shards.server, expected):
            for key in [key for key in server.values if key.startswith("seen:")]:
                server.remove(key)
            # The model moves no expiries between shards.
            server.expires_at.clear()
        judge.check_equal(self.shards.server, expected)
        judge.check_conservation(self.shards.server)

    def _publish(self) -> None:
        self._publisher.append()

    def _step(self) -> None:
        self._life.send(None)

    def _replicate(self) -> None:
        self.shards.replicate(self.random.randrange(SHARDS))

    def _pass_time(self) -> None:
        self.now_ms += self.random.choice([0, 1, 1_000, 30_000, 60_001])

    def _fail_over(self) -> None:
        shard = self.random.randrange(SHARDS)
        self.happened["failover with lost writes"] += self.shards.lags(shard)
        self.shards.fail_over(shard)

    def _crash(self) -> None:
        self.happened["crash"] += 1
        self._life.close()
        self._start()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_after_any_failovers_every_message_is_stored_once(first: int) -> None:
    happened: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        print(f"seed {seed}")
        world = World(seed)
        world.play()
        happened += world.happened
    assert happened.keys() == {
        "failover with lost writes", "crash", "no replica acknowledges", "has failed over",
    }  # fmt: skip


def test_the_worlds_find_a_store_that_waits_for_no_replica() -> None:
    lost = 0
    for seed in range(CHUNK):
        try:
            World(seed, confirms=False).play()
        except AssertionError:
            lost += 1
    assert lost > CHUNK // 3
