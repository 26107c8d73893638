"""What we rely on in Faust, mode and aiokafka: first their shapes, then what they do with a real Kafka.

Each test says which change of theirs it guards against. A failure after an upgrade means: read the new source and
think again, not: adapt the test.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.conn import create_conn
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import CommitFailedError, KafkaConnectionError
from aiokafka.producer.message_accumulator import MessageAccumulator, MessageBatch
from aiokafka.protocol.group import LeaveGroupRequest
from faust.streams import Stream
from faust.transport import consumer as base
from faust.transport.conductor import ConductorCompiler
from faust.transport.drivers import aiokafka as stock
from faust.types import TP

from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.worker.faust_transport import Consumer
from tests.contracts.faust_worlds import (
    ALL_THE_TIME_S,
    RUN_BYTES_MAX,
    RUN_RECORDS_MAX,
    Group,
    Member,
)
from tests.support.workers import until

Function = Callable[..., Any]
OURS = frozenset({"_seek_back", "_runs", "_run_message", "_commit_changed", "_release_and_commit"})
OVERRIDES = sorted(
    name for name, value in vars(Consumer).items() if inspect.isfunction(value) and name not in OURS
)


# -- shapes ---------------------------------------------------------------------------------------------


def parameters(function: Function) -> list[str]:
    return list(inspect.signature(function).parameters)


def kind(function: Function) -> tuple[bool, bool]:
    return inspect.iscoroutinefunction(function), inspect.isasyncgenfunction(function)


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_we_override_is_there_with_the_parameters_that_we_take(name: str) -> None:
    # Guards against: a method renamed (ours would never be called) or called with other arguments.
    ours, theirs = getattr(Consumer, name), getattr(stock.Consumer, name)
    assert parameters(ours) == parameters(theirs)
    assert kind(ours) == kind(theirs)


def test_names_of_our_own_are_nobody_elses() -> None:
    # Guards against: upstream adding a method under a name of ours, which would be an override by accident.
    assert [name for name in sorted(OURS) if hasattr(stock.Consumer, name)] == []


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (stock.Consumer._wait_next_records, ["self", "timeout"]),
        (stock.Consumer.perform_seek, ["self"]),
        (stock.Consumer.maybe_wait_for_commit_to_finish, ["self"]),
        (stock.Consumer._commit, ["self", "offsets"]),
        (stock.Consumer.commit, ["self", "topics", "start_new_transaction"]),
        (stock.Consumer.assignment, ["self"]),
        (stock.Consumer.stop_flow, ["self"]),
        (MessageBatch.__init__, ["self", "tp", "builder", "ttl", "linger_time"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_what_we_call_and_is_private_takes_what_we_give(
    function: Function, expected: list[str]
) -> None:
    # Guards against: a changed signature of something that has no promise of staying.
    assert parameters(function) == expected


@pytest.mark.parametrize(
    ("caller", "call"),
    [
        # Runs come from our getmany, and from nowhere else.
        (base.Consumer._drain_messages, "getmany = self.getmany"),
        # With runs there is a gap before nearly every offset that Faust sees: it must not file them.
        (base.Consumer._drain_messages, "acks_enabled = acks_enabled_for(message.topic)"),
        # Every commit ends in ours; that there is a periodic one is seen below.
        (base.Consumer.commit, "await self.force_commit("),
        # Upstream waits here without a limit: for messages that are acknowledged, of which there are none.
        (base.Consumer.wait_empty, "while not self.should_stop and self._unacked_messages:"),
        # Revoking goes through us, and is awaited by the thread that is about to join anew.
        (base.ThreadDelegateConsumer.threadsafe_partitions_revoked, "self.on_partitions_revoked,"),
        (base.ThreadDelegateConsumer.threadsafe_partitions_revoked, "await promise"),
        # A commit for another generation is no crash: this is how it is told from other errors.
        (stock.AIOKafkaConsumerThread._commit, 'if "already rebalanced" in str(exc)'),
        # Runs that wait in a stream at a rebalance are dropped, by their generation.
        (Stream._py_aiter, "message.generation_id != self.app.consumer_generation_id"),
        # Our `on_buffer_full` does nothing: a full buffer must make the fetch loop wait by itself.
        (ConductorCompiler.build, "if queue.full():"),
        (ConductorCompiler.build, "asyncio.ensure_future(dest_chan.put(dest_event))"),
        # What a batch without a leader lives for.
        (MessageAccumulator._append_batch, "self._batch_ttl"),
        (MessageAccumulator.drain_by_nodes, ".expired()"),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_upstream_still_calls_it_where_we_rely_on_it(caller: Function, call: str) -> None:
    # Guards against: a way around our overrides.
    assert call in inspect.getsource(caller)


def test_the_error_of_a_commit_that_came_too_late_says_so() -> None:
    # Guards against: aiokafka rewording it; Faust would then crash at every rebalance.
    source = inspect.getsource(GroupCoordinator.commit_offsets)
    assert '"Commit cannot be completed since the group has already "\n' in source
    assert "already rebalanced" in str(CommitFailedError("the group has already rebalanced"))


# -- getmany, without Kafka -----------------------------------------------------------------------------


@pytest.fixture
async def idle(kafka: str) -> AsyncIterator[Member]:
    """A member that was never started."""
    member = Member(Group("idle", kafka, None), Consumer, ALL_THE_TIME_S)
    yield member
    member.consumer._thread.thread_loop.close()


def fetched(offset: int, value: bytes | None = b"v") -> Any:
    size = -1 if value is None else len(value)
    return SimpleNamespace(
        offset=offset, timestamp=offset * 1_000, key=b"k", value=value, serialized_value_size=size
    )


def hand_over(member: Member, answer: tuple[Any, Any]) -> AsyncIterator[tuple[TP, Any]]:
    """The runs of what `_wait_next_records` answers."""

    async def wait_next_records(_: float) -> tuple[Any, Any]:
        return answer

    consumer: Any = member.consumer
    consumer._wait_next_records = wait_next_records
    runs: AsyncIterator[tuple[TP, Any]] = consumer.getmany(1.0)
    return runs


A, B = TP("t", 0), TP("t", 1)


async def test_a_run_is_a_message_with_the_offset_time_and_generation_of_its_last_record(
    idle: Member,
) -> None:
    # Guards against: fields of ConsumerMessage that moved; it takes them by position.
    idle.app.consumer_generation_id = 7
    ((tp, message),) = [
        run async for run in hand_over(idle, ({A: [fetched(3), fetched(5, None)]}, {A}))
    ]
    assert (tp, message.tp, message.topic, message.partition) == (A, A, "t", 0)
    assert (message.offset, message.timestamp, message.generation_id) == (5, 5.0, 7)
    assert message.value == [(3, 3_000, b"k", b"v"), (5, 5_000, b"k", None)]
    assert (message.key, message.headers) == (None, [])


async def test_only_active_and_buffered_partitions_are_handed_over(idle: Member) -> None:
    # Guards against: `_buffered_partitions` renamed; what was fetched of a full partition would be lost.
    answer = {A: [fetched(1)], B: [fetched(1)]}
    assert [tp async for tp, _ in hand_over(idle, (answer, {A}))] == [A]
    idle.consumer._buffered_partitions.add(B)
    assert [tp async for tp, _ in hand_over(idle, (answer, {A}))] == [A, B]
    assert [tp async for tp, _ in hand_over(idle, (answer, None))] == [A, B]


async def test_a_partition_whose_buffer_is_full_is_still_asked_for(idle: Member) -> None:
    # Guards against: `on_buffer_full` no longer being what takes a partition out, for a second at least.
    consumer = idle.consumer
    consumer._active_partitions = {A, B}
    consumer.on_buffer_full(A)
    assert consumer._active_partitions == {A, B}
    stock.Consumer.on_buffer_full(consumer, A)
    assert consumer._active_partitions == {B}


async def test_nothing_is_handed_over_of_an_older_generation_or_while_the_flow_is_stopped(
    idle: Member,
) -> None:
    # Guards against: `flow_active` or `consumer_generation_id` no longer being what a rebalance changes.
    answer = {A: [fetched(1)], B: [fetched(1)]}
    handing_over = hand_over(idle, (answer, {A, B}))
    assert (await anext(handing_over))[0] == A
    idle.app.consumer_generation_id += 1
    assert [tp async for tp, _ in handing_over] == []
    handing_over = hand_over(idle, (answer, {A, B}))
    assert (await anext(handing_over))[0] == A
    idle.consumer.stop_flow()
    assert [tp async for tp, _ in handing_over] == []


async def test_a_seek_that_fails_while_the_flow_is_stopped_crashes_nothing(idle: Member) -> None:
    # In the middle of a rebalance nothing is assigned, and aiokafka's seek_to_committed says so by raising.
    async def perform_seek() -> None:
        raise AssertionError("No partitions are currently assigned")

    idle.consumer.perform_seek = perform_seek  # type: ignore[method-assign]
    idle.consumer.stop_flow()
    assert [run async for run in hand_over(idle, ({A: [fetched(1)]}, {A}))] == []


async def test_a_consumer_that_never_started_can_be_stopped(idle: Member) -> None:
    # Guards against: another error than ConsumerNotStarted; the end of a worker without Kafka would be a traceback.
    await idle.consumer.on_stop()


# -- runs and commits, over Kafka -----------------------------------------------------------------------


@pytest.fixture
async def group(app_name: str, kafka: str) -> AsyncIterator[Group]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    group = Group(f"faust-{app_name}", kafka, admin)
    yield group
    await group.stop()
    await admin.close()


async def many_commits(member: Member) -> None:
    """Wait until the periodic commit has come round several times."""
    consumer, rounds = member.consumer, 0
    force_commit = consumer.force_commit

    async def counting(topics: Any = None, start_new_transaction: bool = True) -> bool:
        nonlocal rounds
        rounds += 1
        return await force_commit(topics, start_new_transaction)

    consumer.force_commit = counting  # type: ignore[method-assign]

    async def often() -> bool:
        return rounds >= 4

    await until(often, "the periodic commit")


def nothing_is_kept(member: Member) -> bool:
    """Of what was taken: neither offsets, which only commits of Faust's own would drop, nor gaps, nor messages."""
    consumer = member.consumer
    return not (consumer._acked or consumer._acked_index or consumer._gap or consumer.unacked)


async def test_runs_arrive_whole_in_order_and_bounded_and_only_what_is_done_is_committed(
    group: Group,
) -> None:
    # Guards against: records that pass getmany by; any way in which a run that was only taken is committed.
    sizes = [3_000] * 12 + [20_000, 1] * 3
    await group.create(2)
    await group.fill(0, [b"%d" % number for number in range(320)])
    await group.fill(1, [None, *(b"x" * size for size in sizes)])
    member = await group.member(commit_interval_s=ALL_THE_TIME_S)
    await member.has(0, 319)
    await member.has(1, len(sizes))
    assert member.offsets(0) == list(range(320))
    assert [record.value for run in member.runs[0] for record in run] == [
        b"%d" % number for number in range(320)
    ]
    assert member.offsets(1) == list(range(len(sizes) + 1))
    for run in member.runs[0] + member.runs[1]:
        assert 1 <= len(run) <= RUN_RECORDS_MAX
        assert len(run) == 1 or sum(len(record.value or b"") for record in run) <= RUN_BYTES_MAX
    await many_commits(member)
    assert await group.committed() == {}
    member.done = {group.tp(0): 17, group.tp(1): 5}
    await many_commits(member)
    assert await group.committed() == {0: 17, 1: 5}
    member.done = {group.tp(0): 320, TP("another topic", 0): 9}
    await many_commits(member)
    assert await group.committed() == {0: 320, 1: 5}
    assert nothing_is_kept(member)


async def test_a_gap_in_the_offsets_commits_nothing_and_costs_nothing(group: Group) -> None:
    # Guards against: upstream counting the record after a gap as done, and keeping a list of a gap's offsets.
    await group.create(1)
    await group.fill(0, [b"gone"] * 10)
    await group.delete_below(0, 10)
    await group.fill(0, [b"a"] * 5, transactional_id=group.name)
    await group.fill(0, [b"b"] * 5, transactional_id=group.name)
    member = await group.member(commit_interval_s=ALL_THE_TIME_S)
    await member.has(0, 20)
    assert member.offsets(0) == [10, 11, 12, 13, 14, 16, 17, 18, 19, 20]
    await many_commits(member)
    assert await group.committed() == {}
    member.done = {group.tp(0): 15}
    await many_commits(member)
    assert await group.committed() == {0: 15}
    assert nothing_is_kept(member)


async def test_a_rebalance_waits_for_the_release_and_the_next_owner_starts_where_it_ended(
    group: Group,
) -> None:
    # Guards against: partitions that move before they are released; a commit that comes too late or knows too
    # little (upstream forgets before it commits); a new owner that starts anywhere but at the committed offset.
    await group.create(2)
    for partition in (0, 1):
        await group.fill(partition, [b"v"] * 100)
    member = await group.member()
    for partition in (0, 1):
        await member.has(partition, 99)
    member.may_release.clear()
    member.releasing.clear()
    member.last = {group.tp(0): 60, group.tp(1): 70}
    joining = asyncio.create_task(group.member())
    await member.releasing.wait()
    member.runs.clear()
    # To be able to fail it has to wait for what must not come; a rebalance takes a tenth of this.
    await asyncio.wait((joining,), timeout=1.0)
    assert not joining.done()  # a member has started once it has partitions
    assert await group.committed() == {}
    member.may_release.set()
    other = await joining
    await other.owns(1)
    await member.owns(1)
    assert await group.committed() == {0: 60, 1: 70}
    (kept,), (moved,) = member.assignment, other.assignment
    await member.has(kept.partition, 99)
    await other.has(moved.partition, 99)
    assert member.offsets(kept.partition) == list(range(member.last[kept], 100))
    assert other.offsets(moved.partition) == list(range(member.last[moved], 100))
    assert (member.offsets(moved.partition), other.offsets(kept.partition)) == ([], [])
    assert member.app.consumer_generation_id == other.app.consumer_generation_id > 0


class HeldCommit(Consumer):
    """Its first commit waits until it may go on."""

    held: asyncio.Event
    may_commit: asyncio.Event

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        if not self.held.is_set():
            self.held.set()
            await self.may_commit.wait()
        return await super()._commit(offsets)


async def test_the_last_commit_is_made_although_another_one_is_under_way(group: Group) -> None:
    # `commit` of upstream only waits for one that is under way: what was done meanwhile would stay uncommitted.
    await group.create(1)
    await group.fill(0, [b"v"] * 100)
    HeldCommit.held, HeldCommit.may_commit = asyncio.Event(), asyncio.Event()
    member = await group.member(HeldCommit)
    await member.has(0, 99)
    member.done, member.last = {group.tp(0): 5}, {group.tp(0): 60}
    committing = asyncio.create_task(member.consumer.commit())
    await HeldCommit.held.wait()
    member.releasing.clear()
    joining = asyncio.create_task(group.member())
    await member.releasing.wait()
    HeldCommit.may_commit.set()
    await committing
    await joining
    assert await group.committed() == {0: 60}


async def test_the_last_commit_is_made_at_the_end(group: Group) -> None:
    # Guards against: a consumer thread that ends before the last commit, or an on_stop that nobody calls.
    await group.create(1)
    await group.fill(0, [b"v"] * 10)
    member = await group.member()
    await member.has(0, 9)
    member.last = {group.tp(0): 7}
    await member.app.stop()
    assert await group.committed() == {0: 7}


async def test_a_commit_that_kafka_refuses_is_no_crash_and_is_tried_again(group: Group) -> None:
    # Guards against: a failed commit that is recorded as done, or taken for a reason to crash.
    await group.create(1)
    await group.fill(0, [b"v"] * 10)
    member = await group.member()
    await member.has(0, 9)
    thread = member.consumer._thread
    coordinator = thread._ensure_consumer()._coordinator

    async def leave_behind_its_back() -> None:
        await coordinator._stop_heartbeat_task()  # it would find out
        await coordinator._send_req(LeaveGroupRequest(group.name, coordinator.member_id))

    await thread.call_thread(leave_behind_its_back)
    member.done = {group.tp(0): 8}
    assert not await member.consumer.commit()
    assert member.consumer._committed_offset[group.tp(0)] is None

    async def committed() -> bool:
        member.done = {group.tp(0): 8}  # a release that came in between has dropped it
        done: bool = await member.consumer.commit()
        return done

    await until(committed, "the commit of the member that joined anew")
    assert await group.committed() == {0: 8}
    assert not member.app.crashed


async def test_an_error_that_the_consumer_thread_does_not_expect_ends_the_app(group: Group) -> None:
    # Guards against: a crash that only a log hears of; the worker waits for app.wait() to end its process.
    await group.create(1)
    await group.fill(0, [b"v"] * 10)
    member = await group.member()
    await member.has(0, 9)
    waiting = asyncio.create_task(member.app.wait())
    member.done = {group.tp(0): "no offset"}  # type: ignore[dict-item]
    assert not await member.consumer.commit()
    await asyncio.wait_for(waiting, 10.0)
    assert member.app.crashed
    assert isinstance(member.app.crash_reason, Exception)
    member.done = {}
    await asyncio.wait_for(member.app.stop(), 10.0)


async def test_an_app_leaves_nothing_where_it_was_started(group: Group) -> None:
    # Guards against: `_create_directories` renamed; a worker could not start where it may not write.
    await group.create(1)
    member = await group.member()
    assert not member.app.conf.datadir.exists()


# -- aiokafka by itself ---------------------------------------------------------------------------------


async def test_a_record_waits_for_a_leader_without_end(kafka: str) -> None:
    # Guards against: `_batch_ttl` renamed; batches would be dropped after 40 s without a leader, out of order.
    producer = Producer({"bootstrap_servers": kafka}, 1 << 20)
    await producer.start()
    try:
        assert producer._producer is not None
        accumulator = producer._producer._message_accumulator
        batch = accumulator._append_batch(accumulator.create_builder(), TopicPartition("none", 0))
        batch._ctime -= 10 * 365 * 86_400
        assert not batch.expired()
        accumulator._batches.clear()
    finally:
        await producer.stop()


async def test_metadata_is_new_once_it_was_forced(kafka: str, app_name: str) -> None:
    # Guards against: `_client.force_metadata_update` going; `millpond status` would show an old partition count.
    topic = f"metadata-{app_name}"
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await consumer.start()
    await admin.start()
    try:
        assert consumer.partitions_for_topic(topic) is None
        await admin.create_topics([NewTopic(topic, 3, 1)])

        async def known() -> bool:
            await consumer._client.force_metadata_update()
            return bool(consumer.partitions_for_topic(topic) == {0, 1, 2})

        await until(known, "three partitions")
    finally:
        await admin.close()
        await consumer.stop()


async def test_a_connection_can_be_made_to_ask_why_it_cannot_be_made(
    kafka: str, tmp_path: Path
) -> None:
    # Guards against: create_conn taking other options than all clients, or raising something else.
    password = tmp_path / "password"
    password.write_text("p")
    options = KafkaSettings(
        security_protocol="SASL_SSL", username="u", password_file=str(password)
    ).client_options()
    assert options.keys() - {"bootstrap_servers"} <= set(parameters(create_conn))
    host, _, port = kafka.rpartition(":")
    (await create_conn(host, int(port), security_protocol="PLAINTEXT")).close()
    with pytest.raises((OSError, KafkaConnectionError)):
        await create_conn(HOST, free_port(), security_protocol="PLAINTEXT")
