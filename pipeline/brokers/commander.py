"""Reads from `mqtt.deliveries` what a broker is to do, and commits what is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from agents.dead_letters import headers_of
from pipeline.brokers.deliveries import Deliveries
from pipeline.brokers.source import Source
from pipeline.brokers.tickets import Ticket
from pipeline.producer import Producer
from pipeline.settings import Settings
from schemas import codec, keys
from schemas.commands import Command, Deliver
from schemas.errors import DecodeError
from schemas.leases import Lease, parse_lease


class Broker(Protocol):
    """What carries commands out."""

    async def take(self, ticket: Ticket, command: Command) -> None:
        """A command takes its place among those of its client; a report, or `ticket.done`, follows when it is done."""


class Commander:
    """One per bridge. A command is committed when Kafka knows what came of it; commands finish in any order."""

    def __init__(
        self, settings: Settings, broker: Broker, deliveries: Deliveries, producer: Producer
    ) -> None:
        """`run` connects."""
        self._broker, self._deliveries, self._producer = broker, deliveries, producer
        self._settings = settings
        group_id = keys.bridge_group_id(settings.app)
        self._source = Source(settings, group_id, [keys.DELIVERIES_TOPIC], self._carry_out)

    async def run(self) -> NoReturn:
        """Until cancelled."""
        await self._source.run()

    # -- commands

    async def _carry_out(self, record: Any, done: Callable[[], None]) -> None:
        try:
            command = codec.decode_command(record.value)
            ticket = self._ticket(command, record.timestamp, done)
        except DecodeError as error:
            await self._bury(record, str(error), done)
            return
        if not self._deliveries.good(ticket):
            return
        if isinstance(command, Deliver) and codec.topic_name_error(command.topic) is not None:
            self._deliveries.fail(ticket, "bridge")
        else:
            await self._broker.take(ticket, command)

    def _ticket(self, command: Command, log_ms: int, done: Callable[[], None]) -> Ticket:
        """The paper of a command.

        Raises:
            DecodeError: it names a lease that there cannot be.
        """
        valid_until_ms = log_ms + command.valid_for_s * 1000
        if not isinstance(command, Deliver):
            return Ticket(command.client_id, None, 0, "", valid_until_ms, done)
        if command.expires_at is not None:
            valid_until_ms = min(valid_until_ms, command.expires_at)
        return Ticket(
            command.client_id, self._lease(command.lease), command.epoch, command.message_id,
            valid_until_ms, done,
        )  # fmt: skip

    def _lease(self, name: str) -> Lease | None:
        if not name:
            return None
        lease = parse_lease(name)
        if lease.partition >= self._settings.kafka.partitions:
            raise DecodeError(f"the lease {name!r} names a partition that there is not")
        return lease

    async def _bury(self, record: Any, reason: str, done: Callable[[], None]) -> None:
        """Only agents write here: it is a newer one's, or somebody else's."""
        headers = headers_of(record.topic, record.partition, record.offset, "bridge", reason)
        acknowledged = await self._producer.send(
            keys.DEAD_LETTERS_TOPIC, record.key, record.value, None, headers
        )
        acknowledged.add_done_callback(lambda _: done())
