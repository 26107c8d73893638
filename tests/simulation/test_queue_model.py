"""What a queue holds and hands out is what a short model says: nothing is lost, nothing comes twice without need, nothing
overtakes. Without brokers that deliver themselves, and under rules that do not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings

from millpond.agents.delivery import window
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
    """Stored messages by topic, in log order, each with its end; who had them; where in the log each was appended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stored: dict[str, dict[str, int | None]] = defaultdict(dict)
        self.place: dict[str, int] = {}
        self.holders: dict[str, set[str]] = defaultdict(set)
        self.may_be_acked: set[str] = set()  # the machine knows whether it was
        self.dead: set[str] = set()
        self.newest_handed: dict[str, int] = defaultdict(lambda: -1)
        self.handed: set[str] = set()
        # What a client has over its connection, as its broker says, which does not drop copies by itself.
        self.has: set[tuple[str, str]] = set()
        self.reported: list[Sent] = []
        self.now_ms = 0

    def fold(self, at: int, timestamp: int, event: object) -> None:
        self.now_ms = max(self.now_ms, timestamp)
        match event:
            case MessagePublished(message_id=name) if name not in self.place:
                self.place[name] = at
                if event.qos or self.name == "latest":
                    self.append(event.topic, name, event.expires_at)
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
                self.handed.discard(name)
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

    def append(self, topic: str, name: str, own_end: int | None) -> None:
        end = self.now_ms + EXPIRY_MS if self.name == "expiring" else None
        self.stored[topic][name] = min((x for x in (end, own_end) if x is not None), default=None)
        while len(self.stored[topic]) > MAX_LENGTH.get(self.name, 1_000):
            oldest = next(iter(self.stored[topic]))
            del self.stored[topic][oldest]
            if self.name == "dead on overflow":
                self.dead.add(oldest)

    def handed_out(self, command: Deliver) -> None:
        name, topic = command.message_id, command.topic
        assert command.attempt <= 2, f"{name} was delivered more often than may be"
        if name not in self.handed:
            assert self.place[name] > self.newest_handed[topic], f"{name} was overtaken"
            self.newest_handed[topic] = self.place[name]
        copy = command.client_id, name
        assert copy not in self.has, f"{copy} was written twice to one connection"
        self.handed.add(name)
        self.holders[name].add(command.client_id)

    def compare(self, state: State) -> None:
        """Nothing is gone that was not acknowledged, did not die, expire or overflow; and all that did is."""
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
                    assert name in self.may_be_acked or name in state.dead, f"{name} is lost"
                    del entries[name]
            assert index == list(entries), f"{topic} holds {index}, but should {list(entries)}"
        self.dead = set(state.dead)


@pytest.mark.parametrize("name", TABLES)
@given(log=steps)
@settings(deadline=None)
def test_the_store_holds_and_the_agent_hands_out_what_the_model_says(
    name: str, log: list[Step]
) -> None:
    follow(name, log)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_the_same_of_long_scripts(first: int) -> None:
    for seed in range(first, first + CHUNK):
        print(f"seed {seed}")  # shown if it fails
        random = Random(seed)
        follow(random.choice(list(TABLES)), a_script(random))


def follow(name: str, log: list[Step]) -> None:
    player, model = Player(*TABLES[name]), Model(name)
    folded = commanded = 0
    for step in time_apart(log):
        player.play(step)
        for record in player.records[folded:]:
            model.fold(record.offset, record.timestamp, codec.decode(record.value))
        for command in player.commands[commanded:]:
            model.handed_out(command)
        folded, commanded = len(player.records), len(player.commands)
        model.compare(queue_judge.check(player.world))


def time_apart(log: list[Step]) -> Iterator[Step]:
    """What dies of time is seen before what happens then."""
    for step in log:
        if step.kind not in NOT_MODELLED:
            yield Step("pass time", 0, 0, step.later_ms)
            yield step._replace(later_ms=0)
