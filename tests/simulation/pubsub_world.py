"""A pubsub partition with clients that join and leave, a bridge that loses commands, operators, and rules that change.

A script is a list of `Step`s. Hypothesis can shorten it, and a seed can generate it.
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
    "publish": 16, "join": 8, "unsubscribe": 3, "resubscribe": 3, "disconnect": 2, "end": 2, "resume": 2, "sent": 10,
    "fail": 2, "lose": 1, "ack": 10, "tick": 6, "wait": 3, "rewind": 2, "requeue": 1, "drop": 1,
    "rules": 1, "restart": 1, "again": 2, "active": 2,
}  # fmt: skip
WAITS_MS = (0, 1, 999, 1_000, 1_001, 1_999, LIMIT_MS, 60_000, 61_000, 600_001)
# How far the clock of the clients' log is ahead of this one.
SKEWS_MS = (0, -1, 0, 4_000, -4_000)


class Step(NamedTuple):
    """One step: `which` and `other` choose among what exists."""

    kind: str
    which: int = 0
    other: int = 0


def steps(random: Random, count: int) -> list[Step]:
    """Return a random script of this length."""
    kinds = random.choices(list(KINDS), list(KINDS.values()), k=count)
    return [Step(kind, random.randrange(60), random.randrange(60)) for kind in kinds]


class Client:
    """A client as its broker knows it."""

    def __init__(self) -> None:
        self.session, self.online, self.filters = 1, False, dict[str, int]()


class Pubsub(World):
    """Folds every step before the next one. With `batched`, some steps wait and share a batch.

    - `unreported`: `deliver` commands that the bridge has not reported.
    - `unacknowledged`: commands that the bridge reported as sent, with the alias of the copy.
    - `_source`: the last source offset of a join or leave.
    - `_latest`: the last events with their times, for repeats.
    """

    def __init__(self, rules: int = 0, *, batched: bool = False) -> None:
        super().__init__(partition=PUBSUB)
        self.rules = RULES[rules]
        self.batched = batched
        self.driver: Driver = self.started()
        self.feed(self.driver)
        self.clients = {name: Client() for name in CLIENTS}
        self.unreported: list[Deliver] = []
        self.unacknowledged: list[tuple[Deliver, str | None]] = []
        self.published: list[str] = []
        self.watcher = judge.Watcher(self)
        self._taken = self._count = 0
        self._source = 0
        self._latest: list[tuple[int, Event]] = []

    def play(self, script: Sequence[Step]) -> None:
        """Play the steps, and check the invariants after each."""
        for step in script:
            events = self.events(step)
            if events:
                self._latest = [*self._latest[-7:], *((self.now_ms, event) for event in events)]
                self.watcher.record(events)
                self.append(*events)
            if not self.batched or step.other % 3:
                self.fold()

    def fold(self) -> None:
        """Fold the log to its end, take the new commands, and check the invariants."""
        self.feed(self.driver)
        commands = [
            codec.decode_command(sent.value)
            for sent in self.log.produced[self._taken :]
            if sent.topic == keys.DELIVERIES_TOPIC
        ]
        self._taken = len(self.log.produced)
        new = [each for each in commands if isinstance(each, Deliver)]
        self.unreported += [each for each in new if each.lease]
        judge.check(self.server, self.driver)
        if not self.batched:
            self.watcher.check(new)

    def settle(self) -> None:
        """Fold the log and every tick that is due. Check that nothing waits without a reason."""
        for _ in range(2_000):
            self.fold()
            due = self.driver.machine.next_due_ms
            if due is None or due > self.now_ms:
                judge.check_nothing_idle(self.server, self.driver, self.now_ms)
                return
            self.append(given.tick("pubsub"))
        raise AssertionError("ticks without end")

    # -- steps

    def events(self, step: Step) -> list[Event]:  # noqa: PLR0912 — a table of steps
        """Return the events of a step."""
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
            case "resubscribe" if client.online and client.filters:
                # At once: the time of the new subscription is that of the unsubscribe, or older.
                topic_filter = sorted(client.filters)[other % len(client.filters)]
                qos = client.filters[topic_filter]
                left = self._leave(client_id, [topic_filter], "unsubscribed")
                return [*left, *self._joined(client_id, client, {topic_filter: qos})]
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
            case "fail" if self.unreported:
                return [self._failed(which, other)]
            case "lose" if self.unreported:
                self.unreported.pop(which % len(self.unreported))
            case "ack" if self.unacknowledged:
                command, alias = self.unacknowledged.pop(which % len(self.unacknowledged))
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
                # Seen ids are remembered for 60 s. A later repeat would count as a new publish.
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
        # A client that connects joins with all filters of its session.
        joined = {topic_filter: qos} if client.online else client.filters
        client.online = True
        return self._joined(client_id, client, joined)

    def _joined(self, client_id: str, client: Client, filters: dict[str, int]) -> list[Event]:
        self._source += 1
        return [
            SubscriberJoined(
                **AT, client_id=client_id, topic_filter=topic_filter, qos=qos,
                session=client.session, source_offset=self._source,
                subscribed_at=self.now_ms + SKEWS_MS[self._source % len(SKEWS_MS)],
            )
            for topic_filter, qos in filters.items()
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
        sent, self.unreported = self.unreported[: 1 + other % 3], self.unreported[1 + other % 3 :]
        aliased = which % 3 == 0
        reports = tuple(
            Sent(each.lease, each.client_id, each.message_id, f"{each.message_id}@{each.lease}" if aliased else None, each.qos)
            for each in sent
        )  # fmt: skip
        self.unacknowledged += [
            (each, report.alias) for each, report in zip(sent, reports, strict=True)
        ]
        return [DeliveriesSent(**AT, agent="pubsub", sent=reports)] if reports else []

    def _failed(self, which: int, other: int) -> Event:
        reasons: list[Any] = ["no_client", "stale", "bridge", "gone"]
        # A failure after a report that the copy was sent. Such a message is not `gone`.
        if self.unacknowledged and which % 3 == 0:
            command = self.unacknowledged[other % len(self.unacknowledged)][0]
            del reasons[3]
        else:
            command = self.unreported.pop(which % len(self.unreported))
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
    """Return the subscriber of a client's subscription."""
    name, plain = member_name(client_id, topic_filter)
    return subscriber_of(name, plain)


# -- the same log in other batches


class DroppingLog(MemoryLog):
    """Drops what is produced: the log has it already."""

    def produce(self, records: Sequence[OutgoingRecord]) -> Any:
        return super().produce(())


class RecordingStore(MemoryStore):
    """Records the deliveries of all transactions."""

    def __init__(self, server: MemoryServer, outputs: list[Output]) -> None:
        super().__init__(PUBSUB, server)
        self._outputs = outputs

    def commit(self, packed: Transaction) -> Any:
        self._outputs.extend(each for each in packed.outputs if isinstance(each, DeliverMessage))
        return super().commit(packed)


def fold(
    records: Sequence[Record], rules: Any, sizes: Sequence[int], *, owners: bool = False
) -> tuple[MemoryServer, list[Output]]:
    """Return the content and the deliveries of a log that was folded in runs of these sizes, in turn.

    With `owners`, each run has a new owner.
    """
    server, outputs = MemoryServer(), list[Output]()
    log = DroppingLog(lambda: 0)
    log.records[PUBSUB.topic, 0] = list(records)

    def owner() -> PartitionDriver[Transaction]:
        store = RecordingStore(server, outputs)
        driver = PartitionDriver(PUBSUB, PubsubMachine(), store, log, rules, lambda _: None)
        run(driver.start())
        return driver

    driver = owner()
    at = turn = 0
    while at < len(records):
        size = sizes[turn % len(sizes)]
        # Each run begins with the last record of the run before.
        run(driver.process(records[max(0, at - 1) : at + size]))
        at, turn = at + size, turn + 1
        if owners:
            run(driver.close())
            driver = owner()
    run(driver.maintain())
    return server, outputs
