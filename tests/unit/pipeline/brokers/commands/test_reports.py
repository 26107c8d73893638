"""Reports as records: many copies in one, in the right order; and the failed epochs."""

from __future__ import annotations

from collections.abc import Callable

from millpond.pipeline.brokers.commands.deliveries import FailedEpochs
from millpond.pipeline.brokers.commands.reports import (
    SENT_BYTES_MAX,
    SENT_MAX,
    Report,
    ReportEntry,
    collected,
)
from millpond.schemas.events import (
    AgentName,
    DeliveriesSent,
    DeliveryFailed,
    MembersActive,
    MessageAcked,
    Sent,
)
from millpond.schemas.leases import LeaseName


def a_lease(number: int = 1, partition: int = 3, agent: AgentName = "queue") -> LeaseName:
    return LeaseName(agent, partition, number)


def a_sent(
    lease: LeaseName, on_kept: Callable[[], None] | None = None, client_id: str = "c"
) -> ReportEntry:
    return ReportEntry(Sent(str(lease), client_id, "m"), lease, on_kept=on_kept)


def a_failure(lease: LeaseName) -> ReportEntry:
    event = DeliveryFailed(
        at=1, node="n", agent=lease.agent, lease=str(lease), client_id="c", message_id="m",
        reason="stale",
    )  # fmt: skip
    return ReportEntry(event, lease)


def an_ack(message_id: str, on_entered: Callable[[], None] | None = None) -> ReportEntry:
    event = MessageAcked(at=1, node="n", message_id=message_id, topic="t", client_id="c", qos=1)
    return ReportEntry(event, None, on_entered=on_entered)


def records(entries: list[ReportEntry]) -> list[str]:
    """The records of these entries, in short."""
    return [short(report) for report in collected(entries, "n", 1)]


def short(report: Report) -> str:
    match report.event:
        case DeliveriesSent(agent=agent, sent=sent):
            numbers = ",".join(one.lease.rpartition("/")[2] for one in sent)
            return f"{agent}/{report.partition} sent {numbers}"
        case DeliveryFailed(lease=lease):
            assert report.partition == int(lease.split("/")[1])
            return f"{lease} failed"
        case MessageAcked(message_id=message_id):
            assert report.partition is None
            return f"{message_id} acked"
        case MembersActive(client_ids=client_ids):
            return f"{','.join(client_ids)} active"


def test_copies_of_one_agent_and_partition_share_a_record() -> None:
    entries = [
        a_sent(a_lease(1)), a_sent(a_lease(5, partition=4)), a_sent(a_lease(2)),
        a_sent(a_lease(7, agent="pubsub")), a_sent(a_lease(3)),
    ]  # fmt: skip
    assert records(entries) == ["queue/3 sent 1,2,3", "queue/4 sent 5", "pubsub/3 sent 7"]
    assert records([]) == []


def test_acknowledgements_come_after_all_sent_reports() -> None:
    entries = [an_ack("m0"), a_sent(a_lease(1)), an_ack("m1"), a_sent(a_lease(2)), an_ack("m2")]
    assert records(entries) == ["queue/3 sent 1,2", "m0 acked", "m1 acked", "m2 acked"]


def test_a_failure_keeps_its_place_among_the_sent_copies_of_its_partition() -> None:
    entries = [
        a_sent(a_lease(1)), a_sent(a_lease(9, partition=4)), a_failure(a_lease(2)),
        a_sent(a_lease(3)), a_sent(a_lease(8, partition=4)),
    ]  # fmt: skip
    assert records(entries) == [
        "queue/3 sent 1", "queue/3/2 failed", "queue/4 sent 9,8", "queue/3 sent 3",
    ]  # fmt: skip


def test_a_record_is_limited_in_copies_and_in_bytes() -> None:
    many = collected([a_sent(a_lease(number)) for number in range(SENT_MAX + 1)], "n", 1)
    assert [len(report.event.sent) for report in many if type(report.event) is DeliveriesSent] == [
        SENT_MAX, 1,
    ]  # fmt: skip
    long = "c" * (SENT_BYTES_MAX // 2)
    entries = [a_sent(a_lease(number), client_id=long) for number in range(3)]
    assert records(entries) == ["queue/3 sent 0,1", "queue/3 sent 2"]


def test_a_record_has_the_callbacks_of_all_its_entries() -> None:
    calls: list[str] = []
    entries = [
        a_sent(a_lease(1), on_kept=lambda: calls.append("one")),
        a_sent(a_lease(2), on_kept=lambda: calls.append("two")),
        an_ack("m", on_entered=lambda: calls.append("ack")),
    ]
    sent, ack = collected(entries, "n", 1)
    assert (len(sent.on_entered), len(ack.on_kept)) == (0, 0)
    for call in (*sent.on_kept, *ack.on_entered):
        call()
    assert calls == ["one", "two", "ack"]


def test_a_failed_epoch_belongs_to_one_client_agent_and_partition() -> None:
    failed = FailedEpochs()
    failed.add("c", a_lease(1), 5)
    assert failed.holds("c", a_lease(2), 5)
    for other in (
        failed.holds("d", a_lease(2), 5),
        failed.holds("c", a_lease(2, partition=4), 5),
        failed.holds("c", a_lease(2, agent="pubsub"), 5),
        failed.holds("c", a_lease(2), 6),
    ):
        assert not other
    assert failed.holds("c", a_lease(3), 5)


def test_the_least_recently_used_epochs_are_forgotten() -> None:
    failed = FailedEpochs(size_max=2)
    failed.add("a", a_lease(), 1)
    failed.add("b", a_lease(), 1)
    assert failed.holds("a", a_lease(), 1)
    failed.add("c", a_lease(), 1)
    assert [failed.holds(client_id, a_lease(), 1) for client_id in "abc"] == [True, False, True]
