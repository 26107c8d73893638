"""A queue against a short model: nothing is lost, nothing is delivered too often, first deliveries are in log order.

The model knows no brokers that deliver by themselves, no early acknowledgements, and no change of rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings

from millpond.agents.delivery import window
from millpond.agents.queue import machine
from millpond.agents.topics import dedup
from millpond.schemas import codec
from millpond.schemas.commands import Deliver
from millpond.schemas.events import (
    DeliveriesSent,
    DeliveryFailed,
    MessageAcked,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    Sent,
    SubscriberJoined,
    SubscriberLeft,
    Tick,
)
from tests.simulation import queue_judge
from tests.simulation.player import Player, Step
from tests.simulation.queue_judge import State
from tests.simulation.small_limits import small_limits
from tests.simulation.test_queue_properties import CHUNK, EXPIRY_MS, SEEDS, TABLES, a_script, steps

NOT_MODELLED = ("broker joins", "ack early", "other rules")
MAX_LENGTH = {"dropping": 2, "dead on overflow": 2, "latest": 1}


@pytest.fixture(autouse=True, scope="module")
def _small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small_limits(patch)
        patch.setattr(dedup, "DEDUP_WINDOW_MS", 1_000_000)
        patch.setattr(window, "HOLDERS_MAX", 16)
        patch.setattr("millpond.agents.delivery.dead_messages.DEAD_LETTER_RETENTION_MS", 1_000_000)
        yield


class Model:
    """The model.

    - `stored`: topic → message id → end of its life in ms, or None; in log order.
    - `place`: message id → offset at which it was stored last.
    - `holders`: message id → clients that it was delivered to.
    - `may_be_passed_on`: message ids of QoS 0 that were published in this step: a member may have taken them at once.
    - `may_be_acked`: message ids that an acknowledgement or report may have deleted. The machine alone decides that.
    - `newest_delivered`: topic → highest place of a first delivery.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stored: dict[str, dict[str, int | None]] = defaultdict(dict)
        self.place: dict[str, int] = {}
        self.holders: dict[str, set[str]] = defaultdict(set)
        self.may_be_acked: set[str] = set()
        self.may_be_passed_on: set[str] = set()
        self.dead: set[str] = set()
        self.newest_delivered: dict[str, int] = defaultdict(lambda: -1)
        self.delivered: set[str] = set()
        # What a client has over its connection, as its broker says, which does not drop copies by itself.
        self.has: set[tuple[str, str]] = set()
        self.reported: list[Sent] = []
        self.now_ms = 0

    def fold(self, at: int, timestamp: int, event: object) -> None:
        self.now_ms = max(self.now_ms, timestamp)
        match event:
            case MessagePublished(message_id=name) if name not in self.place:
                self.place[name] = at
                self.published(event)
            case MessageAcked(message_id=name, topic=topic, client_id=client_id):
                self.has.discard((client_id, name.removeprefix("x")))
                if client_id in self.holders[name]:
                    self.stored[topic].pop(name, None)
                    self.dead.discard(name)
                elif client_id in self.holders[name.removeprefix("x")]:
                    self.dead.discard(name.removeprefix("x"))  # if that is a name of its copy
                self.may_be_acked.add(name.removeprefix("x"))
            case DeliveriesSent(sent=sent):
                self.may_be_acked |= {each.message_id for each in sent if each.qos == 0}
                self.reported += sent
            case DeliveryFailed(client_id=client_id, message_id=name):
                self.has.discard((client_id, name))
            case SubscriberJoined(client_id=client_id) | SubscriberLeft(client_id=client_id):
                self.has = {each for each in self.has if each[0] != client_id}
            case OperatorRequeue(message_id=name, topic=topic) if name in self.dead:
                self.dead.remove(name)
                self.delivered.discard(name)
                self.holders[name].clear()
                self.has = {each for each in self.has if each[1] != name}
                self.place[name] = at
                self.append(topic, name, None)
            case OperatorDrop(message_id=name):
                self.dead.discard(name)
            case Tick():
                for topic, entries in self.stored.items():
                    self.stored[topic] = {
                        each: end for each, end in entries.items() if end is None or end > self.now_ms
                    }  # fmt: skip

    def published(self, event: MessagePublished) -> None:
        topic, name = event.topic, event.message_id
        if event.qos or self.name == "latest":
            self.append(topic, name, event.expires_at)
        elif len(self.stored[topic]) < self.waiting_max():
            self.may_be_passed_on.add(name)
            self.append(topic, name, self.now_ms + machine.QOS_0_WAIT_MS)

    def waiting_max(self) -> int:
        """How many messages a topic holds at most for one of QoS 0 to wait."""
        return min(MAX_LENGTH.get(self.name, 1_000), machine.QOS_0_WAITING_MAX)

    def append(self, topic: str, name: str, own_end: int | None) -> None:
        end = self.now_ms + EXPIRY_MS if self.name == "expiring" else None
        self.stored[topic][name] = min((x for x in (end, own_end) if x is not None), default=None)
        while len(self.stored[topic]) > MAX_LENGTH.get(self.name, 1_000):
            oldest = next(iter(self.stored[topic]))
            del self.stored[topic][oldest]
            if self.name == "dead on overflow":
                self.dead.add(oldest)

    def deliver(self, command: Deliver) -> None:
        name, topic = command.message_id, command.topic
        assert command.attempt <= 2, f"{name} was delivered too often"
        if name not in self.delivered:
            assert self.place[name] > self.newest_delivered[topic], f"{name} was overtaken"
            self.newest_delivered[topic] = self.place[name]
        copy = command.client_id, name
        assert copy not in self.has, f"{copy} was written twice to one connection"
        self.delivered.add(name)
        self.holders[name].add(command.client_id)

    def compare(self, state: State) -> None:
        """Check that the store has exactly the messages that were not acknowledged, dead, expired or dropped."""
        for held in state.windows.values():
            for each in self.reported:
                lease = held.leases.get(each.message_id)
                if (
                    lease is not None
                    and f"queue/0/{lease.number}" == each.lease
                    and lease.alias is None
                ):
                    self.has.add((each.client_id, each.message_id))
        self.reported = []
        assert self.dead <= state.dead.keys()
        for topic in sorted(self.stored):
            index, entries = state.index(topic), self.stored[topic]
            for name in list(entries):
                if name not in index:
                    over = name in self.may_be_acked or name in self.may_be_passed_on
                    assert over or name in state.dead, f"{name} is lost"
                    del entries[name]
            assert index == list(entries), f"{topic} holds {index}, not {list(entries)}"
        self.dead = set(state.dead)
        self.may_be_passed_on = set()


@pytest.mark.parametrize("name", TABLES)
@given(log=steps)
@settings(deadline=None)
def test_stored_and_delivered_messages_are_those_of_the_model(name: str, log: list[Step]) -> None:
    follow(name, log)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_long_scripts_agree_with_the_model(first: int) -> None:
    for seed in range(first, first + CHUNK):
        # Shown if it fails.
        print(f"seed {seed}")
        random = Random(seed)
        follow(random.choice(list(TABLES)), a_script(random))


def follow(name: str, log: list[Step]) -> None:
    player, model = Player(*TABLES[name]), Model(name)
    folded = commanded = 0
    for step in split_time(log):
        player.play(step)
        for record in player.records[folded:]:
            model.fold(record.offset, record.timestamp, codec.decode(record.value))
        for command in player.commands[commanded:]:
            model.deliver(command)
        folded, commanded = len(player.records), len(player.commands)
        model.compare(queue_judge.check(player.world))


def split_time(log: list[Step]) -> Iterator[Step]:
    """Let time pass in a step of its own, so that messages expire before the next event."""
    for step in log:
        if step.kind not in NOT_MODELLED:
            yield Step("pass time", 0, 0, step.later_ms)
            yield step._replace(later_ms=0)
