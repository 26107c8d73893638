"""The private parts of Faust, mode and aiokafka that we rely on: first their signatures, then their behaviour on Kafka.

Each test says which upstream change it guards against. After a failure, read the new source and think again. Do not
simply adapt the test.
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
    OFTEN_S,
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


# -- signatures ---------------------------------------------------------------------------------------------


def parameters(function: Function) -> list[str]:
    return list(inspect.signature(function).parameters)


def kind(function: Function) -> tuple[bool, bool]:
    return inspect.iscoroutinefunction(function), inspect.isasyncgenfunction(function)


@pytest.mark.parametrize("name", OVERRIDES)
def test_each_method_that_we_override_exists_with_the_same_parameters(name: str) -> None:
    # Guards against: a renamed method, so that ours is never called; other arguments.
    ours, theirs = getattr(Consumer, name), getattr(stock.Consumer, name)
    assert parameters(ours) == parameters(theirs)
    assert kind(ours) == kind(theirs)


def test_upstream_has_no_method_with_a_name_of_ours() -> None:
    # Guards against: a new upstream method, which ours would override by accident.
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
def test_each_private_function_that_we_call_takes_our_arguments(
    function: Function, expected: list[str]
) -> None:
    # Guards against: a changed signature. Private functions promise nothing.
    assert parameters(function) == expected


@pytest.mark.parametrize(
    ("caller", "call"),
    [
        # Runs come only from our getmany.
        (base.Consumer._drain_messages, "getmany = self.getmany"),
        # Faust sees one offset of each run, so there are gaps between them. It must not keep a list of gaps.
        (base.Consumer._drain_messages, "acks_enabled = acks_enabled_for(message.topic)"),
        # Every commit ends in our force_commit. A test below sees the periodic one.
        (base.Consumer.commit, "await self.force_commit("),
        # Upstream waits here without limit for acknowledgements. With acks=False there is nothing to wait for.
        (base.Consumer.wait_empty, "while not self.should_stop and self._unacked_messages:"),
        # A revocation calls our method. The consumer thread waits for it before it joins the group again.
        (base.ThreadDelegateConsumer.threadsafe_partitions_revoked, "self.on_partitions_revoked,"),
        (base.ThreadDelegateConsumer.threadsafe_partitions_revoked, "await promise"),
        # A commit for an older generation must not crash the app. Faust recognises it by this text.
        (stock.AIOKafkaConsumerThread._commit, 'if "already rebalanced" in str(exc)'),
        # Runs of an older generation that wait in a stream are dropped.
        (Stream._py_aiter, "message.generation_id != self.app.consumer_generation_id"),
        # Our `on_buffer_full` does nothing, because a full buffer already makes the fetch loop wait.
        (ConductorCompiler.build, "if queue.full():"),
        (ConductorCompiler.build, "asyncio.ensure_future(dest_chan.put(dest_event))"),
        # The lifetime of a batch without a leader.
        (MessageAccumulator._append_batch, "self._batch_ttl"),
        (MessageAccumulator.drain_by_nodes, ".expired()"),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_upstream_still_calls_it_where_we_rely_on_it(caller: Function, call: str) -> None:
    # Guards against: a path that bypasses our overrides.
    assert call in inspect.getsource(caller)


def test_the_error_of_a_late_commit_has_the_text_that_faust_looks_for() -> None:
    # Guards against: another wording in aiokafka. Faust would then crash at every rebalance.
    source = inspect.getsource(GroupCoordinator.commit_offsets)
    assert '"Commit cannot be completed since the group has already "\n' in source
    assert "already rebalanced" in str(CommitFailedError("the group has already rebalanced"))


# -- getmany, without Kafka -----------------------------------------------------------------------------


@pytest.fixture
async def idle(kafka: str) -> AsyncIterator[Member]:
    """A member that never starts."""
    member = Member(Group("idle", kafka, None), Consumer, OFTEN_S)
    yield member
    member.consumer._thread.thread_loop.close()


def fetched(offset: int, value: bytes | None = b"v") -> Any:
    size = -1 if value is None else len(value)
    return SimpleNamespace(
        offset=offset, timestamp=offset * 1_000, key=b"k", value=value, serialized_value_size=size
    )


def hand_over(member: Member, answer: tuple[Any, Any]) -> AsyncIterator[tuple[TP, Any]]:
    """Run our getmany over an answer of `_wait_next_records`."""

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
    # Guards against: another order of the fields of ConsumerMessage. We pass them by position.
    idle.app.consumer_generation_id = 7
    ((tp, message),) = [
        run async for run in hand_over(idle, ({A: [fetched(3), fetched(5, None)]}, {A}))
    ]
    assert (tp, message.tp, message.topic, message.partition) == (A, A, "t", 0)
    assert (message.offset, message.timestamp, message.generation_id) == (5, 5.0, 7)
    assert message.value == [(3, 3_000, b"k", b"v"), (5, 5_000, b"k", None)]
    assert (message.key, message.headers) == (None, [])


async def test_only_active_and_buffered_partitions_are_handed_over(idle: Member) -> None:
    # Guards against: a renamed `_buffered_partitions`. The fetched records of a full partition would be lost.
    answer = {A: [fetched(1)], B: [fetched(1)]}
    assert [tp async for tp, _ in hand_over(idle, (answer, {A}))] == [A]
    idle.consumer._buffered_partitions.add(B)
    assert [tp async for tp, _ in hand_over(idle, (answer, {A}))] == [A, B]
    assert [tp async for tp, _ in hand_over(idle, (answer, None))] == [A, B]


async def test_a_partition_with_a_full_buffer_is_still_fetched(idle: Member) -> None:
    # Guards against: another method that stops fetching a full partition.
    consumer = idle.consumer
    consumer._active_partitions = {A, B}
    consumer.on_buffer_full(A)
    assert consumer._active_partitions == {A, B}
    stock.Consumer.on_buffer_full(consumer, A)
    assert consumer._active_partitions == {B}


async def test_no_run_of_an_older_generation_or_with_a_stopped_flow_is_handed_over(
    idle: Member,
) -> None:
    # Guards against: a rebalance that no longer changes `flow_active` or `consumer_generation_id`.
    answer = {A: [fetched(1)], B: [fetched(1)]}
    handing_over = hand_over(idle, (answer, {A, B}))
    assert (await anext(handing_over))[0] == A
    idle.app.consumer_generation_id += 1
    assert [tp async for tp, _ in handing_over] == []
    handing_over = hand_over(idle, (answer, {A, B}))
    assert (await anext(handing_over))[0] == A
    idle.consumer.stop_flow()
    assert [tp async for tp, _ in handing_over] == []


async def test_a_failed_seek_with_a_stopped_flow_does_not_crash(idle: Member) -> None:
    # During a rebalance no partition is assigned. aiokafka's seek_to_committed then raises.
    async def perform_seek() -> None:
        raise AssertionError("No partitions are currently assigned")

    idle.consumer.perform_seek = perform_seek  # type: ignore[method-assign]
    idle.consumer.stop_flow()
    assert [run async for run in hand_over(idle, ({A: [fetched(1)]}, {A}))] == []


async def test_a_consumer_that_never_started_can_be_stopped(idle: Member) -> None:
    # Guards against: another error than ConsumerNotStarted. A worker without Kafka would stop with a traceback.
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


async def several_commits(member: Member) -> None:
    """Wait until the periodic commit has run several times."""
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


def faust_keeps_nothing(member: Member) -> bool:
    """True if Faust keeps no offsets, gaps or messages of the runs. Only its own commits would remove them."""
    consumer = member.consumer
    return not (consumer._acked or consumer._acked_index or consumer._gap or consumer.unacked)


async def test_runs_are_complete_ordered_and_bounded_and_only_committable_offsets_are_committed(
    group: Group,
) -> None:
    # Guards against: records that bypass getmany; a commit of a run that was only handed over.
    sizes = [3_000] * 12 + [20_000, 1] * 3
    await group.create(2)
    await group.fill(0, [b"%d" % number for number in range(320)])
    await group.fill(1, [None, *(b"x" * size for size in sizes)])
    member = await group.member(commit_interval_s=OFTEN_S)
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
    await several_commits(member)
    assert await group.committed() == {}
    member.done = {group.tp(0): 17, group.tp(1): 5}
    await several_commits(member)
    assert await group.committed() == {0: 17, 1: 5}
    member.done = {group.tp(0): 320, TP("another topic", 0): 9}
    await several_commits(member)
    assert await group.committed() == {0: 320, 1: 5}
    assert faust_keeps_nothing(member)


async def test_a_gap_in_the_offsets_commits_nothing_and_takes_no_memory(group: Group) -> None:
    # Guards against: upstream taking the record after a gap as finished, or keeping a list of the gap's offsets.
    await group.create(1)
    await group.fill(0, [b"gone"] * 10)
    await group.delete_below(0, 10)
    await group.fill(0, [b"a"] * 5, transactional_id=group.name)
    await group.fill(0, [b"b"] * 5, transactional_id=group.name)
    member = await group.member(commit_interval_s=OFTEN_S)
    await member.has(0, 20)
    assert member.offsets(0) == [10, 11, 12, 13, 14, 16, 17, 18, 19, 20]
    await several_commits(member)
    assert await group.committed() == {}
    member.done = {group.tp(0): 15}
    await several_commits(member)
    assert await group.committed() == {0: 15}
    assert faust_keeps_nothing(member)


async def test_a_rebalance_waits_for_the_release_and_the_next_owner_starts_where_it_ended(
    group: Group,
) -> None:
    # Guards against: partitions that move before they are released; a last commit that is late or incomplete
    # (upstream forgets before it commits); a new owner that does not start at the committed offset.
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
    # Time for the rebalance to finish too early, if it could. A rebalance takes a tenth of this.
    await asyncio.wait((joining,), timeout=1.0)
    assert not joining.done()  # `start` ends when the member has partitions
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
    """A consumer whose first commit waits for `may_commit`."""

    held: asyncio.Event
    may_commit: asyncio.Event

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        if not self.held.is_set():
            self.held.set()
            await self.may_commit.wait()
        return await super()._commit(offsets)


async def test_the_last_commit_happens_although_another_one_is_running(group: Group) -> None:
    # Upstream's `commit` only waits for a running one. Later offsets would stay uncommitted.
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


async def test_the_last_commit_happens_when_the_app_stops(group: Group) -> None:
    # Guards against: a consumer thread that ends before the last commit; an on_stop that is not called.
    await group.create(1)
    await group.fill(0, [b"v"] * 10)
    member = await group.member()
    await member.has(0, 9)
    member.last = {group.tp(0): 7}
    await member.app.stop()
    assert await group.committed() == {0: 7}


async def test_a_commit_that_kafka_refuses_does_not_crash_and_is_retried(group: Group) -> None:
    # Guards against: a failed commit that counts as successful, or that crashes the app.
    await group.create(1)
    await group.fill(0, [b"v"] * 10)
    member = await group.member()
    await member.has(0, 9)
    thread = member.consumer._thread
    coordinator = thread._ensure_consumer()._coordinator

    async def leave_the_group_unnoticed() -> None:
        await coordinator._stop_heartbeat_task()  # a heartbeat would notice
        await coordinator._send_req(LeaveGroupRequest(group.name, coordinator.member_id))

    await thread.call_thread(leave_the_group_unnoticed)
    member.done = {group.tp(0): 8}
    assert not await member.consumer.commit()
    assert member.consumer._committed_offset[group.tp(0)] is None

    async def committed() -> bool:
        member.done = {group.tp(0): 8}  # a release in between has removed it
        done: bool = await member.consumer.commit()
        return done

    await until(committed, "the commit of the member that joined again")
    assert await group.committed() == {0: 8}
    assert not member.app.crashed


async def test_an_unexpected_error_in_the_consumer_thread_ends_the_app(group: Group) -> None:
    # Guards against: a crash that is only logged. The worker relies on app.wait() to notice it.
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


async def test_an_app_creates_no_directory(group: Group) -> None:
    # Guards against: a renamed `_create_directories`. A worker could not start in a read-only directory.
    await group.create(1)
    member = await group.member()
    assert not member.app.conf.datadir.exists()


# -- aiokafka alone ---------------------------------------------------------------------------------


async def test_a_record_waits_for_a_leader_without_limit(kafka: str) -> None:
    # Guards against: a renamed `_batch_ttl`. Batches would be dropped after 40 s without a leader.
    producer = Producer(KafkaSettings(bootstrap_servers=(kafka,)))
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


async def test_metadata_is_current_after_a_forced_update(kafka: str, app_name: str) -> None:
    # Guards against: a removed `_client.force_metadata_update`. `millpond status` would show an old partition count.
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


async def test_a_connection_can_be_opened_to_find_out_why_a_client_fails(
    kafka: str, tmp_path: Path
) -> None:
    # Guards against: create_conn with other options than the clients, or with other errors.
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
