"""Reports: the results of copies, as events in the log.

Many `sent` of one agent and partition share one record (`deliveries.sent`). The order of the records:

- Within a partition `sent` and `failed` keep the order in which they were added.
- A copy's `sent` precedes its acknowledgement (`message.acked`). So the agent knows the copy's alias when it reads the
  acknowledgement.

A report passes two stations, and each can be waited for: `on_entered` (it has its place in the order of events) and
`on_kept` (Kafka or the spool has stored it).

ON a refusal by Kafka:

1. Enter nothing new, and wait for the answers to all reports that were entered. So the order holds behind the refused one.
   A batch that is on its way already may overtake it.
2. Send each refused report alone, in their order, with back-off, until Kafka has it.
3. If a report alone is too large, halve it. A report of one copy is hardly larger than its command, which Kafka has taken.
   So only a limit that was lowered since makes it too large. It is then given up, with a line in the log: its agent delivers
   again after the lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn, Protocol, TypeAlias

from aiokafka.errors import KafkaError
from msgspec import structs

from millpond.pipeline.brokers.spool.sender import NotStored
from millpond.pipeline.clock import now_ms
from millpond.pipeline.kafka.producer import TOO_LARGE, has_ended
from millpond.schemas.events import (
    DeliveriesSent,
    DeliveryFailed,
    MembersActive,
    MessageAcked,
    Sent,
)
from millpond.schemas.leases import LeaseName

logger = logging.getLogger(__name__)

# How long reports are collected before a flush. An acknowledgement takes as long to reach Kafka anyway.
COLLECT_S: Final = 0.003
RETRY_FIRST_S: Final = (
    1.0  # before a refused report is sent again; doubled with each refusal in a row
)
RETRY_MAX_S: Final = 30.0  # an operator who mends the topic waits no longer for the effect
SENT_MAX: Final = 500  # copies in one record
# Client and message ids in one record. JSON escapes make at most six times as much of them, so a record stays
# below 1 MiB even with one copy more.
SENT_BYTES_MAX: Final = 64 * 1024

Call = Callable[[], None]
ReportedEvent: TypeAlias = DeliveriesSent | DeliveryFailed | MessageAcked | MembersActive


class EventSink(Protocol):
    """The bridge's way for reports into the log: straight to Kafka, or through the spool."""

    node: str

    async def enter(
        self, event: ReportedEvent, partition: int | None = None
    ) -> asyncio.Future[Any]:
        """Produce an event. The order of calls is the order in the log. The future is done when the event is stored.

        The call or the future may raise what `enter_alone` raises. Then the event may be refused because of others.
        """

    async def enter_alone(self, event: ReportedEvent, partition: int | None = None) -> None:
        """Produce an event that was refused before, with no other in its batch. Return when it is stored.

        Raises:
            KafkaError, NotStored: Kafka or the spool refuses this event.
        """


class ReportEntry(NamedTuple):
    """The result of one copy, and the calls that follow."""

    what: Sent | DeliveryFailed | MessageAcked
    lease: LeaseName | None  # None for an acknowledgement
    # Only for acknowledgements: `collected` drops it for a `Sent`.
    on_entered: Call | None = None
    on_kept: Call | None = None


class Report(NamedTuple):
    """One record, before it is produced."""

    event: ReportedEvent
    partition: int | None
    on_entered: tuple[Call, ...]
    on_kept: tuple[Call, ...]


class Reports:
    """Collects results and produces them as events. One per bridge.

    Its memory is bounded from outside: there is one entry for each unfinished command and each unacknowledged copy.

    State:

    - `_entries`: results that no flush has seen.
    - `_reports`: records that are not entered, in order.
    - `_unanswered`: the answers to records that were entered, as long as they are awaited.
    - `_refused`: records that were entered and refused, in order. Nothing is entered while there are any.
    """

    def __init__(self, event_producer: EventSink) -> None:
        self._event_producer = event_producer
        self._entries: list[ReportEntry] = []
        self._reports: deque[Report] = deque()
        self._refused: deque[Report] = deque()
        self._added = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._unanswered: set[asyncio.Future[Any]] = set()

    def add(self, entry: ReportEntry) -> None:
        """Report this with the next flush."""
        self._entries.append(entry)
        self._added.set()

    def add_event(self, event: MembersActive, partition: int) -> None:
        """Produce this with the next flush."""
        self._reports.append(Report(event, partition, (), ()))
        self._added.set()

    async def run(self) -> NoReturn:
        """Flush whenever something was added or refused, until cancelled.

        Raises:
            KafkaError: the producer has ended.
        """
        while True:
            await self._added.wait()
            await asyncio.sleep(COLLECT_S)
            await self.flush()

    async def flush(self) -> None:
        """Produce everything added so far, and what was refused. This does not wait for the other answers.

        Raises:
            KafkaError: the producer has ended.
        """
        async with self._flushing:
            self._added.clear()
            entries, self._entries = self._entries, []
            self._reports.extend(collected(entries, self._event_producer.node, now_ms()))
            # A report leaves its queue after it was produced: a flush that is cancelled loses none.
            while self._refused or self._reports:
                if self._refused:
                    await self._send_refused()
                else:
                    await self._enter_next()

    async def settle(self) -> None:
        """Produce everything added so far, and wait until each record is stored or refused."""
        await self.flush()
        if self._unanswered:
            await asyncio.wait(set(self._unanswered))

    async def _enter_next(self) -> None:
        report = self._reports[0]
        try:
            answer = await self._event_producer.enter(report.event, report.partition)
        except KafkaError as error:
            if _is_too_large(error):
                _halve(self._reports, error)
                return
            if has_ended(error):
                raise
            self._refused.append(report)
        else:
            self._unanswered.add(answer)
            answer.add_done_callback(partial(self._note_answer, report))
        self._reports.popleft()
        _call(report.on_entered)

    def _note_answer(self, report: Report, answer: asyncio.Future[Any]) -> None:
        self._unanswered.discard(answer)
        if answer.cancelled():
            return
        if answer.exception() is None:
            _call(report.on_kept)
        else:
            # Kafka refuses a whole batch because of one of its records. This report may not be that one.
            self._refused.append(report)
            self._added.set()

    async def _send_refused(self) -> None:
        if self._unanswered:
            await asyncio.wait(set(self._unanswered))
            await asyncio.sleep(0)  # their callbacks run now
        pause_s = RETRY_FIRST_S
        while self._refused:
            report = self._refused[0]
            try:
                await self._event_producer.enter_alone(report.event, report.partition)
            except (KafkaError, NotStored) as error:
                if _is_too_large(error):
                    _halve(self._refused, error)
                    continue
                if has_ended(error):
                    raise
                logger.warning("a report is refused, sending again in %g s: %r", pause_s, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            else:
                self._refused.popleft()
                _call(report.on_kept)
                pause_s = RETRY_FIRST_S


def _is_too_large(error: Exception) -> bool:
    """True if a record that was sent alone would be refused so at every attempt."""
    if isinstance(error, NotStored):
        return error.reason == "too_large"
    return isinstance(error, TOO_LARGE)


def _halve(queue: deque[Report], error: Exception) -> None:
    """Replace the first report, which is too large, by its halves. A report of one result is given up."""
    report = queue.popleft()
    event = report.event
    for name in ("sent", "client_ids"):
        items = getattr(event, name, ())
        if len(items) > 1:
            first = structs.replace(event, **{name: items[: len(items) // 2]})
            second = structs.replace(event, **{name: items[len(items) // 2 :]})
            # What waits for the whole waits for the second half: they are stored in order.
            queue.appendleft(report._replace(event=second))
            queue.appendleft(report._replace(event=first, on_kept=(), on_entered=()))
            return
    logger.error(
        "a report is dropped, Kafka would never take it: %r; its agent delivers again after the lease;"
        " raise message_bytes_max in [kafka] and of the topic: %.200r",
        error, event,
    )  # fmt: skip
    _call(report.on_entered)
    _call(report.on_kept)


def _call(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def collected(entries: Iterable[ReportEntry], node: str, at_ms: int) -> list[Report]:
    """Turn entries into records, in the order that the head of this file names. Acknowledgements come last."""
    batches: dict[tuple[str, int], _Batch] = {}
    reports: list[Report] = []
    acknowledgements: list[Report] = []

    def close(lease: LeaseName) -> None:
        batch = batches.pop((lease.agent, lease.partition), None)
        if batch is not None:
            reports.append(batch.report(node, at_ms))

    for entry in entries:
        match entry.what:
            case MessageAcked() as event:
                acknowledgements.append(_alone(event, None, entry))
            case DeliveryFailed() as event:
                assert entry.lease is not None, "only commands with a lease are reported"
                # The failure must follow the copies that were sent before it.
                close(entry.lease)
                reports.append(_alone(event, entry.lease.partition, entry))
            case Sent():
                assert entry.lease is not None, "only commands with a lease are reported"
                lease = entry.lease
                batch = batches.setdefault((lease.agent, lease.partition), _Batch(lease))
                if batch.add(entry):
                    close(lease)
    reports.extend(batch.report(node, at_ms) for batch in batches.values())
    return reports + acknowledgements


def _alone(
    event: DeliveryFailed | MessageAcked, partition: int | None, entry: ReportEntry
) -> Report:
    on_entered = () if entry.on_entered is None else (entry.on_entered,)
    on_kept = () if entry.on_kept is None else (entry.on_kept,)
    return Report(event, partition, on_entered, on_kept)


class _Batch:
    """The copies that will share one `deliveries.sent` record."""

    def __init__(self, lease: LeaseName) -> None:
        self._lease = lease
        self._sent: list[Sent] = []
        self._on_kept: list[Call] = []
        self._bytes = 0

    def add(self, entry: ReportEntry) -> bool:
        """Add a copy. True if the record is full now."""
        assert isinstance(entry.what, Sent), "the caller checked the type"
        self._sent.append(entry.what)
        if entry.on_kept is not None:
            self._on_kept.append(entry.on_kept)
        self._bytes += len(entry.what.client_id.encode()) + len(entry.what.message_id.encode())
        return len(self._sent) >= SENT_MAX or self._bytes >= SENT_BYTES_MAX

    def report(self, node: str, at_ms: int) -> Report:
        """Make the record."""
        event = DeliveriesSent(at=at_ms, node=node, agent=self._lease.agent, sent=tuple(self._sent))
        return Report(event, self._lease.partition, (), tuple(self._on_kept))
