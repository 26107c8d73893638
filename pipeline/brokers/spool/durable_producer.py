"""The durable producer: events go to Kafka, and while Kafka does not answer, to the bridge's disk first.

Concepts
--------

An event is *stored* when Kafka has acknowledged it, or when the spool has committed it with fsync. Its future is done
then, and EMQX gets its answer. Until then the event is *unstored*: a crash would lose it, but EMQX has no answer yet.

All events of a process have one *order*, the order of the calls of `enter`. At any moment it has three sections:

    orphans (spool files of ended processes) → own spool file → memory queue

The sender (`sender.py`) is one task. It *takes* events in this order and hands them to Kafka's producer. It takes from
memory only when every spool file is taken completely. A taken event is *in flight* until Kafka acknowledges it.

"Stored" and "taken" are independent. So a memory event is in one of these states:

| | not taken | taken |
|---|---|---|
| unstored | in the memory queue | in flight, only in the producer's memory |
| stored | in the own spool file | in flight, and in the own spool file |

Modes
-----

- *direct*: the disk is not used. Kafka's acknowledgement stores an event.
- *spooling*: every unstored event is also committed to the spool, taken or not.

The mode decides only about the disk. It does not change the order, and the sender does not know the mode.

Invariants
----------

1. Kafka's producer gets the events in the order of `enter`, so no event overtakes another (for the exception see below).
2. Each event is taken once per process. If it is committed while in flight, `taken` of the file moves past its number.
   This works because taken events form a prefix of the order, so they come first in a batch, too.
3. A record is discarded from a spool file only when Kafka has acknowledged it and all records before it, or has
   refused them for ever.
4. A stored event is lost only with its disk, or if Kafka refuses it for ever. `lost` counts it and the log names it.
5. After `kill -9` the next process sends everything not yet discarded: in order, some of it for a second time. The
   agents recognise a repeat by its id.
6. Memory is bounded: `2 * UNSTORED_BYTES_MAX` unstored, `IN_FLIGHT_BYTES_MAX` in flight, `WINDOW_BYTES_MAX` read ahead.

Transitions
-----------

ON enter(event):
  1. Refuse it if it cannot be stored: it is too large for Kafka, or the producer is closed. While spooling also: the
     last write failed less than a second ago, the disk is too slow, or the spool is full.
  2. Append it to the unstored events and to the memory queue, and wake the sender.
  3. direct: begin spooling if more than `UNSTORED_BYTES_MAX` bytes are unstored. spooling: write within `COLLECT_S`.

ON an acknowledgement by Kafka: the event is no longer in flight. It is stored, if it was not before.

ON a refusal by Kafka: wait until Kafka has answered for every event in flight, then send each refused event alone
  (`sender.py`). Reason: Kafka refuses a whole batch because of one record.

ON the check, every `CHECK_INTERVAL_S`:
  1. direct, and the oldest unstored event has waited for `patience_s`: begin spooling.
  2. spooling, every spool file is taken, and nothing has been in flight for longer than `patience_s`: become direct.
  3. Start a write, unless one is scheduled or failed less than `RETRY_S` ago. In direct mode this only discards.

ON the end of a write:
  1. Success: each event of the batch gets its number in the file, and is stored. Those not yet taken leave the memory
     queue, because the sender will read them from the file. Write the next batch if events are unstored.
  2. SpoolDown: refuse all unstored events, and try again after `RETRY_S`. Reason: EMQX takes a late answer for a
     success, so an honest refusal must come in time. An event in flight may reach Kafka although it was refused.
  3. SpoolDamaged: the file was moved aside. Count its untaken records as lost, and write the batch to the new file.

ON close: send for a grace period, then commit the unstored events to the spool, as far as it has room.

The exception to the order
--------------------------

If Kafka refuses a batch, its records are sent again, one by one. Later records of the same key may have reached Kafka
before. Kafka refuses a batch if it takes no batches of `BATCH_BYTES_MAX` (`pipeline/kafka/producer.py`), or if one of
the records is invalid.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from functools import partial
from typing import Final, NoReturn

from aiokafka.record.default_records import DefaultRecordBatchBuilder

from millpond.pipeline.brokers.spool.directory import Spool
from millpond.pipeline.brokers.spool.file import SpoolDamaged, SpoolDown, SpoolRecord
from millpond.pipeline.brokers.spool.sender import (
    RETRY_S,
    NotStored,
    PendingEvent,
    SpoolSender,
    SpoolSource,
)
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.telemetry.tracing import Headers
from millpond.schemas import codec, keys
from millpond.schemas.events import Event

__all__ = ["DurableProducer", "NotStored"]

logger = logging.getLogger(__name__)

# EMQX waits for 5 s by default. It takes a missing answer for a success.
PATIENCE_S: Final = 2.0
CHECK_INTERVAL_S: Final = 0.1  # the delay with which a silent Kafka is noticed, at most
COLLECT_S: Final = 0.005  # how long events are collected for one commit; a commit takes as long
DISCARD_INTERVAL_S: Final = 0.25  # between two discards from orphans
# Unstored events in memory. Above this, spooling begins; above twice as much (a slow disk), events are refused.
UNSTORED_BYTES_MAX: Final = 8 * 1024 * 1024
COMMIT_BYTES_MAX: Final = 4 * 1024 * 1024  # in one commit to the spool: about 50 ms


class DurableProducer:
    """One per bridge process; see the head of this file."""

    def __init__(self, producer: Producer, spool: Spool, patience_s: float = PATIENCE_S) -> None:
        """`spool` is open. `producer` is not started: `run` starts it, however long Kafka takes to answer."""
        self._producer, self._spool, self._patience_s = producer, spool, patience_s
        # Events by hook: entered, committed to the spool, and lost (refused, or refused by Kafka).
        self.entered: Counter[str] = Counter()
        self.spooled: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self._sender = SpoolSender(producer, spool, self.lost, self._store)
        self.connected = self._sender.connected  # set when the producer has started
        # The mode. After a restart with records in a spool file the order demands that new events go behind them.
        self.spooling = any(source.untaken for source in self._sender.sources)
        # Events that neither Kafka nor the spool has, in order. Refused events that are in flight stay in here, too.
        self._unstored: OrderedDict[PendingEvent, None] = OrderedDict()
        self._unstored_bytes = 0
        self._writing: asyncio.Future[int] | None = None  # the running commit; there is at most one
        self._write_timer: asyncio.TimerHandle | None = None  # the scheduled commit
        self._write_error: str | None = None  # why the last commit failed; None if it succeeded
        self._retry_write_at = 0.0  # loop time; events are refused at once until then
        # The size of the spool when it last refused an event because it was full.
        self._full_at: int | None = None
        self._closed = False

    # -- entering

    def enter(
        self,
        topic: str,
        event: Event,
        partition: int | None = None,
        *,
        hook: str,
        headers: Headers = (),
    ) -> asyncio.Future[None]:
        """Produce an event. The future is done when Kafka or the spool has stored it. The caller may ignore it.

        Raises:
            NotStored: the future raises it, never the call.
        """
        loop = asyncio.get_running_loop()
        key = keys.record_key(event).encode()
        record = SpoolRecord(topic, key, codec.encode(event), partition, hook)
        entry = PendingEvent(record, loop.time(), loop.create_future())
        entry.headers = headers
        assert entry.stored is not None
        self.entered[hook] += 1
        error = self._refusal(entry)
        if error is not None:
            self.lost[hook] += 1
            entry.resolve(error)
            return entry.stored
        self._unstored[entry] = None
        self._unstored_bytes += entry.size
        self._sender.queue.append(entry)
        self._sender.wake()
        if not self.spooling and self._unstored_bytes > UNSTORED_BYTES_MAX:
            self._begin_spooling(f"{self._unstored_bytes} bytes wait for Kafka")
        elif self.spooling:
            self._write_soon()
        return entry.stored

    def _refusal(self, entry: PendingEvent) -> NotStored | None:
        """The reason to refuse an event without an attempt; None if it may be stored."""
        key, value = entry.record.key, entry.record.value
        size = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, list(entry.headers))
        if size > self._producer.message_bytes_max:
            limit = self._producer.message_bytes_max
            return NotStored(
                "too_large", f"a record of {size} bytes is larger than Kafka's {limit}"
            )
        if self._closed:
            return NotStored("unwritable", "the bridge has ended")
        if not self.spooling:
            return None
        if self._write_error is not None and entry.entered_at < self._retry_write_at:
            return NotStored("unwritable", self._write_error)
        if self._unstored_bytes + entry.size > 2 * UNSTORED_BYTES_MAX:
            return NotStored("unwritable", f"{self._unstored_bytes} bytes wait for the disk")
        if self._spool.own.bytes + self._unstored_bytes + entry.size > self._spool.bytes_max:
            self._full_at = self._spool.own.bytes
            return NotStored("full", self._full_message())
        return None

    # -- status

    @property
    def complaint(self) -> str | None:
        """Why events are refused now; None if they are stored."""
        if self._write_error is not None:
            return f"the spool cannot be written: {self._write_error}"
        # The spool counts as full until it has become smaller than it was at the last refusal.
        full = self._full_at is not None and self._spool.own.bytes >= self._full_at
        return self._full_message() if full else None

    @property
    def depth(self) -> tuple[int, int]:
        """The number and the bytes of the records in the own spool file and in the orphans."""
        files = [source.file for source in self._sender.sources]
        return sum(file.last - file.discarded for file in files), sum(file.bytes for file in files)

    def _full_message(self) -> str:
        own = self._spool.own
        return f"the spool is full: {own.bytes} of {self._spool.bytes_max} bytes in {own.path}"

    # -- running

    async def run(self) -> NoReturn:
        """Send events until cancelled.

        Raises:
            KafkaError: the producer cannot send any more. No event is lost.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sender.run())
            tasks.create_task(self._watch())
            tasks.create_task(self._discard_from_orphans())
        raise AssertionError("the tasks run until they are cancelled")

    async def close(self, grace_s: float | None = None) -> None:
        """Send for `grace_s` (default: the patience), then commit the rest to the spool. Refuse events after this.

        Call it after `run` was cancelled. Stop the Kafka producer afterwards: it may still send what is in flight.
        """
        sending = asyncio.create_task(self._sender.run())
        deadline = asyncio.get_running_loop().time() + (
            self._patience_s if grace_s is None else grace_s
        )
        while self._unstored_bytes and not sending.done():
            if asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(COLLECT_S)
        self._closed = True
        sending.cancel()
        await asyncio.wait((sending,))
        if not sending.cancelled() and sending.exception() is not None:
            logger.error(
                "Kafka: %r while the bridge stops; events go to the spool", sending.exception()
            )
        self.spooling, self._write_error = True, None
        await self._write_all()
        for source in self._sender.sources[:-1]:
            await self._discard_from_orphan(source)
        if self._write_timer is not None:
            self._write_timer.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._spool.close)

    async def _write_all(self) -> None:
        """Commit all unstored events, as far as the spool has room, and discard what Kafka has."""
        if self._writing is not None:
            await asyncio.wait((self._writing,))
        while self._write_error is None:
            before = self._unstored_bytes
            self._write()
            if self._writing is None:
                break
            await asyncio.wait((self._writing,))
            # No progress: for example, what is left was refused but is in flight, and the spool is full.
            if self._unstored_bytes == before:
                break
        if self._unstored:
            logger.error(
                "%d events are neither in Kafka nor in the spool, they may be lost",
                len(self._unstored),
            )

    # -- storing

    def _store(self, entry: PendingEvent) -> None:
        """Note that Kafka or the spool has the event, or that it is given up. The first call counts."""
        if entry in self._unstored:
            del self._unstored[entry]
            self._unstored_bytes -= entry.size
            entry.resolve(None)

    async def _watch(self) -> NoReturn:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self._check(asyncio.get_running_loop().time())

    def _check(self, now: float) -> None:
        first = next(iter(self._unstored), None)
        if self.spooling:
            if self._sender.acknowledges(now, self._patience_s):
                self.spooling = False
                logger.info(
                    "Kafka answers again, and the whole spool was sent: events go directly to Kafka"
                )
        elif first is not None and now - first.entered_at >= self._patience_s:
            self._begin_spooling(f"Kafka has not answered for {self._patience_s:g} s")
        if self._write_timer is None and now >= self._retry_write_at:
            self._write()

    def _begin_spooling(self, why: str) -> None:
        logger.warning(
            "%s: events go to the spool, %s, until Kafka answers", why, self._spool.own.path
        )
        self.spooling = True
        self._write()

    def _write_soon(self) -> None:
        if self._writing is None and self._write_timer is None:
            self._write_timer = asyncio.get_running_loop().call_later(COLLECT_S, self._write)

    def _write(self) -> None:
        """Start a commit, unless one is running: append unstored events if spooling, and discard what Kafka has."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self._writing is not None:
            return
        own, batch = self._spool.own, self._batch() if self.spooling else []
        discard = self._sender.acknowledged(self._sender.own)
        # A file that is not open had an error: an empty commit shows whether it has recovered.
        if batch or discard > own.discarded or not own.is_open:
            records = [entry.record for entry in batch]
            self._writing = self._spool.submit(own.commit, records, discard)
            self._writing.add_done_callback(partial(self._written, batch))

    def _batch(self) -> list[PendingEvent]:
        """The oldest unstored events, as many as one commit takes. Refuse those for which the spool has no room."""
        batch: list[PendingEvent] = []
        size = 0
        for entry in self._unstored:
            if batch and size + entry.size > COMMIT_BYTES_MAX:
                break
            if self._spool.own.bytes + size + entry.size > self._spool.bytes_max:
                self._full_at = self._spool.own.bytes
                self._refuse(NotStored("full", self._full_message()), skip=len(batch))
                break
            batch.append(entry)
            size += entry.size
        return batch

    def _written(self, batch: list[PendingEvent], job: asyncio.Future[int]) -> None:
        self._writing = None
        self._sender.wake()
        try:
            first = job.result()
        except SpoolDown as error:
            self._write_failed(str(error))
            return
        except SpoolDamaged:  # `SpoolFile` has logged it
            self._sender.give_up_file(self._sender.own)
            self._write()
            return
        self._write_error = None
        own, queue = self._sender.own, self._sender.queue
        for number, entry in enumerate(batch, first):
            self.spooled[entry.record.hook] += 1
            entry.source, entry.number, own.last = own, number, number
            # Invariant 2: the sender must not read from the file what it has already taken from memory.
            if entry.taken_at:
                own.taken = number
            self._store(entry)
        # The sender reads these from the file.
        while queue and queue[0].source is not None:
            queue.popleft()
        if self.spooling and self._unstored_bytes:
            self._write_soon()

    def _write_failed(self, why: str) -> None:
        if self._write_error is None:
            logger.error("the spool cannot be written, events are refused until it can: %s", why)
        self._write_error = why
        self._retry_write_at = asyncio.get_running_loop().time() + RETRY_S
        if self.spooling:
            self._refuse(NotStored("unwritable", why))

    def _refuse(self, error: NotStored, skip: int = 0) -> None:
        """Refuse all unstored events but the first `skip`.

        An event in flight stays unstored. Kafka may still acknowledge it, or a later commit may store it, although
        its caller got the error.
        """
        for entry in list(self._unstored)[skip:]:
            entry.resolve(error)
            if not entry.taken_at:
                self.lost[entry.record.hook] += 1
                self._store(entry)
        queue = self._sender.queue
        self._sender.queue = deque(entry for entry in queue if entry in self._unstored)

    async def _discard_from_orphans(self) -> None:
        """Discard from the orphans what Kafka has, and delete those that are empty."""
        while len(self._sender.sources) > 1:
            await asyncio.sleep(DISCARD_INTERVAL_S)
            for source in self._sender.sources[:-1]:
                await self._discard_from_orphan(source)

    async def _discard_from_orphan(self, source: SpoolSource) -> None:
        through = self._sender.acknowledged(source)
        try:
            if through >= source.last:
                await self._spool.release(source.file)
                self._sender.sources.remove(source)
            elif through > source.file.discarded:
                await self._spool.submit(source.file.commit, (), through)
        except SpoolDown as error:
            logger.warning("%s; trying again in %g s", error, DISCARD_INTERVAL_S)
        except SpoolDamaged:  # `SpoolFile` has logged it
            self._sender.give_up_file(source)
