"""A pubsub partition whose store fails, whose owners crash and are succeeded, and whose records come twice."""

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
from tests.simulation.pubsub_world import PUBSUB, RULES, Pubsub, Step, fold, steps
from tests.support.partition import Driver, run

STEPS = 120
TRIES_MAX = 1_000


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


class Troubled(Pubsub):
    """Every step may meet a fault; none of them may be seen in what the store holds in the end."""

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
        """Try until it is in the store; who was killed is succeeded, and who was released may still be at it."""
        for _ in range(TRIES_MAX):
            try:
                run(self.driver.process(self._handed_over()))
                run(self.driver.settle())
                break
            except Killed:
                self.driver = self.started()
        else:
            raise AssertionError("it never comes to an end")
        if self.random.random() < 0.5:
            self.commit(self.driver)

    def _handed_over(self) -> list[Record]:
        """What is to be read, and some of what was."""
        log, first = self.log.records[PUBSUB.topic, 0], self.driver.next_offset
        again = self.random.choice([0, 0, 1, 5])
        return [record for record in log if record.offset >= first - again]

    def started(self, rules: Rules | None = None) -> Driver:
        """A new owner, after as many as it takes."""
        while True:
            driver = self.owner(rules)
            try:
                run(driver.start())
            except (Killed, StoreDown):
                continue
            return driver

    def backoff(self, happens: Sequence[Step]) -> None:
        """All of this happens, and faults with it."""
        for step in happens:
            self.faults = self._chosen
            match self.random.random():
                case x if x < 0.03:
                    self.happened["taken over"] += 1
                    self.old.append(self.driver)
                    self.driver = self.started()
                case x if x < 0.05 and self.old:
                    self._stray(self.old.pop())
                case x if x < 0.06:
                    self._empty()
            self.live([step])
        self.faults = 0.0

    def _stray(self, driver: Driver) -> None:
        """An old owner that does not know goes on with what it last had; then the new one finds its fence broken."""
        self.happened["stray owner"] += 1
        try:
            run(driver.process(self.unread(driver)[:3]))
            run(driver.settle())
        except Killed:
            pass

    def _empty(self) -> None:
        """The store loses everything, and is built anew from the log: nobody is served again what had been sent."""
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
        assert after == before, "somebody was served again"


def is_command(sent: OutgoingRecord) -> bool:
    """Whether it is for a bridge."""
    return sent.topic == "mqtt.deliveries"


def judge_seed(seed: int) -> Counter[str]:
    """One run of one seed: safety while there are faults, then everything comes right."""
    world = Troubled(seed)
    world.backoff(steps(world.random, STEPS))
    world.settle()
    held = list(world.log.records[PUBSUB.topic, 0])
    run(world.driver.maintain())
    expected, _ = fold(held, world.rules, [7])
    judge.check_equal(world.server, expected)
    _liveness(world)
    return world.happened


def _liveness(world: Troubled) -> None:
    """Everybody comes and acknowledges: in the end nobody has anything left to read."""
    for number, name in enumerate(world.clients):
        world.live([Step("resume", number), Step("join", number, 2)])
        assert world.clients[name].online
    _read_all(world)
    world.now_ms += 4_000_000  # what the bridge has forgotten comes again
    _read_all(world)
    logs = judge.logs(world.server)
    for key, reader in judge.readers(world.server).items():
        subscriber, topic = split_reader(key)
        if subscriber in world.clients:
            assert not reader.leases, key
            assert not reader.returned, key
            assert not (reader.waits and topic in logs and logs[topic].length), key


def _read_all(world: Troubled) -> None:
    for _ in range(TRIES_MAX):
        world.settle()
        if not (world.under_way or world.in_hand):
            return
        for _ in range(len(world.under_way)):
            world.live([Step("sent", 0, 2)])
        for _ in range(len(world.in_hand)):
            world.live([Step("ack")])
        world.now_ms += 1_000
    raise AssertionError("somebody never ends reading")
