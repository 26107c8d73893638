"""A pubsub partition in which much goes on: subscribers come and go, a bridge forgets, operators order, rules change.

What happens is a list of `Step`s, so that hypothesis can shorten it and a seed can make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Literal, NamedTuple

from millpond.agents.delivery.members import member_name
from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.effects import DeliverMessage, Output
from millpond.agents.ports import OutgoingRecord, Record, Transaction
from millpond.agents.pubsub.machine import PubsubMachine
from millpond.agents.pubsub.state import subscriber_of
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.pipeline.stores.memory.server import MemoryServer
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.events import (
    DeliveriesSent,
    DeliveryFailed,
    Event,
    MembersActive,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
    RulesChanged,
    Sent,
    SubscriberJoined,
    SubscriberLeft,
)
from millpond.schemas.keys import Partition
from tests.simulation import pubsub_judge as judge
from tests.support import given
from tests.support.delivery import AT
from tests.support.partition import Driver, World, run

PUBSUB = Partition("millpond", "pubsub", 0)
TOPICS = ("p/0", "p/1", "p/2")
CLIENTS = ("a", "b", "c")
FILTERS = ("p/0", "p/1", "p/+", "#", "$share/g/p/+", "$share/g/p/0", "$share/h/p/0", "other")
LIMIT_MS = 2_000
RULES = tuple(
    given.rules(given.pubsub("p/#", max_inflight=2, ack_timeout_s=1, offset_retention_s=60, **more))
    for more in (
        {"max_deliveries": 2},
        {"max_deliveries": 2, "max_length": 3, "start": "latest"},
        {"max_deliveries": 3, "expired_time": 2, "start": "latest", "store_qos0": True},
        {"max_deliveries": 1, "expired_time": 2, "max_length": 2},
    )
)
KINDS = {
    "publish": 16, "join": 8, "unsubscribe": 3, "disconnect": 2, "end": 2, "resume": 2, "sent": 10,
    "fail": 2, "lose": 1, "ack": 10, "tick": 6, "wait": 3, "rewind": 2, "requeue": 1, "drop": 1,
    "rules": 1, "restart": 1, "again": 2, "active": 2,
}  # fmt: skip
WAITS_MS = (0, 1, 999, 1_000, 1_001, 1_999, LIMIT_MS, 60_000, 61_000, 600_001)


class Step(NamedTuple):
    """Something that happens; `which` and `other` choose among what there is."""

    kind: str
    which: int = 0
    other: int = 0


def steps(random: Random, count: int) -> list[Step]:
    """So many steps of a seed."""
    kinds = random.choices(list(KINDS), list(KINDS.values()), k=count)
    return [Step(kind, random.randrange(60), random.randrange(60)) for kind in kinds]


class Client:
    """What a broker knows of a client."""

    def __init__(self) -> None:
        self.session, self.online, self.filters = 1, False, dict[str, int]()


class Pubsub(World):
    """Every step is folded before the next one, unless `batched` lets some of them wait."""

    def __init__(self, rules: int = 0, *, batched: bool = False) -> None:
        super().__init__(partition=PUBSUB)
        self.rules = RULES[rules]
        self.batched = batched
        self.driver: Driver = self.started()
        self.feed(self.driver)
        self.clients = {name: Client() for name in CLIENTS}
        self.under_way: list[Deliver] = []
        self.in_hand: list[tuple[Deliver, str | None]] = []
        self.published: list[str] = []
        self.watcher = judge.Watcher(self)
        self._taken = self._count = 0
        self._source = 0
        self._latest: list[tuple[int, Event]] = []

    def live(self, happens: Sequence[Step]) -> None:
        """All of this happens; what must be true is looked at after every step."""
        for step in happens:
            events = self.events(step)
            if events:
                self._latest = [*self._latest[-7:], *((self.now_ms, event) for event in events)]
                self.watcher.told(events)
                self.append(*events)
            if not self.batched or step.other % 3:
                self.fold()

    def fold(self) -> None:
        """What is in the log is folded, and what comes of it taken."""
        self.feed(self.driver)
        commands = [
            codec.decode_command(sent.value)
            for sent in self.log.produced[self._taken :]
            if sent.topic == keys.DELIVERIES_TOPIC
        ]
        self._taken = len(self.log.produced)
        new = [each for each in commands if isinstance(each, Deliver)]
        self.under_way += [each for each in new if each.lease]
        judge.check(self.server, self.driver)
        if not self.batched:
            self.watcher.look(new)

    def settle(self) -> None:
        """Every tick that is due."""
        for _ in range(2_000):
            self.fold()
            due = self.driver.machine.next_due_ms
            if due is None or due > self.now_ms:
                judge.check_nobody_waits_idly(self.server, self.driver, self.now_ms)
                return
            self.append(given.tick("pubsub"))
        raise AssertionError("ticks without end")

    # -- what happens

    def events(self, step: Step) -> list[Event]:  # noqa: PLR0912 — a table of what may happen
        """The events of a step."""
        kind, which, other = step
        client_id = CLIENTS[which % len(CLIENTS)]
        client = self.clients[client_id]
        topic = TOPICS[min(which % 6, 4) % 3]
        match kind:
            case "publish":
                return [self._publish(topic, other)]
            case "join":
                return self._join(client_id, client, FILTERS[other % len(FILTERS)], which % 3)
            case "unsubscribe" if client.online and client.filters:
                topic_filter = sorted(client.filters)[other % len(client.filters)]
                del client.filters[topic_filter]
                return self._leave(client_id, [topic_filter], "unsubscribed")
            case "disconnect" if client.online:
                client.online = False
                return self._leave(client_id, client.filters, "disconnected")
            case "end" if client.online:
                left = self._leave(client_id, client.filters, "session_ended")
                client.online, client.filters = False, {}
                client.session += 1
                return left
            case "resume":
                client.online = True
                return self._joined(client_id, client, client.filters)
            case "sent":
                return self._sent(which, other)
            case "fail" if self.under_way:
                return [self._failed(which, other)]
            case "lose" if self.under_way:
                self.under_way.pop(which % len(self.under_way))
            case "ack" if self.in_hand:
                command, alias = self.in_hand.pop(which % len(self.in_hand))
                name = alias or command.message_id
                return [given.acked(name, command.topic, client_id=command.client_id)]
            case "active":
                return [
                    MembersActive(**AT, agent="pubsub", client_ids=(client_id, CLIENTS[other % 3]))
                ]
            case "tick":
                return [given.tick("pubsub")]
            case "wait":
                self.now_ms += WAITS_MS[other % len(WAITS_MS)]
            case "rewind":
                return [self._rewind(client_id, topic, other)]
            case "requeue" | "drop" if self.published:
                order: Any = OperatorRequeue if kind == "requeue" else OperatorDrop
                dead = sorted(judge.dead(self.server)) or self.published
                return [order(**AT, topic=topic, message_id=dead[other % len(dead)])]
            case "rules":
                rules = RULES[other % len(RULES)].canonical()
                return [RulesChanged(**AT, agent="pubsub", rules=rules)]
            case "restart":
                self.driver = self.started()
            case "again":
                # An older repeat of a publish is not recognised as one.
                young = [event for at, event in self._latest if self.now_ms - at < 60_000]
                return young[which % 8 : which % 8 + 1]
        return []

    def _publish(self, topic: str, other: int) -> Event:
        self._count += 1
        name = f"m{self._count}"
        self.published.append(name)
        expires_at = self.now_ms + LIMIT_MS // 2 if other % 6 == 5 else None
        return given.published(
            name, topic, qos=[1, 1, 1, 2, 0][other % 5], expires_at=expires_at,
            retain=other % 7 == 0,
        )  # fmt: skip

    def _join(self, client_id: str, client: Client, topic_filter: str, qos: int) -> list[Event]:
        client.filters[topic_filter] = qos
        held = {topic_filter: qos} if client.online else client.filters
        client.online = True
        return self._joined(client_id, client, held)

    def _joined(self, client_id: str, client: Client, held: dict[str, int]) -> list[Event]:
        self._source += 1
        return [
            SubscriberJoined(
                **AT, client_id=client_id, topic_filter=topic_filter, qos=qos,
                session=client.session, source_offset=self._source,
                subscribed_at=self.now_ms - self._source % 2,
            )
            for topic_filter, qos in held.items()
        ]  # fmt: skip

    def _leave(
        self,
        client_id: str,
        filters: Sequence[str] | dict[str, int],
        reason: Literal["unsubscribed", "session_ended", "disconnected"],
    ) -> list[Event]:
        self._source += 1
        session = self.clients[client_id].session
        return [
            SubscriberLeft(
                **AT, client_id=client_id, topic_filter=topic_filter, reason=reason,
                session=session, source_offset=self._source,
            )
            for topic_filter in filters
        ]  # fmt: skip

    def _sent(self, which: int, other: int) -> list[Event]:
        sent, self.under_way = self.under_way[: 1 + other % 3], self.under_way[1 + other % 3 :]
        aliased = which % 3 == 0
        reports = tuple(
            Sent(each.lease, each.client_id, each.message_id, f"{each.message_id}@{each.lease}" if aliased else None, each.qos)
            for each in sent
        )  # fmt: skip
        self.in_hand += [(each, report.alias) for each, report in zip(sent, reports, strict=True)]
        return [DeliveriesSent(**AT, agent="pubsub", sent=reports)] if reports else []

    def _failed(self, which: int, other: int) -> Event:
        reasons: list[Any] = ["no_client", "stale", "bridge", "gone"]
        if self.in_hand and which % 3 == 0:  # told of as sent before
            command = self.in_hand[other % len(self.in_hand)][0]
            del reasons[3]
        else:
            command = self.under_way.pop(which % len(self.under_way))
        return DeliveryFailed(
            **AT, agent="pubsub", lease=command.lease, client_id=command.client_id,
            message_id=command.message_id, reason=reasons[other % len(reasons)],
        )  # fmt: skip

    def _rewind(self, client_id: str, topic: str, other: int) -> Event:
        names = (client_id, "$share/g/p/+", "$share/g/p/0", client_id)
        places = [0, 10**18, *judge.scores(self.server, topic).values()]
        return OperatorRewind(
            **AT, topic=topic, subscriber=names[other % 4], after=places[other % len(places)]
        )


def subscriber(client_id: str, topic_filter: str) -> str:
    """The subscriber that a client is by a filter."""
    name, plain = member_name(client_id, topic_filter)
    return subscriber_of(name, plain)


# -- the same log, otherwise cut


class QuietLog(MemoryLog):
    """What is produced is heard of by nobody: the log has it already."""

    def produce(self, records: Sequence[OutgoingRecord]) -> Any:
        return super().produce(())


class ListeningStore(MemoryStore):
    """Remembers what transactions had to hand out."""

    def __init__(self, server: MemoryServer, outputs: list[Output]) -> None:
        super().__init__(PUBSUB, server)
        self._outputs = outputs

    def commit(self, packed: Transaction) -> Any:
        self._outputs.extend(each for each in packed.outputs if isinstance(each, DeliverMessage))
        return super().commit(packed)


def fold(
    held: Sequence[Record], rules: Any, sizes: Sequence[int], *, owners: bool = False
) -> tuple[MemoryServer, list[Output]]:
    """The content and the hand-outs of a log that is cut into runs of these sizes in turn, each with an owner of its own."""
    server, outputs = MemoryServer(), list[Output]()
    log = QuietLog(lambda: 0)
    log.records[PUBSUB.topic, 0] = list(held)

    def owner() -> PartitionDriver[Transaction]:
        store = ListeningStore(server, outputs)
        driver = PartitionDriver(PUBSUB, PubsubMachine(), store, log, rules, lambda _: None)
        run(driver.start())
        return driver

    driver = owner()
    at = turn = 0
    while at < len(held):
        size = sizes[turn % len(sizes)]
        run(driver.process(held[max(0, at - 1) : at + size]))  # some are handed over again
        at, turn = at + size, turn + 1
        if owners:
            run(driver.close())
            driver = owner()
    run(driver.maintain())
    return server, outputs
