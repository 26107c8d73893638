"""What became of copies, into Kafka: many in one record, and a copy's `sent` before its acknowledgement."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from aiokafka.errors import KafkaError

from millpond.pipeline.clock import now_ms
from millpond.schemas.events import DeliveriesSent, DeliveryFailed, MessageAcked, Sent
from millpond.schemas.leases import LeaseName

logger = logging.getLogger(__name__)

COLLECT_S: Final = (
    0.003  # reports wait for company; an acknowledgement takes as long to reach Kafka anyway
)
AGAIN_S: Final = 1.0  # before what Kafka refused is entered again
SENT_MAX: Final = 500  # copies in one record
# Of their client and message ids: in JSON at most six times as much, and with one copy more below 1 MiB.
SENT_BYTES_MAX: Final = 64 * 1024

Call = Callable[[], None]


class EventSink(Protocol):
    """What a bridge enters its events with."""

    node: str

    async def enter(
        self, event: DeliveriesSent | DeliveryFailed | MessageAcked, partition: int | None = None
    ) -> asyncio.Future[Any]:
        """The future is done when the event is kept.

        Raises:
            KafkaError: it cannot be, ever.
        """


class ReportEntry(NamedTuple):
    """One thing to tell, and what to call when it is entered, or when Kafka has it."""

    what: Sent | DeliveryFailed | MessageAcked
    lease: LeaseName | None
    on_entered: Call | None = None
    on_kept: Call | None = None


class Report(NamedTuple):
    """One record to be."""

    event: DeliveriesSent | DeliveryFailed | MessageAcked
    partition: int | None
    on_entered: tuple[Call, ...]
    on_kept: tuple[Call, ...]


class Reports:
    """One per bridge. Whoever adds to it bounds it: there is one entry per unfinished command and un-acked copy."""

    def __init__(self, event_producer: EventSink) -> None:
        """`run` enters what was added."""
        self._event_producer = event_producer
        self._entries: list[ReportEntry] = []
        self._reports: deque[Report] = deque()
        self._added = asyncio.Event()
        self._flushing = asyncio.Lock()

    def add(self, entry: ReportEntry) -> None:
        """Tell it soon."""
        self._entries.append(entry)
        self._added.set()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        while True:
            await self._added.wait()
            await asyncio.sleep(COLLECT_S)
            await self.flush()

    async def flush(self) -> None:
        """Everything added so far is on its way to Kafka."""
        async with self._flushing:
            self._added.clear()
            entries, self._entries = self._entries, []
            self._reports.extend(collected(entries, self._event_producer.node, now_ms()))
            while self._reports:
                await self._enter(self._reports[0])
                self._reports.popleft()

    async def _enter(self, report: Report) -> None:
        try:
            acknowledged = await self._event_producer.enter(report.event, report.partition)
        except KafkaError as error:
            # It is too large, and would be again: the agent takes its leases back when it has waited long enough.
            logger.error("a report cannot be written: %r", error)  # noqa: TRY400  no traceback
            _call(report.on_kept)
        else:
            acknowledged.add_done_callback(partial(self._answered, report))
        _call(report.on_entered)

    def _answered(self, report: Report, acknowledged: asyncio.Future[Any]) -> None:
        """Kafka refuses a whole batch for one record of it: what was beside that one is entered again."""
        if acknowledged.cancelled():
            return
        if acknowledged.exception() is None:
            _call(report.on_kept)
        else:
            again = report._replace(on_entered=())
            asyncio.get_running_loop().call_later(AGAIN_S, self._enter_again, again)

    def _enter_again(self, report: Report) -> None:
        self._reports.append(report)
        self._added.set()


def _call(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def collected(entries: Iterable[ReportEntry], node: str, at_ms: int) -> list[Report]:
    """The records of these entries. Within a partition `sent` and `failed` keep their order; the acknowledgements come
    last, in theirs.
    """
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
                assert entry.lease is not None, "what failed had a lease"
                close(entry.lease)
                reports.append(_alone(event, entry.lease.partition, entry))
            case Sent():
                assert entry.lease is not None, "nobody wants a report without"
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
    """The copies of one record to be."""

    def __init__(self, lease: LeaseName) -> None:
        self._lease = lease
        self._sent: list[Sent] = []
        self._on_kept: list[Call] = []
        self._bytes = 0

    def add(self, entry: ReportEntry) -> bool:
        """Whether that was the last one."""
        assert isinstance(entry.what, Sent), "the caller looked"
        self._sent.append(entry.what)
        if entry.on_kept is not None:
            self._on_kept.append(entry.on_kept)
        self._bytes += len(entry.what.client_id.encode()) + len(entry.what.message_id.encode())
        return len(self._sent) >= SENT_MAX or self._bytes >= SENT_BYTES_MAX

    def report(self, node: str, at_ms: int) -> Report:
        event = DeliveriesSent(at=at_ms, node=node, agent=self._lease.agent, sent=tuple(self._sent))
        return Report(event, self._lease.partition, (), tuple(self._on_kept))
