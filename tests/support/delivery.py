"""A delivery agent's partition in memory, with a bridge that a test moves by hand. No event loop and no clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from millpond.agents.ports import Record
from millpond.pipeline.stores.memory.server import Hash
from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.events import (
    AgentName,
    DeliveriesSent,
    DeliveryFailed,
    Event,
    OperatorDrop,
    OperatorRequeue,
    Sent,
    SubscriberJoined,
    SubscriberLeft,
)
from millpond.schemas.keys import Partition
from tests.support import given
from tests.support.partition import Driver, World

AT: dict[str, Any] = {"at": 0, "node": "n"}
Reason = Literal["unsubscribed", "session_ended", "disconnected"]


class Delivering(World):
    """What a test says happens is folded at once; what comes of it is in `commands`."""

    def __init__(self, agent: AgentName, *tables: str) -> None:
        super().__init__(*tables, partition=Partition("millpond", agent, 0))
        self.driver: Driver = self.started()
        self.settle()
        self._taken = 0
        self._offset = 0

    def settle(self) -> None:
        """Fold all there is, and every tick that follows at once."""
        for _ in range(10_000):
            self.feed(self.driver)
            due = self.driver.machine.next_due_ms
            if due is None or due > self.now_ms:
                return
            # The clock of the owner is ahead of that of the log, so that no tick has to rest.
            self.tick()
        raise AssertionError("ticks without end")

    def tick(self, now_ms: int | None = None) -> None:
        """One tick at this time."""
        self.now_ms = self.now_ms if now_ms is None else now_ms
        self.append(given.tick(self.partition.agent))
        self.feed(self.driver)

    def at(self, now_ms: int) -> None:
        """Time goes on; what is due by then is done."""
        self.tick(now_ms)
        self.settle()

    def tell(self, *events: Event) -> list[Record]:
        """Events in one batch."""
        records = self.append(*events)
        self.settle()
        return records

    def tell_unticked(self, *events: Event) -> None:
        """Events in one batch, and no tick behind them."""
        self.append(*events)
        self.feed(self.driver)

    def restart(self) -> None:
        """A new owner goes on from what the store holds."""
        self.driver = self.started()
        self.settle()

    # -- what happens

    def publish(self, *names: str, topic: str = "queue/a", **fields: Any) -> None:
        self.tell(*(given.published(name, topic=topic, **fields) for name in names))

    def join(
        self, client: str, topic_filter: str = "queue/a", *, qos: int = 1, session: int = 1, **fields: Any
    ) -> None:  # fmt: skip
        self._offset += 1
        joined = SubscriberJoined(
            **AT, client_id=client, topic_filter=topic_filter, qos=qos, session=session,
            **{"source_offset": self._offset, **fields},
        )  # fmt: skip
        self.tell(joined)

    def leave(
        self,
        client: str,
        topic_filter: str = "queue/a",
        reason: Reason = "session_ended",
        *,
        session: int = 1,
        **fields: Any,
    ) -> None:
        self.tell(self._left(client, topic_filter, reason, session, **fields))

    def leave_unticked(
        self, client: str, topic_filter: str = "queue/a", reason: Reason = "session_ended"
    ) -> None:
        """The same, and no tick behind it."""
        self.tell_unticked(self._left(client, topic_filter, reason, 1))

    def _left(
        self, client: str, topic_filter: str, reason: Reason, session: int, **fields: Any
    ) -> SubscriberLeft:
        self._offset += 1
        return SubscriberLeft(
            **AT, client_id=client, topic_filter=topic_filter, reason=reason, session=session,
            **{"source_offset": self._offset, **fields},
        )  # fmt: skip

    def ack(self, client: str, *names: str, topic: str = "queue/a", **marks: bool) -> None:
        self.tell(*(given.acked(name, topic, client_id=client, **marks) for name in names))

    def requeue(self, *names: str, topic: str = "queue/a") -> None:
        self.tell(*(OperatorRequeue(**AT, topic=topic, message_id=name) for name in names))

    def order(self, name: str, topic: str = "queue/a") -> Event:
        """An operator's wish to have a dead letter delivered again."""
        return OperatorRequeue(**AT, topic=topic, message_id=name)

    def drop(self, *names: str, topic: str = "queue/a") -> None:
        self.tell(*(OperatorDrop(**AT, topic=topic, message_id=name) for name in names))

    # -- the bridge

    @property
    def commands(self) -> list[Deliver]:
        """All commands so far."""
        return [
            command
            for sent in self.log.produced
            if sent.topic == keys.DELIVERIES_TOPIC
            and isinstance(command := codec.decode_command(sent.value), Deliver)
        ]

    def take(self) -> list[Deliver]:
        """The commands since this was last asked."""
        commands = self.commands
        new, self._taken = commands[self._taken :], len(commands)
        return new

    def taken(self) -> list[tuple[str, str]]:
        """Client and message of each of these."""
        return [(command.client_id, command.message_id) for command in self.take()]

    def sent(self, commands: Iterable[Deliver], alias: str | None = None) -> None:
        """The bridge has handed these over; `alias` before the id of each names its copy."""
        self.tell(*self.reports(commands, alias))

    def reports(self, commands: Iterable[Deliver], alias: str | None = None) -> list[Event]:
        """What the bridge says of what it has handed over."""
        reports = tuple(
            Sent(
                each.lease, each.client_id, each.message_id,
                None if alias is None else alias + each.message_id, each.qos,
            )
            for each in commands
            if each.lease
        )  # fmt: skip
        return [DeliveriesSent(**AT, agent=self.partition.agent, sent=reports)]

    def hand_over(self) -> list[tuple[str, str]]:
        """Take and send what there is: client and message of each."""
        commands = self.take()
        if commands:
            self.sent(commands)
        return [(command.client_id, command.message_id) for command in commands]

    def fail(
        self,
        commands: Iterable[Deliver],
        reason: Literal["no_client", "stale", "bridge", "gone", "too_large"],
    ) -> None:
        """The bridge could not hand these over."""
        self.tell(
            *(
                DeliveryFailed(
                    **AT, agent=self.partition.agent, lease=each.lease, client_id=each.client_id,
                    message_id=each.message_id, reason=reason,
                )
                for each in commands
            )
        )  # fmt: skip

    # -- what is left

    def table(self, name: str) -> dict[str, bytes]:
        """One of the partition's tables of packed states."""
        return dict(self.server.of(keys.table(self.partition, name), Hash))
