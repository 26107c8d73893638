"""Reads from `mqtt.deliveries` what a broker is to do, and commits what is done."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn, Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from agents.dead_letters import headers_of
from pipeline.brokers.deliveries import Deliveries
from pipeline.brokers.ledger import Ledger
from pipeline.brokers.tickets import Ticket
from pipeline.clock import now_ms
from pipeline.log import persist
from pipeline.producer import Producer
from pipeline.settings import Settings
from pipeline.telemetry.histogram import SHORT_S, Histogram
from pipeline.telemetry.tracing import BridgeTracing
from schemas import codec, keys
from schemas.commands import Command, Deliver
from schemas.errors import DecodeError
from schemas.leases import Lease, parse_lease

logger = logging.getLogger(__name__)

RECORDS_MAX: Final = 500  # of one turn
# A command that comes meanwhile is read at once; this is how soon one that finished is committed.
POLL_TIMEOUT_MS: Final = 100
COMMIT_INTERVAL_S: Final = 0.1
STOP_TIMEOUT_S: Final = 1.0  # for a last commit: what it misses is carried out again


class Broker(Protocol):
    """What carries commands out."""

    async def take(self, ticket: Ticket, command: Command) -> None:
        """A command takes its place among those of its client; a report, or `ticket.done`, follows when it is done."""


class Commander(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """One per bridge. A command is committed when Kafka knows what came of it; commands finish in any order."""

    def __init__(
        self,
        settings: Settings,
        broker: Broker,
        deliveries: Deliveries,
        producer: Producer,
        tracing: BridgeTracing | None = None,
    ) -> None:
        """`run` connects."""
        self._tracing = tracing
        self._broker, self._deliveries, self._producer = broker, deliveries, producer
        self._settings = settings
        self._ledgers: dict[TopicPartition, Ledger] = {}
        self._commit_at = 0.0
        self.taken: Counter[str] = Counter()  # by type
        self.seconds = Histogram(SHORT_S)  # from a command's log time until it is finished

    @property
    def unfinished(self) -> int:
        """Commands of which Kafka does not know yet what became of them."""
        return sum(ledger.unfinished for ledger in self._ledgers.values())

    async def run(self) -> NoReturn:
        """Until cancelled."""
        self._consumer = AIOKafkaConsumer(
            group_id=keys.bridge_group_id(self._settings.app),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(self._settings.worker.session_timeout_s * 1000),
            heartbeat_interval_ms=int(self._settings.worker.session_timeout_s * 1000 / 4),
            **self._settings.kafka.client_options(),
        )
        self._consumer.subscribe([keys.DELIVERIES_TOPIC], listener=self)
        await persist(self._consumer.start)
        try:
            while True:
                await self._turn()
        finally:
            await self._stop()

    async def _turn(self) -> None:
        fetched = await self._consumer.getmany(timeout_ms=POLL_TIMEOUT_MS, max_records=RECORDS_MAX)
        for partition, records in fetched.items():
            ledger = self._ledgers.setdefault(partition, Ledger(records[0].offset))
            for record in records:
                await self._carry_out(record, ledger)
        self._hold_back()
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._commit_at:
            self._commit_at = now_s + COMMIT_INTERVAL_S
            await self._commit()

    def _hold_back(self) -> None:
        """Read no more of a partition while too much of it is unfinished."""
        for partition in self._consumer.assignment():
            ledger = self._ledgers.get(partition)
            if ledger is not None and ledger.full:
                self._consumer.pause(partition)
            else:
                self._consumer.resume(partition)

    async def _commit(self) -> None:
        """What is not committed comes again, as a duplicate."""
        assigned = self._consumer.assignment()
        offsets = {
            partition: offset
            for partition, ledger in self._ledgers.items()
            if partition in assigned and (offset := ledger.due()) is not None
        }
        if not offsets:
            return
        ledgers = {partition: self._ledgers[partition] for partition in offsets}
        try:
            await self._consumer.commit(offsets)
        except KafkaError as error:
            logger.warning("commands carried out are not committed yet: %r", error)
            return
        for partition, offset in offsets.items():
            ledgers[partition].committed(offset)

    async def _stop(self) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._commit()
        except TimeoutError:
            logger.warning("the last commands are not committed: they come again")
        await self._consumer.stop()

    def on_partitions_revoked(self, revoked: Any) -> None:
        """What is not committed is read again by whoever gets the partition."""
        self._ledgers.clear()

    def on_partitions_assigned(self, assigned: Any) -> None:
        """Reading goes on from what was committed."""

    # -- commands

    async def _carry_out(self, record: Any, ledger: Ledger) -> None:
        size = len(record.value or b"")
        ledger.begin(record.offset, size)
        done: Callable[[], None] = partial(self._finish, ledger, record.offset, record.timestamp)
        try:
            command = codec.decode_command(record.value)
            done = self._traced(record, command, done)
            ticket = self._ticket(command, record.timestamp, done)
        except DecodeError as error:
            await self._bury(record, str(error), done)
            self.taken["unreadable"] += 1
            return
        self.taken[str(command.__struct_config__.tag)] += 1
        if not self._deliveries.good(ticket):
            return
        if isinstance(command, Deliver) and codec.topic_name_error(command.topic) is not None:
            self._deliveries.fail(ticket, "bridge")
        else:
            await self._broker.take(ticket, command)

    def _traced(
        self, record: Any, command: Command, done: Callable[[], None]
    ) -> Callable[[], None]:
        """What to call in the end, if the command is a part of a trace."""
        if self._tracing is None:
            return done
        span = self._tracing.deliver(record.headers, command)
        if span is None:
            return done

        def finish() -> None:
            span.end()
            done()

        return finish

    def _finish(self, ledger: Ledger, offset: int, log_ms: int) -> None:
        self.seconds.add(max(now_ms() - log_ms, 0) / 1000)
        ledger.finish(offset)

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
