"""The sender of the durable producer: one task that hands events to Kafka's producer, in order and once.

`durable_producer.py` describes the order, and the words *taken* and *in flight*. This file adds what happens to an
event after it was taken:

    take → in flight ─ acknowledged ──────────────────────────→ settled
                └─ refused → (nothing else in flight) → alone ─┬ acknowledged → settled
                                                               ├ permanent error → given up, settled
                                                               └ other error → alone again after `RETRY_S`

- Kafka refuses a whole batch because of one record. So the sender waits until the producer has answered for every
  event, and then sends each refused one alone.
- While a refused event waits, the sender takes nothing new. So the order holds behind it.
- An error is permanent if the same record would get it again (`PERMANENT_ERRORS`). aiokafka reports some errors as
  unknown; these count as permanent after `UNKNOWN_ERROR_TRIES_MAX` attempts.
"""

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
    PolicyViolationError,
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
from millpond.pipeline.kafka.producer import TOO_LARGE, Producer, has_ended
from millpond.pipeline.telemetry.tracing import Headers
from millpond.schemas.errors import MillpondError

logger = logging.getLogger(__name__)

RETRY_S: Final = 1.0  # before something that failed is tried again
# Events in flight. More than one batch for each partition would only cost memory.
IN_FLIGHT_BYTES_MAX: Final = 4 * 1024 * 1024
WINDOW_BYTES_MAX: Final = 1024 * 1024  # read from a spool file at once
SENT_IN_A_ROW_MAX: Final = 32  # then the loop serves other tasks: this takes about 1 ms
# The hook under which records of a damaged or deleted spool file are counted as lost.
LOST_IN_THE_SPOOL: Final = "spool"

# If Kafka refuses a record that was sent alone with one of these, it would refuse it for ever.
PERMANENT_ERRORS: Final = (
    *TOO_LARGE, CorruptRecordException, InvalidTimestampError, InvalidTopicError, PolicyViolationError,
    UnsupportedForMessageFormatError,
)  # fmt: skip
# An error that aiokafka does not know may be the record's fault, or may pass. 30 attempts take half a minute.
UNKNOWN_ERROR_TRIES_MAX: Final = 30

Reason: TypeAlias = Literal["full", "unwritable", "too_large", "refused"]


class NotStored(MillpondError):
    """An event is neither in Kafka nor on the disk. The broker must learn that its publish failed."""

    def __init__(self, reason: Reason, what: str) -> None:
        """`full` and `unwritable` concern the spool. `too_large` and `refused`: Kafka would never store the event."""
        self.reason = reason
        super().__init__(what)


class SpoolSource:
    """A spool file as the sender sees it. `taken` and `last` are numbers of records."""

    def __init__(self, file: SpoolFile) -> None:
        """`file` is open."""
        self.file = file
        # The sender counts these itself: the file's own figures change in another thread, before the event loop knows.
        self.last, self.taken = file.last, file.discarded

    @property
    def untaken(self) -> bool:
        """True if the file holds records that the sender has not taken."""
        return self.taken < self.last


class PendingEvent:
    """An event that Kafka does not have yet."""

    __slots__ = (
        "entered_at", "headers", "number", "record", "size", "source", "stored", "taken_at", "tries",
    )  # fmt: skip

    def __init__(
        self, record: SpoolRecord, entered_at: float, stored: asyncio.Future[None] | None
    ) -> None:
        """`stored` is None for an event that was read from a spool file."""
        self.record, self.entered_at, self.stored = record, entered_at, stored
        self.size = size_of(record)
        self.source: SpoolSource | None = None  # the spool file that holds the event, if one does
        self.number = 0  # of the record in that file
        self.taken_at = 0.0  # loop time; 0: not taken
        self.tries = 0  # attempts to send it alone
        self.headers: Headers = ()  # of a trace; the spool does not store them

    def resolve(self, error: NotStored | None) -> None:
        """Complete the future. The first call counts."""
        if self.stored is None or self.stored.done():
            return
        if error is None:
            self.stored.set_result(None)
        else:
            self.stored.set_exception(error)
            self.stored.exception()  # otherwise asyncio logs that the exception was never retrieved


class SpoolSender:
    """Takes events and hands them to Kafka's producer; see the head of this file."""

    def __init__(
        self,
        producer: Producer,
        spool: Spool,
        lost: Counter[str],
        settled: Callable[[PendingEvent], None],
    ) -> None:
        """Call `settled` with each event that Kafka has or refuses for ever. `lost` counts the latter by hook."""
        self._producer, self._spool, self._lost, self._settled = producer, spool, lost, settled
        self.own = SpoolSource(spool.own)
        self.sources = [*(SpoolSource(file) for file in spool.orphans), self.own]  # in order
        self.queue: deque[PendingEvent] = deque()  # the memory queue: events that are not taken
        self.connected = asyncio.Event()  # set when the producer has started
        # Events in flight, in the order in which they were taken. Refused ones stay here until they are settled.
        self._in_flight: OrderedDict[PendingEvent, None] = OrderedDict()
        self._in_flight_bytes = 0
        self._unanswered = 0  # events that the producer has neither acknowledged nor refused
        self._refused: deque[PendingEvent] = deque()  # to be sent alone
        self._sending = asyncio.Lock()  # `close` starts `run` once more; only one may send
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Let the sender look again for something to take."""
        self._woken.set()

    def acknowledges(self, now: float, patience_s: float) -> bool:
        """True if Kafka acknowledges within the patience, and every spool file is taken."""
        if self._refused or not self.connected.is_set() or any(s.untaken for s in self.sources):
            return False
        first = next(iter(self._in_flight), None)
        return first is None or now - first.taken_at < patience_s

    def acknowledged(self, source: SpoolSource) -> int:
        """The number up to which all records of a file are settled, so that they can be discarded."""
        if source.taken <= source.file.discarded:
            return source.file.discarded
        first = next((each for each in self._in_flight if each.source is source), None)
        return source.taken if first is None else first.number - 1

    async def run(self) -> NoReturn:
        """Connect, and send until cancelled.

        Raises:
            KafkaError: the producer cannot send any more.
        """
        async with self._sending:
            await self._connect()
            sent = 0
            while True:
                await self._wait_for_room()
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
                logger.warning("Kafka: %r; connecting again in %g s", error, RETRY_S)
                await self._producer.stop()
                await asyncio.sleep(RETRY_S)
            except asyncio.CancelledError:
                await self._producer.stop()
                raise
            else:
                self.connected.set()

    async def _wait_for_room(self) -> None:
        """Settle the refused events, and wait until the producer may get one more."""
        while self._refused or self._in_flight_bytes >= IN_FLIGHT_BYTES_MAX:
            if self._refused:
                await self._send_refused()
            else:
                self._woken.clear()
                await self._woken.wait()

    async def _send_window(self, source: SpoolSource) -> None:
        """Read some records from a spool file, and send them."""
        try:
            found = await self._spool.submit(
                source.file.read, source.taken, source.last, WINDOW_BYTES_MAX
            )
        except SpoolDown as error:
            logger.warning("%s; reading again in %g s", error, RETRY_S)
            await asyncio.sleep(RETRY_S)
            return
        except SpoolDamaged:  # `SpoolFile` has logged it
            found = []
        # Records that the file should hold, and does not: it was damaged, or deleted from outside.
        self._lose_through(source, found[0][0] - 1 if found else source.last)
        now = asyncio.get_running_loop().time()
        for sent, (number, record) in enumerate(found, 1):
            await self._wait_for_room()
            entry = PendingEvent(record, now, None)
            entry.source, entry.number = source, number
            await self._send(entry)
            if sent % SENT_IN_A_ROW_MAX == 0:
                await asyncio.sleep(0)

    def give_up_file(self, source: SpoolSource) -> None:
        """Count all untaken records of a file as lost."""
        self._lose_through(source, source.last)

    def _lose_through(self, source: SpoolSource, number: int) -> None:
        """Count the untaken records up to a number as lost."""
        if number > source.taken:
            self._lost[LOST_IN_THE_SPOOL] += number - source.taken
            source.taken = number

    async def _send(self, entry: PendingEvent) -> None:
        """Take an event, and hand it to the producer."""
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
        """Undo a take: the task was cancelled before the producer had the event."""
        del self._in_flight[entry]
        self._in_flight_bytes -= entry.size
        entry.taken_at = 0.0
        # The event may come from memory and have been committed to the spool since it was taken.
        if entry.source is not None:
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
                if _is_permanent(error, entry):
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

    async def _send_refused(self) -> None:
        """Wait until the producer has answered for every event, then send each refused event alone."""
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
                if _is_permanent(error, entry):
                    self._give_up(entry, error)
                    return
                await _pause(topic, error)
            else:
                self._settle(entry)
                return

    def _settle(self, entry: PendingEvent) -> None:
        """Remove an event that Kafka has, or that is given up."""
        del self._in_flight[entry]
        self._in_flight_bytes -= entry.size
        self._settled(entry)

    def _give_up(self, entry: PendingEvent, error: Exception) -> None:
        topic, key, value, _, hook = entry.record
        sentence = f"Kafka refuses a record for {topic} of {len(value)} bytes, key {key!r}, for ever: {error!r}"
        logger.error("an event is lost: %s", sentence)
        self._lost[hook] += 1
        too_large = isinstance(error, TOO_LARGE)
        entry.resolve(NotStored("too_large" if too_large else "refused", sentence))
        self._settle(entry)


def _is_permanent(error: Exception, entry: PendingEvent) -> bool:
    """True if Kafka would refuse the record at every attempt.

    Raises:
        KafkaError: the producer would refuse every record from now on.
    """
    if has_ended(error):
        raise error
    if isinstance(error, UnknownError):
        return entry.tries >= UNKNOWN_ERROR_TRIES_MAX
    # aiokafka asserts that the topic has the partition.
    return isinstance(error, (*PERMANENT_ERRORS, AssertionError))


async def _pause(topic: str, error: Exception) -> None:
    logger.warning("Kafka: %r for %s; sending again in %g s", error, topic, RETRY_S)
    await asyncio.sleep(RETRY_S)
