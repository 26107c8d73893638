"""A player of scripts against a running queue partition.

A step names a kind of event, and two numbers that choose among what exists: clients, published messages, commands of the
agent. So the same script adapts to what the agent does. The log that a player leaves can be folded again with other batches
and owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from millpond.agents.ports import Record
from millpond.agents.topics.dedup import SeenIds
from millpond.schemas.commands import Deliver
from millpond.schemas.events import (
    DeliveriesSent,
    DeliveryFailed,
    MembersActive,
    MessagePublished,
    RulesChanged,
    Sent,
)
from millpond.schemas.rules import Rules
from tests.support import given
from tests.support.delivery import AT, Delivering

Kind = Literal[
    "publish", "qos 0", "retain", "expiring", "repeat", "broker retains", "join", "broker joins", "unsubscribe", "end session",
    "disconnect", "sent", "sent again", "fail", "fail late", "ack", "ack by alias", "foreign ack", "ack early", "active", "pass time", "requeue",
    "drop", "other rules", "restart",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
CLIENTS = ("a", "b", "c")
TOPICS = ("queue/a", "queue/b", "queue/c")
FILTERS: tuple[str, ...] = (
    "queue/a", "queue/b", "queue/+", "queue/#", "$share/g/queue/+", "$share/g/queue/a", "queue/c",
)  # fmt: skip
REASONS: tuple[Literal["no_client", "stale", "bridge"], ...] = ("no_client", "stale", "bridge")


class Step(NamedTuple):
    """One step: `which` and `other` choose among what exists; `later_ms` passes before it."""

    kind: Kind
    which: int
    other: int
    later_ms: int


class Player:
    """A partition and its bridge.

    - `commands`: all `deliver` commands with a lease.
    - `unreported`: those of them that the bridge has not reported.
    - `sessions`: client id → session of a client that has one.
    - `clock`: the last source offset of a join or leave.
    - `broker_delivers`: True once a client has joined where the broker delivers.
    """

    def __init__(self, *tables: str, other_rules: Sequence[Rules] = ()) -> None:
        self.world = Delivering("queue", *tables)
        self.other_rules = other_rules
        self.commands: list[Deliver] = []
        self.unreported: list[Deliver] = []
        self.published: list[MessagePublished] = []
        self.sessions: dict[str, int] = {}
        self.seen = SeenIds()
        self.clock = 100
        self.broker_delivers = False

    @property
    def records(self) -> list[Record]:
        return self.world.log.records[self.world.partition.topic, 0]

    def play(self, step: Step) -> None:
        """Play one step. The agent folds its events, and every tick that becomes due."""
        if step.later_ms:
            self.world.at(self.world.now_ms + step.later_ms)
        kind = step.kind
        if kind in ("publish", "qos 0", "retain", "expiring", "repeat", "broker retains"):
            self._publish(step)
        elif kind in ("join", "broker joins"):
            self._join(step)
        elif kind in ("unsubscribe", "end session", "disconnect"):
            self._leave(step)
        elif kind in ("sent", "sent again", "fail", "fail late"):
            self._report(step)
        elif kind in ("ack", "ack by alias", "foreign ack", "ack early"):
            self._ack(step)
        else:
            self._operate(step)
        self._take_commands()

    def _take_commands(self) -> None:
        new = [each for each in self.world.take() if each.lease]
        self.commands += new
        self.unreported += new

    def _publish(self, step: Step) -> None:
        topic, now_ms = TOPICS[step.which % len(TOPICS)], self.world.now_ms
        if step.kind == "broker retains":
            if self.published:
                event = self.published[-1 - step.other % len(self.published)]
                self.world.tell(given.broker_retains(event))
            return
        if step.kind == "repeat":
            dead = self.world.table(
                "dead"
            )  # a dead letter shares its body with an old repeat of it
            alive = [each for each in self.published if each.message_id not in dead]
            if alive:
                self.world.tell(alive[-1 - step.other % len(alive)])
            return
        event = given.published(
            f"m{len(self.published)}", topic, retain=step.kind == "retain",
            qos=0 if step.kind == "qos 0" else 1 + step.other % 2,
            expires_at=now_ms + 3_000 if step.kind == "expiring" else None,
        )  # fmt: skip
        self.published.append(event)
        self.world.tell(event)

    def _join(self, step: Step) -> None:
        client, topic_filter = CLIENTS[step.which % 3], FILTERS[step.other % len(FILTERS)]
        self.clock += 1
        self.broker_delivers |= step.kind == "broker joins"
        session = self.sessions.setdefault(client, self.clock)
        self.world.join(
            client, topic_filter, qos=min(1, (step.other + step.which) % 4), session=session,
            source_offset=self.clock, broker_delivers=step.kind == "broker joins",
        )  # fmt: skip

    def _leave(self, step: Step) -> None:
        """Let a client leave. The sessions agent reports the end of a session once for each filter."""
        client = CLIENTS[step.which % 3]
        if client not in self.sessions:
            return
        self.clock += 1
        session = self.sessions[client]
        reason: Literal["unsubscribed", "session_ended", "disconnected"] = "disconnected"
        filters = FILTERS
        if step.kind == "unsubscribe":
            reason, filters = "unsubscribed", FILTERS[step.other % len(FILTERS) :][:1]
        elif step.kind == "end session":
            reason = "session_ended"
            del self.sessions[client]
        for each in filters:
            self.world.leave(client, each, reason, session=session, source_offset=self.clock)

    def _report(self, step: Step) -> None:
        among = self.commands if step.kind in ("sent again", "fail late") else self.unreported
        if not among:
            return
        command = among[step.which % min(len(among), 3)]
        if command in self.unreported:
            self.unreported.remove(command)
        if step.kind in ("fail", "fail late"):
            event = DeliveryFailed(
                **AT, agent="queue", lease=command.lease, client_id=command.client_id,
                message_id=command.message_id, reason=REASONS[step.other % 3],
            )  # fmt: skip
            self.world.tell(event)
            return
        alias = f"x{command.message_id}" if step.other % 2 else None
        sent = Sent(
            command.lease, command.client_id, command.message_id, alias,
            1 if command.qos else 0,
        )  # fmt: skip
        self.world.tell(DeliveriesSent(**AT, agent="queue", sent=(sent,)))

    def _ack(self, step: Step) -> None:
        marks = {"broker_delivers": self.broker_delivers}
        if step.kind == "ack early":
            name, topic = f"m{len(self.published)}", TOPICS[step.which % 3]
            self.world.ack(CLIENTS[step.other % 3], name, topic=topic, **marks)
            return
        if not self.commands:
            return
        command = self.commands[-1 - step.which % min(len(self.commands), 6)]
        alias = "x" if step.kind == "ack by alias" else ""
        client = CLIENTS[step.other % 3] if step.kind == "foreign ack" else command.client_id
        self.world.ack(client, alias + command.message_id, topic=command.topic, **marks)

    def _operate(self, step: Step) -> None:
        dead = sorted(self.world.table("dead"))
        match step.kind:
            case "requeue" | "drop" if dead:
                name = dead[step.which % len(dead)]
                topic = next(each.topic for each in self.published if each.message_id == name)
                act = self.world.requeue if step.kind == "requeue" else self.world.drop
                act(name, topic=topic)
            case "other rules" if self.other_rules:
                rules = self.other_rules[step.which % len(self.other_rules)].canonical()
                self.world.tell(RulesChanged(**AT, agent="queue", rules=rules))
            case "active":
                client_ids = (CLIENTS[step.which % 3], CLIENTS[step.other % 3])
                self.world.tell(MembersActive(**AT, agent="queue", client_ids=client_ids))
            case "restart":
                self.world.restart()
