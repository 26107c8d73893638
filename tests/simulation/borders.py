"""The same log of a delivery partition, folded in many ways: batch borders, owners and memory never decide.

A player leaves a log: what its world and its bridge do next follows from what the machine has handed out. The log is then
fixed, and folded again: with other batches, with new owners and rivals at any record, with transactions that are applied
only when the next batch waits for them, with a store that fails, and with a memory that forgets or reads ahead otherwise
in every batch. What the store holds in the end, and what was handed out on the way, must be the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from random import Random
from typing import Any, Final, NamedTuple

import pytest

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.effects import DeliverMessage, Output, Refusal
from millpond.agents.ports import LogBounds, OutgoingRecord, Record, Transaction
from millpond.agents.registry import MACHINES
from millpond.pipeline.stores.memory.server import MemoryServer, Moment
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.schemas import codec, keys
from millpond.schemas.errors import BrokenInvariant, StoreDown
from millpond.schemas.events import (
    AgentName,
    DeliveriesSent,
    DeliveryFailed,
    Event,
    MessagePublished,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
    RulesChanged,
    Sent,
    SubscriberJoined,
    SubscriberLeft,
)
from millpond.schemas.keys import Partition
from millpond.schemas.leases import lease_name
from millpond.schemas.rules import Rules
from tests.simulation import judge
from tests.support import given
from tests.support.delivery import AT
from tests.support.partition import Driver, run

AGENTS: Final[tuple[AgentName, ...]] = ("queue", "pubsub")
TOPICS: Final = ("t/0", "t/1", "t/2")
CLIENTS: Final = ("a", "b", "c", "d")
EXACT: Final = ("t/0", "t/0", "t/1", "$share/g/t/0", "$share/g/t/0", "$share/h/t/1", "t/2")
WILD: Final = ("t/+", "#", "t/#", "$share/g/t/+", "$share/g/t/+", "$share/h/#")
ACK_MS, EXPIRY_MS, SEND_MS = 2_000, 5_000, 7_000
# How far the clock of the clients' log is ahead of this one.
SKEWS_MS: Final = (-4_000, -1, 0, 0, 0, 1, 4_000)
WAITS_MS: Final = (
    1, 500, 999, 1_000, 1_001, ACK_MS - 1, ACK_MS, ACK_MS + 1, EXPIRY_MS, SEND_MS, 20_000, 61_000,
)  # fmt: skip

DELIVERY: Final = "millpond.agents.delivery"
TOPIC_STATES: Final = "millpond.agents.topics"
# Limits of what is done at once. They decide, so all folds of a log have the same.
DECIDING: Final[dict[str, Sequence[int]]] = {
    f"{TOPIC_STATES}.due_times.SWEEP_DUE_MAX": (1, 2, 4, 32),
    f"{TOPIC_STATES}.storage.SWEEP_ENTRIES_MAX": (2, 3, 8),
    f"{DELIVERY}.dead_messages.DEAD_LETTER_RETENTION_MS": (20_000,),
    f"{DELIVERY}.window.HOLDERS_MAX": (2, 16),
    f"{DELIVERY}.rounds.ROUNDS_MAX": (1, 2, 3, 16),
    f"{DELIVERY}.rounds.FILTERS_MAX": (1, 2, 16),
    f"{DELIVERY}.leasing.UNCONFIRMED_MAX": (3, 5, 8, 16, 1_000),
    f"{DELIVERY}.leasing.SEND_TIMEOUT_MS": (SEND_MS,),
    f"{DELIVERY}.membership.FORGET_MS": (3_000, 20_000),
    f"{DELIVERY}.leasing.COMMAND_VALID_FOR_S": (1, 3),
    "millpond.agents.queue.machine.OVERFLOW_MAX": (1, 2, 8),
    # With short ones nothing is repeated: a repeat may then be in the batch in which its message goes.
    f"{TOPIC_STATES}.dedup.DEDUP_WINDOW_MS": (1_000_000, 1_000_000, 1_500),
}
PAGE_MAX: Final = (1, 2, 3, 64)
PAGES: Final = (
    f"{DELIVERY}.rounds", "millpond.agents.queue.machine", "millpond.agents.pubsub.readers",
    "millpond.agents.pubsub.forgetting",
)  # fmt: skip
PUBSUB_OVERFLOW: Final = ("millpond.agents.pubsub.machine", "millpond.agents.pubsub.trimming")
# Limits of what is in memory. They decide nothing, so they change from batch to batch.
MEMORY: Final[dict[tuple[str, ...], Sequence[int]]] = {
    (f"{DELIVERY}.machine.READ_MIN", "millpond.agents.pubsub.trimming.READ_MIN"): (1, 1, 2, 5, 256),
    (f"{DELIVERY}.window.AHEAD_MAX", "millpond.agents.pubsub.trimming.AHEAD_MAX"): (1, 2, 4, 1_024),
    (f"{DELIVERY}.machine.AHEAD_TOTAL_MAX",): (0, 5, 12, 20, 131_072),
    (f"{TOPIC_STATES}.state_cache.STATES_HELD_MAX",): (0, 1, 3, 6, 2_000),
    (f"{DELIVERY}.members.AWAKE_MAX",): (0, 1, 2, 2_000),
    (f"{DELIVERY}.members.TOPICS_REMEMBERED_MAX",): (1, 2, 10_000),
}


@cache
def rule_sets(agent: AgentName) -> tuple[Rules, ...]:
    """The rules that a partition may be folded by."""
    kept = (given.retain("t/#"), given.clear_retained("t/#"))
    kind: Callable[..., str] = given.queue if agent == "queue" else given.pubsub
    common: dict[str, Any] = {"ack_timeout_s": ACK_MS // 1000, "max_deliveries": 2}
    if agent == "pubsub":
        common["offset_retention_s"] = 60
    inflight_of_each = tuple(
        kind(topic, **{**common, "max_deliveries": 1}, max_inflight=1 + 2 * at)
        for at, topic in enumerate(TOPICS)
    )
    sets = [
        (kind("t/#", **common, max_inflight=2), *kept),
        (kind("t/#", **common, max_inflight=4),),
        (kind("t/#", **common, max_inflight=3, expired_time=EXPIRY_MS // 1000), *kept),
        (kind("t/#", **common, max_inflight=2, max_length=4), *kept),
        inflight_of_each,
    ]
    if agent == "queue":
        sets += [
            (kind("t/#", **common, max_inflight=3, max_length=5, overflow="dead_letter"), *kept),
            (
                given.a_rule(
                    hook="session.subscribed", topic="t/#",
                    action="on_message_fetch_for_keep_latest", **common, store_qos0=True,
                ),
            ),
        ]  # fmt: skip
    else:
        sets += [
            (kind("t/#", **common, max_inflight=3, start="latest"), *kept),
            (
                kind(
                    "t/#", **common, max_inflight=2, max_length=5, start="latest",
                    expired_time=EXPIRY_MS // 1000, store_qos0=True,
                ),
            ),
        ]  # fmt: skip
    return tuple(given.rules(*tables) for tables in sets)


class Scene(NamedTuple):
    """What all folds of a log share."""

    agent: AgentName
    rules: Rules
    limits: Mapping[str, int]

    @property
    def partition(self) -> Partition:
        return Partition("millpond", self.agent, 0)


def a_scene(random: Random) -> Scene:
    agent = random.choice(AGENTS)
    limits = {name: random.choice(values) for name, values in DECIDING.items()}
    page = random.choice(PAGE_MAX)
    limits.update({f"{module}.PAGE_MAX": page for module in PAGES})
    overflow = limits["millpond.agents.queue.machine.OVERFLOW_MAX"]
    limits.update({f"{module}.OVERFLOW_MAX": overflow for module in PUBSUB_OVERFLOW})
    return Scene(agent, random.choice(rule_sets(agent)), limits)


class Memory:
    """How much a fold keeps in memory: always the least, always the most, or anything in every batch."""

    def __init__(self, patch: pytest.MonkeyPatch, random: Random, how: str) -> None:
        self._patch, self._random, self._how = patch, random, how
        self._set(how)

    def vary(self) -> None:
        """Another batch begins."""
        if self._how == "any":
            self._set("any")

    def _set(self, how: str) -> None:
        for names, values in MEMORY.items():
            value = {"least": values[0], "most": values[-1]}.get(how)
            value = self._random.choice(values) if value is None else value
            for name in names:
                self._patch.setattr(name, value)


class FixedLog:
    """A log without gaps. See `millpond.agents.ports.Log`."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    async def bounds(self, partition: Partition) -> LogBounds:
        return LogBounds("memory", 1, 0, len(self.records), None)

    async def read(
        self, partition: Partition, start: int, stop: int
    ) -> AsyncIterator[Sequence[Record]]:
        yield self.records[start:stop]

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        """What is produced is in the log already."""
        return _Known()


class GrowingLog(FixedLog):
    """The log that a player leaves."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.held: list[Record] = []
        super().__init__(self.held)
        self._now_ms = now_ms

    def append(self, key: bytes | None, value: bytes | None) -> None:
        self.held.append(Record(len(self.held), self._now_ms(), key, value))

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        for each in records:
            self.append(each.key, each.value)
        return _Known()


class _Known(Awaitable[None]):
    def __await__(self) -> Generator[None, None, None]:
        return None
        yield


class _Silent:
    """Makes no records of outputs: the player takes them as the machine gave them out."""

    async def records(self, outputs: Any, sources: Any) -> AsyncIterator[OutgoingRecord]:
        return
        yield


class BorderStore(MemoryStore):
    """Remembers what transactions hand out. A `late` one is applied when it is waited for, and lost if it never is."""

    def __init__(self, partition: Partition, server: MemoryServer, outputs: list[Output]) -> None:
        super().__init__(partition, server)
        self._outputs = outputs
        self.late: Callable[[], bool] = lambda: False

    def commit(self, packed: Transaction) -> Awaitable[Sequence[Refusal]]:
        return _Late(super().commit, packed) if self.late() else super().commit(packed)

    def _apply(self, transaction: Transaction) -> list[Refusal]:
        self._outputs.extend(transaction.outputs)
        return super()._apply(transaction)


class _Late(Awaitable[Sequence[Refusal]]):
    def __init__(self, commit: Callable[[Transaction], Any], packed: Transaction) -> None:
        self._commit, self._packed = commit, packed

    def __await__(self) -> Any:
        return (yield from self._commit(self._packed).__await__())


class Way(NamedTuple):
    """How a log is folded: so many records at a time, so often with a new owner or a rival, and so on."""

    sizes: tuple[int, int]
    memory: str = "most"
    owners: float = 0.0
    rivals: float = 0.0
    late: float = 0.0
    faults: float = 0.0
    again: int = 0


WAYS: Final = (
    Way((1, 1), "least"),
    Way((1, 1), "most"),
    Way((10_000, 10_000), "any"),
    Way((1, 9), "any", late=0.5),
    Way((1, 4), "any", owners=0.3, again=2),
    Way((1, 30), "most", owners=0.2, late=0.5),
    Way((1, 20), "least", late=1.0),
    Way((1, 6), "any", rivals=0.3, late=0.3, faults=0.02),
    Way((1, 12), "any", owners=0.1, rivals=0.1, late=0.5, faults=0.05, again=1),
)


class Fold:
    """A store, and those who fold a log into it."""

    def __init__(
        self, scene: Scene, log: FixedLog, way: Way, memory: Memory, random: Random
    ) -> None:
        self.scene, self.log, self.way = scene, log, way
        self._memory, self._random = memory, random
        self.server, self.outputs = MemoryServer(), list[Output]()
        self.driver = self._owner()
        self._rival: Driver | None = None
        if way.faults:
            self.server.fault = self._fault

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def _fault(self, moment: Moment, partition: Partition) -> None:
        if self._chance(self.way.faults):
            raise StoreDown(moment)

    def _owner(self) -> Driver:
        store = BorderStore(self.scene.partition, self.server, self.outputs)
        if self.way.late:
            store.late = lambda: self._chance(self.way.late)
        machine = MACHINES[self.scene.agent]()
        driver: Driver = PartitionDriver(
            self.scene.partition, machine, store, self.log, self.scene.rules, _unheard
        )
        driver._outbox._outputs = _Silent()  # type: ignore[assignment]
        run(driver.start())
        return driver

    def feed(self) -> None:
        """One run of records; perhaps somebody else goes on."""
        if self._chance(self.way.rivals):
            if self._rival is None:
                self._rival = self._owner()
            self.driver, self._rival = self._rival, self.driver
        elif self._chance(self.way.owners):
            if self._random.random() < 0.5:
                run(self.driver.close())
            self.driver = self._owner()
        self._memory.vary()
        first = self.driver.next_offset
        size = self._random.randint(*self.way.sizes)
        run(self.driver.process(self.log.records[max(0, first - self.way.again) : first + size]))

    def finish(self) -> None:
        """Everything is in the store."""
        while True:
            while self.driver.next_offset < len(self.log.records):
                self.feed()
            run(self.driver.finish())
            if self.driver.next_offset == len(self.log.records):
                return

    def all(self) -> Folded:
        """Fold the log to its end."""
        self.finish()
        return Folded(self.server, self.outputs)


class Folded(NamedTuple):
    """What came of a log."""

    server: MemoryServer
    outputs: list[Output]


def _unheard(notice: str) -> None:
    """Notices are for people."""


def folded(scene: Scene, records: Sequence[Record], way: Way, seed: str) -> Folded:
    """A log, folded one way."""
    random = Random(seed)
    with patched(scene) as patch:
        memory = Memory(patch, random, way.memory)
        return Fold(scene, FixedLog(records), way, memory, random).all()


def patched(scene: Scene) -> AbstractContextManager[pytest.MonkeyPatch]:
    """The limits of a scene."""
    return _Patched(scene.limits)


class _Patched(AbstractContextManager[pytest.MonkeyPatch]):
    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits, self._patch = limits, pytest.MonkeyPatch()

    def __enter__(self) -> pytest.MonkeyPatch:
        for name, value in self._limits.items():
            self._patch.setattr(name, value)
        return self._patch

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def check_same(scene: Scene, one: Folded, other: Folded) -> None:
    """Two folds of a log left and handed out the same."""
    for at, (here, there) in enumerate(zip(one.outputs, other.outputs, strict=False)):
        assert here == there, f"output {at}: {here}, but otherwise {there}"
    assert len(one.outputs) == len(other.outputs), "one handed out more than the other"
    judge.check_equal(other.server, one.server, scene.partition)


# -- what happens

# How often what happens, by what the time is like.
USUAL: Final = {
    "publish": 10, "join": 5, "join wild": 4, "resume": 2, "unsubscribe": 1, "resubscribe": 1, "disconnect": 2, "end": 1, "sent": 10,
    "sent again": 2, "fail": 3, "fail late": 2, "gone": 1, "too large": 1, "ack": 10, "foreign ack": 1, "early ack": 1, "tick": 8,
    "wait": 3, "requeue": 1, "drop": 1, "rewind": 1, "rules": 1, "broker retains": 1, "repeat": 1,
}  # fmt: skip
TIMES: Final[dict[str, dict[str, int]]] = {
    "usual": USUAL,
    "backlog": {"publish": 20, "disconnect": 1, "tick": 1},
    "arrival": {"resubscribe": 4, "join": 6, "join wild": 8, "tick": 4, "resume": 2},
    "drain": {"sent": 12, "ack": 14, "tick": 8, "publish": 1},
    "trouble": {
        "fail": 10, "fail late": 4, "sent again": 5, "sent": 4, "resume": 4, "disconnect": 3, "end": 2, "tick": 8, "wait": 3,
        "gone": 1, "too large": 2,
    },
    "operators": {"requeue": 6, "drop": 2, "rewind": 3, "rules": 2, "tick": 6, "sent": 4, "too large": 3},
    "waiting": {"wait": 6, "tick": 10, "sent": 3, "join": 1},
}  # fmt: skip
STEPS_OF_A_TIME: Final = (2, 14)
EVENTS_MAX: Final = (20, 110)
SETTLING_TICKS_MAX: Final = 12


class Client:
    """What a broker knows of a client."""

    def __init__(self) -> None:
        self.session, self.online, self.filters = 1, False, dict[str, int]()


class Player:
    """Leaves a log."""

    def __init__(self, scene: Scene, random: Random, memory: Memory) -> None:
        self.scene, self.random = scene, random
        self.now_ms = 10_000
        self.log = GrowingLog(lambda: self.now_ms)
        way = Way((1, 1_000), memory="any", owners=0.02, late=0.3)
        self.live = Fold(scene, self.log, way, memory, random)
        self.clients = {name: Client() for name in CLIENTS[: random.randint(2, 4)]}
        self.topics = TOPICS[: random.randint(1, 3)]
        self.unreported: list[DeliverMessage] = []
        self.handed: list[DeliverMessage] = []
        self.aliases: dict[int, str] = {}  # by lease
        self.published: list[MessagePublished] = []
        self.broker_delivers = scene.agent == "queue" and random.random() < 0.2
        self.repeats = scene.limits[f"{TOPIC_STATES}.dedup.DEDUP_WINDOW_MS"] > max(WAITS_MS)
        self.lag = random.choice((0.0, 0.3, 0.7))
        self._source = self._taken = 0

    def play(self) -> None:
        """Times of all kinds; then perhaps all that is due."""
        count = self.random.randint(*EVENTS_MAX)
        while len(self.log.held) < count:
            weights = TIMES[self.random.choice(list(TIMES))]
            steps = self.random.randint(*STEPS_OF_A_TIME)
            for kind in self.random.choices(list(weights), list(weights.values()), k=steps):
                for event in self.happens(kind):
                    self.log.append(*given.key_and_value(event))
                if self.random.random() >= self.lag:
                    self.fold()
        self.fold()
        for _ in range(self.random.choice((0, SETTLING_TICKS_MAX))):
            self.log.append(*given.key_and_value(given.tick(self.scene.agent)))
            self.fold()
            due = self.live.driver.machine.next_due_ms
            if due is None or due > self.now_ms:
                break

    def fold(self) -> None:
        """Fold what there is, and take what is handed out."""
        self.live.finish()
        new = self.live.outputs[self._taken :]
        self._taken = len(self.live.outputs)
        leased = [each for each in new if isinstance(each, DeliverMessage) and each.lease]
        self.unreported += leased
        self.handed += leased

    def happens(self, kind: str) -> list[Event]:  # noqa: PLR0912 — a table of what may happen
        """The events of something."""
        random = self.random
        client_id = random.choice(list(self.clients))
        match kind:
            case "publish":
                return [self._publish() for _ in range(random.choice((1, 1, 2, 5)))]
            case "join":
                return self._join(client_id, random.choice(EXACT))
            case "join wild":
                return self._join(client_id, random.choice(WILD))
            case "resume":
                client = self.clients[client_id]
                client.online = True
                return self._joined(client_id, client.filters)
            case "unsubscribe" | "disconnect" | "end":
                return self._leave(kind, client_id)
            case "resubscribe" if self.clients[client_id].filters:
                return self._subscribe_again(client_id)
            case "sent" | "sent again":
                return self._sent(again=kind == "sent again")
            case "fail" | "fail late" | "gone" | "too large":
                return self._failed(kind)
            case "ack" | "foreign ack" | "early ack":
                return self._acked(kind, client_id)
            case "tick":
                due = self.live.driver.machine.next_due_ms
                useless = due is None or due > self.now_ms
                return [] if useless and random.random() < 0.8 else [given.tick(self.scene.agent)]
            case "wait":
                self.now_ms += random.choice(WAITS_MS)
                return []
            case "rules":
                rules = random.choice(rule_sets(self.scene.agent)).canonical()
                return [RulesChanged(**AT, agent=self.scene.agent, rules=rules)]
            case "broker retains" if self.published:
                return [given.broker_retains(random.choice(self.published[-8:]))]
            case "repeat" if self.published and self.repeats:
                return [random.choice(self.published[-8:])]
            case "requeue" | "drop" | "rewind":
                return self._ordered(kind, client_id)
        return []

    def _publish(self) -> Event:
        random, topic = self.random, self.random.choice(self.topics)
        expires_at = self.now_ms + 1_500 if random.random() < 0.08 else None
        event = given.published(
            f"m{len(self.published)}", topic, qos=random.choice((1, 1, 1, 1, 2, 0)),
            retain=random.random() < 0.08, expires_at=expires_at,
            payload="" if random.random() < 0.03 else "x",
        )  # fmt: skip
        self.published.append(event)
        return event

    def _join(self, client_id: str, topic_filter: str) -> list[Event]:
        client = self.clients[client_id]
        client.filters[topic_filter] = self.random.choice((1, 1, 1, 2, 0))
        held = {topic_filter: client.filters[topic_filter]} if client.online else client.filters
        client.online = True
        return self._joined(client_id, held)

    def _subscribe_again(self, client_id: str) -> list[Event]:
        """UNSUBSCRIBE and SUBSCRIBE at once."""
        before = dict(self.clients[client_id].filters)
        left = self._leave("unsubscribe", client_id)
        (topic_filter,) = before.keys() - self.clients[client_id].filters.keys()
        return [*left, *self._join(client_id, topic_filter)]

    def _joined(self, client_id: str, held: dict[str, int]) -> list[Event]:
        self._source += 1
        subscribed_at = self.now_ms + self.random.choice(SKEWS_MS)
        marks: dict[str, Any] = {"subscribed_at": subscribed_at} if self._source % 5 else {}
        return [
            SubscriberJoined(
                **AT, client_id=client_id, topic_filter=topic_filter, qos=qos,
                session=self.clients[client_id].session, source_offset=self._source,
                broker_delivers=self.broker_delivers and self._source % 2 == 0, **marks,
            )
            for topic_filter, qos in held.items()
        ]  # fmt: skip

    def _leave(self, kind: str, client_id: str) -> list[Event]:
        client = self.clients[client_id]
        filters = list(client.filters)
        if not filters:
            return []
        self._source += 1
        session, reason = client.session, "disconnected"
        if kind == "unsubscribe":
            filters, reason = [self.random.choice(filters)], "unsubscribed"
            del client.filters[filters[0]]
        else:
            client.online = False
        if kind == "end":
            reason, client.filters = "session_ended", {}
            client.session += 1
        return [
            SubscriberLeft(
                **AT, client_id=client_id, topic_filter=each, reason=reason,  # type: ignore[arg-type]
                session=session, source_offset=self._source,
            )
            for each in filters
        ]  # fmt: skip

    def _name(self, command: DeliverMessage) -> str:
        return lease_name(self.scene.partition, command.lease)

    def _sent(self, *, again: bool) -> list[Event]:
        """What a bridge says: in order, but for what it says once more after a crash."""
        count = self.random.randint(1, 5)
        if again:
            first = self.random.randrange(max(len(self.handed) - count, 0) + 1)
            some = self.handed[first : first + count]
        else:
            some, self.unreported = self.unreported[:count], self.unreported[count:]
        aliased = self.random.random() < 0.3
        reports = []
        for each in some:
            if aliased:
                self.aliases[each.lease] = f"{each.message_id}@{each.lease}"
            qos = 0 if self.random.random() < 0.1 else each.qos
            alias = self.aliases.get(each.lease)
            reports.append(Sent(self._name(each), each.client_id, each.message_id, alias, qos))
        if not reports:
            return []
        return [DeliveriesSent(**AT, agent=self.scene.agent, sent=tuple(reports))]

    def _failed(self, kind: str) -> list[Event]:
        """One command, and often all that follow it in its epoch."""
        among = self.handed[-12:] if kind == "fail late" else self.unreported
        if not among:
            return []
        first = self.random.choice(among)
        some = [first]
        reason: Any = kind.replace(" ", "_")
        if kind.startswith("fail"):
            reason = self.random.choice(("no_client", "stale", "bridge"))
            if self.random.random() < 0.6:
                some = [
                    each for each in among
                    if (each.client_id, each.epoch) == (first.client_id, first.epoch) and each.lease >= first.lease
                ]  # fmt: skip
        gone = {each.lease for each in some}
        self.unreported = [each for each in self.unreported if each.lease not in gone]
        return [
            DeliveryFailed(
                **AT, agent=self.scene.agent, lease=self._name(each), client_id=each.client_id,
                message_id=each.message_id, reason=reason,
            )
            for each in some
        ]  # fmt: skip

    def _acked(self, kind: str, client_id: str) -> list[Event]:
        marks = {"broker_delivers": self.broker_delivers}
        if kind == "early ack":
            name = f"m{len(self.published)}"
            return [given.acked(name, self.topics[0], client_id=client_id, **marks)]
        if self.broker_delivers and self.published and self.random.random() < 0.5:
            # The broker has delivered it by itself.
            new = self.random.choice(self.published[-6:])
            return [given.acked(new.message_id, new.topic, client_id=client_id, **marks)]
        events: list[Event] = []
        for _ in range(self.random.randint(1, 3) if self.handed else 0):
            command = self.random.choice(self.handed[-10:])
            name = self.aliases.get(command.lease, command.message_id)
            by = client_id if kind == "foreign ack" else command.client_id
            events.append(given.acked(name, command.topic, client_id=by, **marks))
        return events

    def _ordered(self, kind: str, client_id: str) -> list[Event]:
        random, topic = self.random, self.random.choice(self.topics)
        if kind == "rewind":
            if self.scene.agent == "queue":
                return []
            name = random.choice((client_id, "$share/g/t/+", "$share/g/t/0"))
            after = random.choice((0, 10**18, (self.now_ms - 1_000) * 1_000, self.now_ms * 1_000))
            return [OperatorRewind(**AT, topic=topic, subscriber=name, after=after)]
        table = keys.table(self.scene.partition, "dead")
        dead: Any = self.live.server.values.get(table, {})
        if not dead:
            return []
        message_id = random.choice(sorted(dead))
        topic = next(each.topic for each in self.published if each.message_id == message_id)
        order: Any = OperatorRequeue if kind == "requeue" else OperatorDrop
        return [order(**AT, topic=topic, message_id=message_id)]


class Played(NamedTuple):
    """A log as a player left it."""

    scene: Scene
    records: list[Record]
    folded: Folded


def played(seed: int) -> Played:
    """The log of a seed, and what came of it."""
    random = Random(f"borders {seed}")
    scene = a_scene(random)
    with patched(scene) as patch:
        player = Player(
            scene, random, Memory(patch, random, random.choice(("any", "least", "most")))
        )
        player.play()
    return Played(scene, player.log.held, Folded(player.live.server, player.live.outputs))


def judge_seed(seed: int, ways_count: int = 3) -> Counter[str]:
    """One log, folded as it was played and in some other ways."""
    log = played(seed)
    random = Random(seed)
    for way in random.sample(WAYS, ways_count):
        again = folded(log.scene, log.records, way, f"{seed} {way}")
        try:
            check_same(log.scene, log.folded, again)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {way}: {error}") from error
    return Counter(logs=1, records=len(log.records), outputs=len(log.folded.outputs))


# -- the smallest log that shows a difference


def differs(scene: Scene, records: Sequence[Record], tries: int) -> str | None:
    """How two folds of a log differ, if some do."""
    try:
        base = folded(scene, records, Way((1, 1), "most"), "")
    except BrokenInvariant as error:
        return f"{error}"
    for number in range(tries):
        way = WAYS[number % len(WAYS)]
        try:
            check_same(scene, base, folded(scene, records, way, f"{number}"))
        except (AssertionError, BrokenInvariant) as error:
            return f"{way}, {number}: {error}"
    return None


def shrunk(scene: Scene, records: Sequence[Record], tries: int = 18) -> list[Record]:
    """As few of the records as still show a difference, as far as leaving out pieces leads."""
    left = list(records)
    piece = len(left) // 2
    while piece:
        at = 0
        while at < len(left):
            fewer = renumbered([*left[:at], *left[at + piece :]])
            if differs(scene, fewer, tries) is None:
                at += piece
            else:
                left = fewer
        piece //= 2
    return left


def smallest(seed: int) -> str:
    """What is left of a seed's log, for people."""
    log = played(seed)
    return f"{log.scene.limits}\n{told(shrunk(log.scene, log.records))}"


def renumbered(records: Sequence[Record]) -> list[Record]:
    """Records without gaps."""
    return [each._replace(offset=offset) for offset, each in enumerate(records)]


def told(records: Sequence[Record]) -> str:
    """A log for people."""
    return "\n".join(
        f"{each.offset} {each.timestamp} {codec.decode(each.value)}" for each in records
    )
