"""What becomes of reports that Kafka refuses: none is dropped for what passes, none is repeated for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from hypothesis import given
from hypothesis import strategies as st

from millpond.pipeline.brokers.commands import reports as module
from millpond.pipeline.brokers.commands.reports import ReportEntry, Reports
from millpond.pipeline.brokers.spool.sender import NotStored
from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.events import (
    DeliveriesSent,
    DeliveryFailed,
    Event,
    MembersActive,
    MessageAcked,
    Sent,
)
from millpond.schemas.leases import LeaseName

LEASE = LeaseName("queue", 3, 1)


class Sink:
    """An `EventSink` in memory. Each of `refusals` is about the next event, and then gone."""

    node = "n"

    def __init__(self) -> None:
        self.stored: list[Event] = []
        self.answers: list[asyncio.Future[Any]] = []  # of `enter`, unless they are immediate
        self.immediate = True
        self.entering: list[Exception] = []  # raised by `enter`
        self.alone: list[Exception] = []  # raised by `enter_alone`
        self.copies_max = 1_000  # in one event, or it is too large

    async def enter(self, event: Any, partition: int | None = None) -> asyncio.Future[Any]:
        if self.entering:
            raise self.entering.pop(0)
        self._check(event)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        if self.immediate:
            self.stored.append(event)
            answer.set_result(None)
        return answer

    async def enter_alone(self, event: Any, partition: int | None = None) -> None:
        if self.alone:
            raise self.alone.pop(0)
        self._check(event)
        self.stored.append(event)

    def _check(self, event: Event) -> None:
        size = len(getattr(event, "sent", getattr(event, "client_ids", ("one",))))
        if size > self.copies_max:
            raise MessageSizeTooLargeError(f"{size} copies")

    @property
    def ids(self) -> list[list[str]]:
        """The message ids of each stored event."""
        return [
            [one.message_id for one in event.sent]
            if isinstance(event, DeliveriesSent)
            else [str(getattr(event, "message_id", ""))]
            for event in self.stored
        ]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0)


@pytest.fixture
async def sink() -> Sink:
    return Sink()


@pytest.fixture
async def reports(sink: Sink) -> Reports:
    return Reports(sink)


def a_sent(message_id: str, kept: Callable[[], None] | None = None) -> ReportEntry:
    return ReportEntry(Sent(str(LEASE), "c", message_id), LEASE, on_kept=kept)


def a_failure(message_id: str, kept: Callable[[], None] | None = None) -> ReportEntry:
    event = DeliveryFailed(
        at=1, node="n", agent="queue", lease=str(LEASE), client_id="c", message_id=message_id,
        reason="stale",
    )  # fmt: skip
    return ReportEntry(event, LEASE, on_kept=kept)


def an_ack(message_id: str, entered: Callable[[], None]) -> ReportEntry:
    event = MessageAcked(at=1, node="n", message_id=message_id, topic="t", client_id="c", qos=1)
    return ReportEntry(event, None, on_entered=entered)


@pytest.mark.parametrize(
    "error",
    [
        TopicAuthorizationFailedError("no"), NotEnoughReplicasError("few"),
        NotStored("full", "full"), NotStored("refused", "a policy"),
    ],
)  # fmt: skip
async def test_a_report_that_is_refused_for_what_passes_is_repeated_until_it_is_stored(
    sink: Sink, reports: Reports, error: Exception
) -> None:
    kept: list[str] = []
    if isinstance(error, KafkaError):
        sink.entering = [error]
        sink.alone = [error, error]
    else:
        sink.immediate = False
    reports.add(a_sent("m1", lambda: kept.append("m1")))
    reports.add(a_failure("m2", lambda: kept.append("m2")))
    if not sink.immediate:
        await reports.flush()
        sink.alone = [error, error]
        for answer in sink.answers:
            answer.set_exception(error)
        await asyncio.sleep(0)
    await reports.flush()
    await asyncio.sleep(0)
    assert sink.ids == [["m1"], ["m2"]]
    assert kept == ["m1", "m2"]


async def test_nothing_overtakes_a_refused_report(sink: Sink, reports: Reports) -> None:
    # Given reports on their way
    sink.immediate = False
    for name in ("m1", "m2", "m3"):
        reports.add(a_failure(name))
    await reports.flush()
    first, second, third = sink.answers
    # When the second is refused while the third has no answer, and one more is added
    first.set_result(None)
    second.set_exception(MessageSizeTooLargeError("the batch"))
    await asyncio.sleep(0)
    entered: list[str] = []
    reports.add(an_ack("m4", lambda: entered.append("m4")))
    flushing = asyncio.create_task(reports.flush())
    for _ in range(5):
        await asyncio.sleep(0)
    # Then it waits for that answer
    assert (sink.ids, len(sink.answers), entered) == ([], 3, [])
    # And the refused ones come first, in their order
    third.set_exception(MessageSizeTooLargeError("the batch"))
    sink.immediate = True
    await flushing
    assert sink.ids == [["m2"], ["m3"], ["m4"]]
    assert entered == ["m4"]


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_report_that_is_too_large_is_halved_until_it_fits(
    sink: Sink, reports: Reports, *, at_once: bool
) -> None:
    kept: list[str] = []
    names = [f"m{number}" for number in range(7)]
    for name in names:
        reports.add(a_sent(name, lambda name=name: kept.append(name)))  # type: ignore[misc]
    if at_once:
        sink.copies_max = 2
    else:
        sink.immediate = False
    await reports.flush()
    if not at_once:
        sink.copies_max, sink.immediate = 2, True
        sink.answers[0].set_exception(RecordListTooLargeError("the batch"))
        await asyncio.sleep(0)
        await reports.flush()
    await asyncio.sleep(0)
    assert [name for record in sink.ids for name in record] == names
    assert max(map(len, sink.ids)) == 2
    assert kept == names


async def test_a_list_of_active_members_that_is_too_large_is_halved_too(
    sink: Sink, reports: Reports
) -> None:
    sink.copies_max = 2
    active = MembersActive(at=1, node="n", agent="queue", client_ids=("a", "b", "c"))
    reports.add_event(active, 3)
    await reports.flush()
    ids = [event.client_ids for event in sink.stored if isinstance(event, MembersActive)]
    assert ids == [("a",), ("b", "c")]


@pytest.mark.parametrize(
    "error", [MessageSizeTooLargeError("alone"), NotStored("too_large", "alone")]
)
async def test_a_result_that_is_too_large_alone_is_given_up_and_its_command_is_finished(
    sink: Sink, reports: Reports, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[str] = []
    sink.immediate = False
    reports.add(a_failure("m1", lambda: kept.append("m1")))
    await reports.flush()
    sink.alone = [error]
    sink.answers[0].set_exception(error)
    await asyncio.sleep(0)
    await reports.flush()
    assert (sink.ids, kept) == ([], ["m1"])
    assert "m1" in caplog.text
    assert "message_bytes_max" in caplog.text


@pytest.mark.parametrize("alone", [True, False])
async def test_a_producer_that_has_ended_ends_the_bridge(
    sink: Sink, reports: Reports, *, alone: bool
) -> None:
    ended = KafkaError("Unexpected error during batch delivery")
    sink.entering = [NotEnoughReplicasError("few"), ended] if alone else [ended]
    sink.alone = [ended]
    reports.add(a_failure("m1"))
    with pytest.raises(KafkaError):
        await reports.flush()


# JSON escapes one byte of a control character as six.
TEXTS = st.text(min_size=1, max_size=40) | st.just("\x01" * 10_000)


@given(client_id=TEXTS, message_id=TEXTS)
def test_a_report_of_one_result_is_hardly_larger_than_its_command(
    client_id: str, message_id: str
) -> None:
    """Kafka has taken the command. So the report can only be too large if a limit was lowered since."""
    command = Deliver(
        client_id=client_id, lease=str(LEASE), epoch=1, valid_for_s=60, attempt=1,
        message_id=message_id, topic="t", qos=0, retain=False, payload="",
    )  # fmt: skip
    size = len(client_id.encode()) + len(codec.encode(command))
    at = 10**12
    sent = DeliveriesSent(
        at=at, node="", agent="pubsub", sent=(Sent(str(LEASE), client_id, message_id),)
    )
    failed = DeliveryFailed(
        at=at, node="", agent="pubsub", lease=str(LEASE), client_id=client_id,
        message_id=message_id, reason="no_client",
    )  # fmt: skip
    for report in (sent, failed):
        own = len(keys.record_key(report).encode()) + len(codec.encode(report))
        assert own <= size + 100
