"""What is in the spool, then what waits in memory, to Kafka: one order, one task, and nothing twice."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, NoReturn, TypeAlias

from aiokafka.errors import (
    CorruptRecordException,
    InvalidTimestampError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    PolicyViolationError,
    ProducerClosed,
    ProducerFenced,
    RecordListTooLargeError,
    UnknownError,
    UnsupportedForMessageFormatError,
)

from millpond.pipeline.brokers.spool.directory import Spool
from millpond.pipeline.brokers.spool.file import (
    SpoolDamaged,
    SpoolDown,
    SpoolFile,
    SpoolRecord,
    size_of,
)
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.telemetry.tracing import Headers
from millpond.schemas.errors import MillpondError

logger = logging.getLogger(__name__)

AGAIN_S: Final = 1.0  # before what failed is tried again
# Of events that the producer has: more than a batch for each partition is only memory.
IN_FLIGHT_BYTES_MAX: Final = 4 * 1024 * 1024
WINDOW_BYTES_MAX: Final = 1024 * 1024  # read from the spool at once
SENT_IN_A_ROW_MAX: Final = 32  # then others have their turn: about 1 ms
# Counted as the hook of records in a file that was damaged or taken away.
LOST_IN_THE_SPOOL: Final = "spool"

# A record alone that Kafka refuses for these would be refused for ever.
RECORDS_FAULT: Final = (
    MessageSizeTooLargeError, RecordListTooLargeError, CorruptRecordException, InvalidTimestampError,
    InvalidTopicError, PolicyViolationError, UnsupportedForMessageFormatError,
)  # fmt: skip
# What aiokafka has no name for may be the record's fault, or pass.
UNKNOWN_ERROR_TRIES_MAX: Final = 30

Reason: TypeAlias = Literal["full", "unwritable", "too_large", "refused"]


class NotStored(MillpondError):
    """An event is neither in Kafka nor on the disk: whoever told of it must hear so."""

    def __init__(self, reason: Reason, what: str) -> None:
        """`full`, `unwritable`: of the spool; `too_large`, `refused`: Kafka will never have it."""
        self.reason = reason
        super().__init__(what)


class SpoolSource:
    """A spool file, and how far it was read. Numbers are those of its records."""

    def __init__(self, file: SpoolFile) -> None:
        """A file that is open."""
        self.file = file
        self.last, self.taken = file.last, file.discarded

    @property
    def untaken(self) -> bool:
        """Whether something in it is left to take."""
        return self.taken < self.last


class PendingEvent:
    """An event on its way."""

    __slots__ = (
        "entered_at", "headers", "kept", "number", "record", "size", "source", "taken_at", "tries",
    )  # fmt: skip

    def __init__(
        self, record: SpoolRecord, entered_at: float, kept: asyncio.Future[None] | None
    ) -> None:
        """`kept` is told what becomes of it, if anybody waits."""
        self.record, self.entered_at, self.kept = record, entered_at, kept
        self.size = size_of(record)
        self.source: SpoolSource | None = None  # if the spool has it: where, and as what
        self.number = 0
        self.taken_at = 0.0  # by the sender; 0: not yet
        self.tries = 0  # alone
        self.headers: Headers = ()  # of a trace; the spool does not keep them

    def answer(self, error: NotStored | None) -> None:
        """Tell whoever waits for it."""
        if self.kept is None or self.kept.done():
            return
        if error is None:
            self.kept.set_result(None)
        else:
            self.kept.set_exception(error)
            self.kept.exception()  # or asyncio complains that nobody asked


class SpoolSender:
    """Takes events and hands them to the producer; it takes from memory only when no file has anything left to take."""

    def __init__(
        self,
        producer: Producer,
        spool: Spool,
        lost: Counter[str],
        settled: Callable[[PendingEvent], None],
    ) -> None:
        """`settled` is called with what Kafka has, or never will; `lost` counts the latter by hook."""
        self._producer, self._spool, self._lost, self._settled = producer, spool, lost, settled
        self.own = SpoolSource(spool.own)
        self.sources = [*(SpoolSource(file) for file in spool.left), self.own]
        self.queue: deque[PendingEvent] = deque()  # what waits in memory, not taken yet
        self.connected = asyncio.Event()  # the producer is started
        self._in_flight: OrderedDict[PendingEvent, None] = (
            OrderedDict()
        )  # in the order they were taken
        self._in_flight_bytes = 0
        self._unanswered = 0  # futures of the producer
        self._refused: deque[PendingEvent] = deque()  # by Kafka, to be sent again
        self._sending = asyncio.Lock()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Something may have changed."""
        self._woken.set()

    def acknowledges(self, now: float, patience_s: float) -> bool:
        """Whether Kafka answers, and nothing in the spool is left to take."""
        if self._refused or not self.connected.is_set() or any(s.untaken for s in self.sources):
            return False
        first = next(iter(self._in_flight), None)
        return first is None or now - first.taken_at < patience_s

    def acknowledged(self, source: SpoolSource) -> int:
        """The number up to which Kafka has all records of a file."""
        if source.taken <= source.file.discarded:
            return source.file.discarded
        first = next((each for each in self._in_flight if each.source is source), None)
        return source.taken if first is None else first.number - 1

    async def run(self) -> NoReturn:
        """Until cancelled.

        Raises:
            KafkaError: the producer cannot go on.
        """
        async with self._sending:
            await self._connect()
            sent = 0
            while True:
                await self._room()
                source = next((each for each in self.sources if each.untaken), None)
                if source is not None:
                    await self._send_window(source)
                elif self.queue:
                    await self._send(self.queue.popleft())
                    sent += 1
                    if sent % SENT_IN_A_ROW_MAX == 0:
                        await asyncio.sleep(0)
                else:
                    self._woken.clear()
                    await self._woken.wait()

    async def _connect(self) -> None:
        while not self.connected.is_set():
            try:
                await self._producer.start()
            except (KafkaError, OSError) as error:
                logger.warning("Kafka: %r; trying again", error)
                await self._producer.stop()
                await asyncio.sleep(AGAIN_S)
            except asyncio.CancelledError:
                await self._producer.stop()
                raise
            else:
                self.connected.set()

    async def _room(self) -> None:
        """Until the producer may have more."""
        while self._refused or self._in_flight_bytes >= IN_FLIGHT_BYTES_MAX:
            if self._refused:
                await self._send_again()
            else:
                self._woken.clear()
                await self._woken.wait()

    async def _send_window(self, source: SpoolSource) -> None:
        try:
            found = await self._spool.submit(
                source.file.read, source.taken, source.last, WINDOW_BYTES_MAX
            )
        except SpoolDown as error:
            logger.warning("%s; trying again", error)
            await asyncio.sleep(AGAIN_S)
            return
        except SpoolDamaged:  # the log says so
            found = []
        self._lose_through(source, found[0][0] - 1 if found else source.last)
        now = asyncio.get_running_loop().time()
        for sent, (number, record) in enumerate(found, 1):
            await self._room()
            entry = PendingEvent(record, now, None)
            entry.source, entry.number = source, number
            await self._send(entry)
            if sent % SENT_IN_A_ROW_MAX == 0:
                await asyncio.sleep(0)

    def give_up_file(self, source: SpoolSource) -> None:
        """What it held is no longer there."""
        self._lose_through(source, source.last)

    def _lose_through(self, source: SpoolSource, number: int) -> None:
        if number > source.taken:
            self._lost[LOST_IN_THE_SPOOL] += number - source.taken
            source.taken = number

    async def _send(self, entry: PendingEvent) -> None:
        """Take one, and give it to the producer."""
        entry.taken_at = asyncio.get_running_loop().time()
        if entry.source is not None:
            entry.source.taken = entry.number
        self._in_flight[entry] = None
        self._in_flight_bytes += entry.size
        try:
            await self._produce(entry)
        except BaseException:
            self._put_back(entry)
            raise

    def _put_back(self, entry: PendingEvent) -> None:
        """The producer does not have it."""
        del self._in_flight[entry]
        self._in_flight_bytes -= entry.size
        entry.taken_at = 0.0
        if entry.source is not None:  # by now, at least
            entry.source.taken = entry.number - 1
        else:
            self.queue.appendleft(entry)

    async def _produce(self, entry: PendingEvent) -> None:
        topic, key, value, partition, _ = entry.record
        while True:
            try:
                acknowledged = await self._producer.send(
                    topic, key, value, partition, entry.headers
                )
            except (KafkaError, AssertionError) as error:
                if _hopeless(error, entry):
                    self._give_up(entry, error)
                    return
                await _pause(topic, error)
            else:
                self._unanswered += 1
                acknowledged.add_done_callback(partial(self._answered, entry))
                return

    def _answered(self, entry: PendingEvent, acknowledged: asyncio.Future[Any]) -> None:
        self._unanswered -= 1
        self._woken.set()
        if acknowledged.cancelled() or acknowledged.exception() is not None:
            self._refused.append(entry)
        else:
            self._settle(entry)

    async def _send_again(self) -> None:
        """Kafka refuses a whole batch for one record of it: each is tried alone, when nothing else is under way."""
        while self._unanswered:
            self._woken.clear()
            await self._woken.wait()
        while self._refused:
            await self._send_alone(self._refused[0])
            self._refused.popleft()

    async def _send_alone(self, entry: PendingEvent) -> None:
        topic, key, value, partition, _ = entry.record
        while True:
            entry.tries += 1
            try:
                await (await self._producer.send(topic, key, value, partition, entry.headers))
            except (KafkaError, AssertionError) as error:
                if _hopeless(error, entry):
                    self._give_up(entry, error)
                    return
                await _pause(topic, error)
            else:
                self._settle(entry)
                return

    def _settle(self, entry: PendingEvent) -> None:
        """The producer has done with it."""
        del self._in_flight[entry]
        self._in_flight_bytes -= entry.size
        self._settled(entry)

    def _give_up(self, entry: PendingEvent, error: Exception) -> None:
        topic, key, value, _, hook = entry.record
        sentence = f"Kafka will never take a record for {topic} of {len(value)} bytes, key {key!r}: {error!r}"
        logger.error("lost: %s", sentence)
        self._lost[hook] += 1
        too_large = isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError)
        entry.answer(NotStored("too_large" if too_large else "refused", sentence))
        self._settle(entry)


def _hopeless(error: Exception, entry: PendingEvent) -> bool:
    """Whether Kafka would refuse the record for ever.

    Raises:
        KafkaError: the producer would never send anything again.
    """
    if type(error) is KafkaError or isinstance(error, ProducerClosed | ProducerFenced):
        raise error
    if isinstance(error, UnknownError):
        return entry.tries >= UNKNOWN_ERROR_TRIES_MAX
    # aiokafka asserts that the topic has the partition.
    return isinstance(error, (*RECORDS_FAULT, AssertionError))


async def _pause(topic: str, error: Exception) -> None:
    logger.warning("Kafka: %r for %s; trying again", error, topic)
    await asyncio.sleep(AGAIN_S)
