"""Worlds of consumers that are slow, frozen for a while, late, or away: their broker keeps what a session has in hand, and
writes it again over a new connection as long as it is valid.

What must be true of all of them is said in `Consumers.judge` and `Consumers.live`.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any, Literal

from millpond.pipeline.stores.memory.server import Moment
from millpond.schemas.commands import Deliver
from millpond.schemas.errors import StoreDown
from millpond.schemas.events import MembersActive
from millpond.schemas.keys import Partition
from tests.simulation import judge, pubsub_judge, queue_judge
from tests.support import given
from tests.support.delivery import AT, Delivering

Kind = Literal["slow", "frozen", "late", "away"]
World = Literal["queue", "group", "single"]
ACK_MS, INFLIGHT, MESSAGES, STEPS = 2_000, 3, 12, 120
STEPS_TO_REST_MAX = 2_000
STEP_MS = (50, 100, 100, 400, 1_000)
SETTINGS: dict[str, Any] = {
    "ack_timeout_s": ACK_MS // 1000,
    "max_inflight": INFLIGHT,
    "max_deliveries": 3,
}


class Consumer:
    """One client: what it has over its connection, and how it works."""

    def __init__(self, client_id: str, kind: Kind, random: Random) -> None:
        self.client_id, self.kind, self.random = client_id, kind, random
        self.session, self.connection, self.connected = 1, 1, True
        self.copies: list[Deliver] = []
        self.got: Counter[tuple[int, str]] = Counter()  # connection, message
        self.ready_at = 0

    def acknowledges(self, now_ms: int, *, resting: bool) -> list[Deliver]:
        """The copies that it acknowledges now, in order."""
        if not (self.connected and self.copies) or now_ms < self.ready_at:
            return []
        if resting or self.kind in ("slow", "away"):
            self.ready_at = now_ms + self.random.choice([10, 500, ACK_MS - 1_100])
            return [self.copies.pop(0)]
        if self.random.random() < 0.8:
            return []
        # Frozen for a while, then a few; late ones come all at once.
        self.ready_at = now_ms + self.random.choice([0, ACK_MS, 3 * ACK_MS])
        count = len(self.copies) if self.kind == "late" else 1
        done, self.copies = self.copies[:count], self.copies[count:]
        return done


class Consumers:
    """One run of one seed."""

    def __init__(self, seed: int, which: World, kinds: tuple[Kind, ...]) -> None:
        self.random = Random(seed)
        agent: Literal["queue", "pubsub"] = "queue" if which == "queue" else "pubsub"
        rule = given.queue(**SETTINGS) if agent == "queue" else given.pubsub(**SETTINGS)
        self.which, self.topic = which, f"{agent}/a"
        self.topic_filter = f"$share/g/{self.topic}" if which == "group" else self.topic
        self.world = Delivering(agent, rule)
        self.consumers = [
            Consumer(f"c{number}", kind, self.random) for number, kind in enumerate(kinds)
        ]
        self.by_id = {each.client_id: each for each in self.consumers}
        self.acked: set[tuple[str, str]] = set()  # client, message
        self.unreported: list[Deliver] = []
        self.leases: set[str] = set()
        self.published = 0
        self.failing = self.random.choice([0, 0, 0.05])
        self.restarting = self.random.choice([0, 0.05])

    def live(self) -> None:
        """Trouble, then everybody works: all is done in the end, and no dead letter was acknowledged."""
        self.world.server.fault = self._fault
        for each in self.consumers:
            self._join(each)
        for _ in range(STEPS):
            self._step(resting=False)
        self.world.server.fault = lambda _moment, _partition: None
        for each in self.consumers:
            if not each.connected:
                self._connect(each)
        for _ in range(STEPS_TO_REST_MAX):
            if self._at_rest():
                break
            self._step(resting=True)
        else:
            raise AssertionError(f"stuck: {self.world.table('windows')}")
        dead = {name for name in self.world.table("dead") if self._acked(name)}
        assert not dead, f"{dead} are dead letters, and were acknowledged by who had them"
        clean = judge.clean_fold(
            self.world.log.records[self.world.partition.topic, 0], self.world.rules,
            partition=self.world.partition,
        )  # fmt: skip
        judge.check_equal(self.world.server, clean, self.world.partition)

    def _acked(self, name: str) -> bool:
        """True if the message was acknowledged for everybody whom it was for."""
        clients = {client_id for client_id, acked in self.acked if acked == name}
        return len(clients) == len(self.consumers) if self.which == "single" else bool(clients)

    def _at_rest(self) -> bool:
        if any(each.copies for each in self.consumers) or self.unreported:
            return False
        left = set(self._names()) - set(self.world.table("dead"))
        return all(self._acked(name) for name in left)

    def _names(self) -> list[str]:
        return [f"m{number}" for number in range(self.published)]

    def _fault(self, moment: Moment, partition: Partition) -> None:
        if self.random.random() < self.failing:
            raise StoreDown(f"down at {moment}")

    # -- what happens

    def _step(self, *, resting: bool) -> None:
        world = self.world
        world.at(world.now_ms + self.random.choice(STEP_MS))
        if self.published < MESSAGES and self.random.random() < 0.3:
            world.publish(f"m{self.published}", topic=self.topic)
            self.published += 1
        if self.random.random() < self.restarting:
            world.restart()
        for each in self.consumers:
            if each.kind == "away" and not resting and self.random.random() < 0.06:
                self._come_or_go(each)
        self._hand_over()
        for each in self.consumers:
            for copy in each.acknowledges(world.now_ms, resting=resting):
                self.acked.add((each.client_id, copy.message_id))
                world.ack(each.client_id, copy.message_id, topic=copy.topic)
        if self.random.random() < 0.05 and not resting:
            self._say_active()
        self._hand_over()
        fault, world.server.fault = world.server.fault, lambda _moment, _partition: None
        self.judge()
        world.server.fault = fault

    def _say_active(self) -> None:
        """A slow one works on copies of another partition, too."""
        slow = tuple(each.client_id for each in self.consumers if each.kind == "slow")
        agent = self.world.partition.agent
        self.world.tell(MembersActive(**AT, agent=agent, client_ids=slow))

    def _hand_over(self) -> None:
        """The bridge carries out what there is, and says so, perhaps later."""
        for command in self.world.take():
            if command.lease not in self.leases:  # a new owner may write what the last one did
                self.leases.add(command.lease)
                self.unreported.append(command)
        if self.random.random() < 0.3:
            return
        commands, self.unreported = self.unreported, []
        for command in commands:
            consumer = self.by_id[command.client_id]
            assert command.valid_until is not None
            if not consumer.connected:
                self.world.fail([command], "no_client")
            elif command.valid_until < self.world.now_ms:
                self.world.fail([command], "stale")
            else:
                consumer.copies.append(command)
                consumer.got[consumer.connection, command.message_id] += 1
                self.world.sent([command])

    def _come_or_go(self, consumer: Consumer) -> None:
        if not consumer.connected:
            self._connect(consumer)
            return
        ended = self.random.random() < 0.3
        reason: Literal["session_ended", "disconnected"] = (
            "session_ended" if ended else "disconnected"
        )
        session = consumer.session
        consumer.connected = False
        if ended:
            consumer.session, consumer.copies = session + 1, []
        self.world.leave(consumer.client_id, self.topic_filter, reason, session=session)

    def _connect(self, consumer: Consumer) -> None:
        """What is still valid is written again, over the new connection."""
        consumer.connected, consumer.connection = True, consumer.connection + 1
        now_ms = self.world.now_ms
        consumer.copies = [each for each in consumer.copies if (each.valid_until or 0) > now_ms]
        consumer.got.update((consumer.connection, each.message_id) for each in consumer.copies)
        self._join(consumer)

    def _join(self, consumer: Consumer) -> None:
        self.world.join(consumer.client_id, self.topic_filter, session=consumer.session)

    # -- what must be true

    def judge(self) -> None:
        """After every step: a connection got no message twice, and never more than it may have."""
        world = self.world
        for each in self.consumers:
            twice = [copy for copy, count in each.got.items() if count > 1]
            assert not twice, f"{each.client_id}: written twice to one connection: {twice}"
            if each.kind != "away":
                assert len(each.copies) <= INFLIGHT, f"{each.client_id} has {len(each.copies)}"
            if each.kind == "slow" and self.which == "single":
                assert each.client_id not in str(world.table("dead")), "dead, and at work on it"
        if self.which == "queue":
            state = queue_judge.check(world)
            queue_judge.check_bounds(state, world.rules)
            queue_judge.check_nothing_idle(state, world.rules, world.now_ms)
        else:
            pubsub_judge.check(world.server, world.driver)
            pubsub_judge.check_nothing_idle(world.server, world.driver, world.now_ms)
        if all(each.kind == "slow" for each in self.consumers):
            assert not world.table("dead")
            if self.which != "single":
                copies = Counter(name for each in self.consumers for _, name in each.got)
                assert not [name for name, count in copies.items() if count > 1], copies
