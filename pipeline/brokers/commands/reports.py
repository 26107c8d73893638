"""Reports: the results of copies, as events in the log.

Many `sent` of one agent and partition share one record (`deliveries.sent`). The order of the records:

- Within a partition `sent` and `failed` keep the order in which they were added.
- A copy's `sent` precedes its acknowledgement (`message.acked`). So the agent knows the copy's alias when it reads the
  acknowledgement.

A report passes two stations, and each can be waited for: `on_entered` (it has its place in the order of events) and
`on_kept` (Kafka or the spool has stored it).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn, Protocol, TypeAlias

from aiokafka.errors import KafkaError

from millpond.pipeline.clock import now_ms
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
RETRY_S: Final = 1.0  # before a report that Kafka refused is produced again
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

        Raises:
            KafkaError: Kafka would refuse the event at every attempt, because it is too large.
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
    """

    def __init__(self, event_producer: EventSink) -> None:
        self._event_producer = event_producer
        self._entries: list[ReportEntry] = []
        self._reports: deque[Report] = deque()
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
        """Flush whenever something was added, until cancelled."""
        while True:
            await self._added.wait()
            await asyncio.sleep(COLLECT_S)
            await self.flush()

    async def flush(self) -> None:
        """Produce everything added so far. This does not wait until it is stored."""
        async with self._flushing:
            self._added.clear()
            entries, self._entries = self._entries, []
            self._reports.extend(collected(entries, self._event_producer.node, now_ms()))
            # A report leaves the queue after it was produced: a flush that is cancelled loses none.
            while self._reports:
                await self._enter(self._reports[0])
                self._reports.popleft()

    async def settle(self) -> None:
        """Produce everything added so far, and wait until each record is stored or refused."""
        await self.flush()
        if self._unanswered:
            await asyncio.wait(set(self._unanswered))

    async def _enter(self, report: Report) -> None:
        try:
            acknowledged = await self._event_producer.enter(report.event, report.partition)
        except KafkaError as error:
            # The report would be too large at every attempt. Its leases expire, and the agent delivers again.
            why = "a report is dropped, Kafka would never take it; its leases expire and the agent delivers again"
            logger.error("%s: %r", why, error)  # noqa: TRY400  no traceback
            _call(report.on_kept)
        else:
            self._unanswered.add(acknowledged)
            acknowledged.add_done_callback(partial(self._answered, report))
        _call(report.on_entered)

    def _answered(self, report: Report, acknowledged: asyncio.Future[Any]) -> None:
        self._unanswered.discard(acknowledged)
        if acknowledged.cancelled():
            return
        if acknowledged.exception() is None:
            _call(report.on_kept)
        else:
            # Kafka refuses a whole batch because of one of its records. This report may not be that one: retry it.
            again = report._replace(on_entered=())
            asyncio.get_running_loop().call_later(RETRY_S, self._retry, again)

    def _retry(self, report: Report) -> None:
        self._reports.append(report)
        self._added.set()


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
