"""A pubsub partition under faults: the store fails, owners crash or go on as old owners, records arrive twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

from millpond.agents.ports import OutgoingRecord, Record
from millpond.agents.pubsub.state import split_reader
from millpond.pipeline.stores.memory.server import Moment
from millpond.schemas.errors import StoreDown
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from tests.simulation import pubsub_judge as judge
from tests.simulation.judge import check_equal
from tests.simulation.pubsub_world import PUBSUB, RULES, Pubsub, Step, fold, steps
from tests.support.partition import Driver, run

STEPS = 120
TRIES_MAX = 1_000


class Killed(BaseException):
    """The worker's process is killed."""


class FaultyPubsub(Pubsub):
    """Injects faults into the steps of a partition. The store's content must not show them.

    - `faults`: the probability of a fault at each moment of the store.
    - `old`: earlier owners that do not know that they are fenced.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.faults = 0.0
        self.happened: Counter[str] = Counter()
        super().__init__(self.random.randrange(len(RULES)), batched=True)
        self.old: list[Driver] = []
        self.server.fault = self._fault
        self._chosen = self.random.choice([0.0, 0.02, 0.1, 0.3])

    def _fault(self, moment: Moment, partition: Partition) -> None:
        if self.random.random() >= self.faults:
            return
        if self.random.random() < 0.5:
            self.happened[f"killed: {moment}"] += 1
            raise Killed
        self.happened[f"down: {moment}"] += 1
        raise StoreDown(moment)

    def feed(self, driver: Driver) -> None:
        """Hand over the records until the store has applied them. A new owner follows one that was killed."""
        for _ in range(TRIES_MAX):
            try:
                run(self.driver.process(self._offered()))
                run(self.driver.settle())
                break
            except Killed:
                self.driver = self.started()
        else:
            raise AssertionError(f"not applied after {TRIES_MAX} attempts")
        if self.random.random() < 0.5:
            self.commit(self.driver)

    def _offered(self) -> list[Record]:
        """Return the records to read next, and some of those before."""
        log, first = self.log.records[PUBSUB.topic, 0], self.driver.next_offset
        again = self.random.choice([0, 0, 1, 5])
        return [record for record in log if record.offset >= first - again]

    def started(self, rules: Rules | None = None) -> Driver:
        """Return a new owner that has started, after any number that failed to."""
        while True:
            driver = self.owner(rules)
            try:
                run(driver.start())
            except (Killed, StoreDown):
                continue
            return driver

    def play_with_faults(self, script: Sequence[Step]) -> None:
        """Play the steps with faults."""
        for step in script:
            self.faults = self._chosen
            match self.random.random():
                case x if x < 0.03:
                    self.happened["taken over"] += 1
                    self.old.append(self.driver)
                    self.driver = self.started()
                case x if x < 0.05 and self.old:
                    self._run_old_owner(self.old.pop())
                case x if x < 0.06:
                    self._empty_store()
            self.play([step])
        self.faults = 0.0

    def _run_old_owner(self, driver: Driver) -> None:
        """Let an old owner process some records. It may take the fence back, and then the new owner is fenced."""
        self.happened["stray owner"] += 1
        try:
            run(driver.process(self.unread(driver)[:3]))
            run(driver.settle())
        except Killed:
            pass

    def _empty_store(self) -> None:
        """Empty the store. A new owner rebuilds it from the log, and must not produce any command again."""
        self.happened["emptied"] += 1
        self.fold()
        self.commit(self.driver)
        before = [sent for sent in self.log.produced if is_command(sent)]
        self.server.values.clear()
        self.server.expires_at.clear()
        self.driver = self.started()
        self.faults = 0.0
        self.fold()
        after = [sent for sent in self.log.produced if is_command(sent)]
        assert after == before, "a command was produced again"


def is_command(sent: OutgoingRecord) -> bool:
    """True if the record is a command for a bridge."""
    return sent.topic == "mqtt.deliveries"


def judge_seed(seed: int) -> Counter[str]:
    """Run one seed: check safety while there are faults, and liveness after them."""
    world = FaultyPubsub(seed)
    world.play_with_faults(steps(world.random, STEPS))
    world.settle()
    records = list(world.log.records[PUBSUB.topic, 0])
    run(world.driver.maintain())
    expected, _ = fold(records, world.rules, [7])
    check_equal(world.server, expected, PUBSUB)
    _check_liveness(world)
    return world.happened


def _check_liveness(world: FaultyPubsub) -> None:
    """Let every client connect, read and acknowledge. In the end no subscriber has anything left."""
    for number, name in enumerate(world.clients):
        world.play([Step("resume", number), Step("join", number, 2)])
        assert world.clients[name].online
    _read_all(world)
    # Leases of commands that the bridge has lost time out, and their messages are delivered again.
    world.now_ms += 4_000_000
    _read_all(world)
    logs = judge.logs(world.server)
    for key, reader in judge.readers(world.server).items():
        subscriber, topic = split_reader(key)
        if subscriber in world.clients:
            assert not reader.leases, key
            assert not reader.returned, key
            assert not (reader.waits and topic in logs and logs[topic].length), key


def _read_all(world: FaultyPubsub) -> None:
    for _ in range(TRIES_MAX):
        world.settle()
        if not (world.unreported or world.unacknowledged):
            return
        for _ in range(len(world.unreported)):
            world.play([Step("sent", 0, 2)])
        for _ in range(len(world.unacknowledged)):
            world.play([Step("ack")])
        world.now_ms += 1_000
    raise AssertionError(f"subscribers still read after {TRIES_MAX} rounds")
