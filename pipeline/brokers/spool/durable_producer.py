"""What a broker told a bridge, into Kafka; while Kafka does not answer, onto the bridge's disk first.

Everything that is entered has one order: what is in the spool, then what waits in memory. One task takes the events in
that order and hands them to the producer; it takes from memory only when nothing in the spool is left to take. The
mode says no more than what else is done to those in memory:

- direct: nothing; an event is kept when Kafka has acknowledged it;
- spooling: all that is not kept is written to the spool, and is kept then. It begins when an event has waited for
  `patience_s`, or too many bytes wait; it ends when Kafka acknowledges again and the spool has nothing left to take.

What is written while the producer has it already is not taken a second time. What Kafka has acknowledged is discarded
from the spool. After kill -9 everything not yet discarded is sent again: in order, some of it for the second time.

The one case in which events of a key may change places: Kafka takes no batches of `BATCH_BYTES_MAX`, and so refuses
some that hold more than one record. They are sent again, one by one, and what was behind them may be there already.
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
    AGAIN_S,
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

# EMQX waits for 5 s by default, and takes what was not answered then for a success.
PATIENCE_S: Final = 2.0
CHECK_INTERVAL_S: Final = 0.1  # how much later it may be noticed that Kafka does not answer
COLLECT_S: Final = 0.005  # events wait for company on their way to the disk; a commit takes as long
DISCARD_INTERVAL_S: Final = 0.25
# Of events in memory that are not kept; twice as much if the disk is slow. Then they are refused.
UNKEPT_BYTES_MAX: Final = 8 * 1024 * 1024
COMMIT_BYTES_MAX: Final = 4 * 1024 * 1024  # written to the spool at once: about 50 ms


class DurableProducer:
    """One per bridge process. Its order of events is that of the calls of `enter`."""

    def __init__(self, producer: Producer, spool: Spool, patience_s: float = PATIENCE_S) -> None:
        """`spool` is open; `producer` is not started: `run` does it, however long Kafka is away."""
        self._producer, self._spool, self._patience_s = producer, spool, patience_s
        # By hook: what was entered, what of it was written to the spool, and what nobody will ever have.
        self.entered: Counter[str] = Counter()
        self.spooled: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self._sender = SpoolSender(producer, spool, self.lost, self._keep)
        self.connected = self._sender.connected  # the producer is started
        self.spooling = any(source.untaken for source in self._sender.sources)
        self._unkept: OrderedDict[PendingEvent, None] = (
            OrderedDict()
        )  # neither in Kafka nor in the spool
        self._unkept_bytes = 0
        self._writing: asyncio.Future[int] | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._broken: str | None = None  # why the spool could not be written last time
        self._broken_until = 0.0
        self._full_at: int | None = None  # how many bytes the spool had when it was full
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
        """One event. The future is done when Kafka or the spool has it; nobody needs to wait for it.

        Raises:
            NotKept: the future does, not the call.
        """
        loop = asyncio.get_running_loop()
        key = keys.record_key(event).encode()
        record = SpoolRecord(topic, key, codec.encode(event), partition, hook)
        entry = PendingEvent(record, loop.time(), loop.create_future())
        entry.headers = headers
        assert entry.kept is not None
        self.entered[hook] += 1
        error = self._why_not(entry)
        if error is not None:
            self.lost[hook] += 1
            entry.answer(error)
            return entry.kept
        self._unkept[entry] = None
        self._unkept_bytes += entry.size
        self._sender.queue.append(entry)
        self._sender.wake()
        if not self.spooling and self._unkept_bytes > UNKEPT_BYTES_MAX:
            self._begin_spooling(f"{self._unkept_bytes} bytes wait for Kafka")
        elif self.spooling:
            self._write_soon()
        return entry.kept

    def _why_not(self, entry: PendingEvent) -> NotStored | None:
        """Why an event cannot be kept, as far as that is known without trying."""
        key, value = entry.record.key, entry.record.value
        size = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, list(entry.headers))
        if size > self._producer.message_bytes_max:
            return NotStored("too_large", f"a record of {size} bytes is larger than Kafka takes")
        if self._closed:
            return NotStored("unwritable", "the bridge has ended")
        if not self.spooling:
            return None
        if self._broken is not None and entry.entered_at < self._broken_until:
            return NotStored("unwritable", self._broken)
        if self._unkept_bytes + entry.size > 2 * UNKEPT_BYTES_MAX:
            return NotStored("unwritable", f"{self._unkept_bytes} bytes wait for the disk")
        if self._spool.own.bytes + self._unkept_bytes + entry.size > self._spool.bytes_max:
            self._full_at = self._spool.own.bytes
            return NotStored("full", self._fullness())
        return None

    # -- how it is

    @property
    def complaint(self) -> str | None:
        """Why events are refused; None if all is well."""
        if self._broken is not None:
            return f"the spool cannot be written: {self._broken}"
        full = self._full_at is not None and self._spool.own.bytes >= self._full_at
        return self._fullness() if full else None

    @property
    def depth(self) -> tuple[int, int]:
        """Records in the spool, and their bytes: the own file and those that others left."""
        files = [source.file for source in self._sender.sources]
        return sum(file.last - file.discarded for file in files), sum(file.bytes for file in files)

    def _fullness(self) -> str:
        own = self._spool.own
        return f"the spool is full: {own.bytes} of {self._spool.bytes_max} bytes in {own.path}"

    # -- running

    async def run(self) -> NoReturn:
        """Send what is entered, until cancelled.

        Raises:
            KafkaError: the producer cannot go on; everything is where it was.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sender.run())
            tasks.create_task(self._watch())
            tasks.create_task(self._tidy())
        raise AssertionError("none of them ever returns")

    async def close(self, grace_s: float | None = None) -> None:
        """When `run` was cancelled: what Kafka has not taken `grace_s` later (default: the patience) goes to the spool.

        What the producer has then, it may still send: stop it afterwards. What is entered after this is refused.
        """
        sending = asyncio.create_task(self._sender.run())
        deadline = asyncio.get_running_loop().time() + (
            self._patience_s if grace_s is None else grace_s
        )
        while self._unkept_bytes and not sending.done():
            if asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(COLLECT_S)
        self._closed = True
        sending.cancel()
        await asyncio.wait((sending,))
        if not sending.cancelled() and sending.exception() is not None:
            logger.error("while closing: %r", sending.exception())
        self.spooling, self._broken = True, None
        await self._write_all()
        for source in self._sender.sources[:-1]:
            await self._tidy_left(source)
        if self._write_timer is not None:
            self._write_timer.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._spool.close)

    async def _write_all(self) -> None:
        """All that is not kept, as far as the spool has room; and what Kafka has is discarded."""
        if self._writing is not None:
            await asyncio.wait((self._writing,))
        while self._broken is None:
            before = self._unkept_bytes
            self._write()
            if self._writing is None:
                break
            await asyncio.wait((self._writing,))
            if self._unkept_bytes == before:
                break
        if self._unkept:
            logger.error("%d events are neither in Kafka nor in the spool", len(self._unkept))

    # -- keeping

    def _keep(self, entry: PendingEvent) -> None:
        """Nothing can happen to it any more."""
        if entry in self._unkept:
            del self._unkept[entry]
            self._unkept_bytes -= entry.size
            entry.answer(None)

    async def _watch(self) -> NoReturn:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self._check(asyncio.get_running_loop().time())

    def _check(self, now: float) -> None:
        first = next(iter(self._unkept), None)
        if self.spooling:
            if self._sender.acknowledges(now, self._patience_s):
                self.spooling = False
                logger.info("Kafka answers, and has all of the spool")
        elif first is not None and now - first.entered_at >= self._patience_s:
            self._begin_spooling(f"Kafka has not answered for {self._patience_s:g} s")
        if self._write_timer is None and now >= self._broken_until:
            self._write()

    def _begin_spooling(self, why: str) -> None:
        logger.warning("%s: events go to the spool, %s", why, self._spool.own.path)
        self.spooling = True
        self._write()

    def _write_soon(self) -> None:
        if self._writing is None and self._write_timer is None:
            self._write_timer = asyncio.get_running_loop().call_later(COLLECT_S, self._write)

    def _write(self) -> None:
        """What is not kept, if we are spooling; and what Kafka has goes."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self._writing is not None:
            return
        own, batch = self._spool.own, self._batch() if self.spooling else []
        discard = self._sender.acknowledged(self._sender.own)
        if batch or discard > own.discarded or not own.is_open:
            records = [entry.record for entry in batch]
            self._writing = self._spool.submit(own.keep, records, discard)
            self._writing.add_done_callback(partial(self._written, batch))

    def _batch(self) -> list[PendingEvent]:
        """The first of those not kept, as many as one commit takes. What the spool has no room for is refused."""
        batch: list[PendingEvent] = []
        size = 0
        for entry in self._unkept:
            if batch and size + entry.size > COMMIT_BYTES_MAX:
                break
            if self._spool.own.bytes + size + entry.size > self._spool.bytes_max:
                self._full_at = self._spool.own.bytes
                self._refuse(NotStored("full", self._fullness()), besides=len(batch))
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
            self._not_written(str(error))
            return
        except SpoolDamaged:  # the log says so
            self._sender.give_up_file(self._sender.own)
            self._write()
            return
        self._broken = None
        own, queue = self._sender.own, self._sender.queue
        for number, entry in enumerate(batch, first):
            self.spooled[entry.record.hook] += 1
            entry.source, entry.number, own.last = own, number, number
            if entry.taken_at:
                own.taken = number
            self._keep(entry)
        while queue and queue[0].source is not None:
            queue.popleft()
        if self.spooling and self._unkept_bytes:
            self._write_soon()

    def _not_written(self, why: str) -> None:
        if self._broken is None:
            logger.error("the spool cannot be written: %s", why)
        self._broken = why
        self._broken_until = asyncio.get_running_loop().time() + AGAIN_S
        if self.spooling:
            self._refuse(NotStored("unwritable", why))

    def _refuse(self, error: NotStored, besides: int = 0) -> None:
        """All that is not kept but for the first ones. What the producer has already may still come into Kafka."""
        for entry in list(self._unkept)[besides:]:
            entry.answer(error)
            if not entry.taken_at:
                self.lost[entry.record.hook] += 1
                self._keep(entry)
        queue = self._sender.queue
        self._sender.queue = deque(entry for entry in queue if entry in self._unkept)

    async def _tidy(self) -> None:
        """What Kafka has of what others left goes, and at last their files."""
        while len(self._sender.sources) > 1:
            await asyncio.sleep(DISCARD_INTERVAL_S)
            for source in self._sender.sources[:-1]:
                await self._tidy_left(source)

    async def _tidy_left(self, source: SpoolSource) -> None:
        through = self._sender.acknowledged(source)
        try:
            if through >= source.last:
                await self._spool.release(source.file)
                self._sender.sources.remove(source)
            elif through > source.file.discarded:
                await self._spool.submit(source.file.keep, (), through)
        except SpoolDown as error:
            logger.warning("%s; trying again", error)
        except SpoolDamaged:  # the log says so
            self._sender.give_up_file(source)
