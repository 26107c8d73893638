"""Faust apps with our transport on a real Kafka. A test decides what each member of the group has finished."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import faust
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.records_to_delete import RecordsToDelete
from aiokafka.structs import TopicPartition
from faust.types import TP
from yarl import URL

from millpond.agents.ports import Record
from millpond.pipeline.worker.faust_transport import Consumer, Transport
from millpond.pipeline.worker.worker import App, RunSchema
from tests.support.workers import until

RUN_RECORDS_MAX = 50
RUN_BYTES_MAX = 10_000
# Intervals of the periodic commit: too long to see one in a test, and short enough to see many.
NEVER_S, OFTEN_S = 3_600.0, 0.1


class Member:
    """One app of the group. It only keeps its runs; the test sets which offsets may be committed."""

    def __init__(self, group: Group, consumer: type[Consumer], commit_interval_s: float) -> None:
        self.runs: dict[int, list[list[Record]]] = defaultdict(list)
        self.done: dict[TP, int] = {}  # committable offsets of owned partitions
        self.last: dict[TP, int] = {}  # the last offsets of released partitions
        self.releasing = asyncio.Event()
        self.may_release = asyncio.Event()
        self.may_release.set()
        self.app = self._app(group, consumer, commit_interval_s)

    def _app(self, group: Group, consumer: type[Consumer], commit_interval_s: float) -> faust.App:
        url = [URL(f"kafka://{group.bootstrap}")]
        app = App(
            group.name, broker=url, broker_commit_interval=commit_interval_s,
            broker_session_timeout=6.0, broker_heartbeat_interval=0.2,
            consumer_auto_offset_reset="earliest", stream_buffer_maxsize=16,
            table_standby_replicas=0, topic_disable_leader=True, topic_allow_declare=False,
            web_enabled=False, autodiscover=False,
        )  # fmt: skip

        class MemberConsumer(consumer):  # type: ignore[misc,valid-type]
            run_records_max, run_bytes_max = RUN_RECORDS_MAX, RUN_BYTES_MAX
            release = staticmethod(self._release)
            committable = staticmethod(lambda: self.done)

        class MemberTransport(Transport):
            Consumer = MemberConsumer

        app.transport = MemberTransport(url, app)

        async def take(runs: Any) -> None:
            async for event in runs.events():
                self.runs[event.message.partition].append(event.value)

        app.agent(app.topic(group.topic, schema=RunSchema(), acks=False), name="take")(take)
        return app

    async def _release(self, partitions: set[TP]) -> Mapping[TP, int]:
        self.releasing.set()
        await self.may_release.wait()
        self.done = {tp: offset for tp, offset in self.done.items() if tp not in partitions}
        return {tp: offset for tp, offset in self.last.items() if tp in partitions}

    @property
    def consumer(self) -> Consumer:
        consumer: Any = self.app.consumer
        assert isinstance(consumer, Consumer)
        return consumer

    @property
    def assignment(self) -> set[TP]:
        return set() if self.app.rebalancing else self.consumer.assignment()

    def offsets(self, partition: int) -> list[int]:
        """The offsets of all records handed over so far, in order."""
        return [record.offset for run in self.runs[partition] for record in run]

    async def has(self, partition: int, offset: int) -> None:
        """Wait until the record at `offset` was handed over."""

        async def arrived() -> bool:
            return offset in self.offsets(partition)

        await until(arrived, f"offset {offset} of partition {partition}")

    async def owns(self, count: int) -> None:
        """Wait until the rebalance is over and the member has `count` partitions."""

        async def owned() -> bool:
            return len(self.assignment) == count

        await until(owned, f"{count} partitions to be assigned")


class Group:
    """A consumer group with a topic of its own."""

    def __init__(self, name: str, bootstrap: str, admin: AIOKafkaAdminClient) -> None:
        self.name, self.bootstrap, self.admin = name, bootstrap, admin
        self.topic = f"{name}.runs"
        self.members: list[Member] = []

    def tp(self, partition: int) -> TP:
        return TP(self.topic, partition)

    async def create(self, partitions: int) -> None:
        await self.admin.create_topics([NewTopic(self.topic, partitions, 1)])

    async def fill(
        self, partition: int, values: list[bytes | None], transactional_id: str | None = None
    ) -> None:
        """Append values. With an id they are one transaction, whose marker takes the offset behind them."""
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bootstrap, transactional_id=transactional_id
        )
        await producer.start()
        if transactional_id:
            await producer.begin_transaction()
        sent = [await producer.send(self.topic, value, b"key", partition) for value in values]
        await asyncio.gather(*sent)
        if transactional_id:
            await producer.commit_transaction()
        await producer.stop()

    async def delete_below(self, partition: int, offset: int) -> None:
        await self.admin.delete_records(
            {TopicPartition(self.topic, partition): RecordsToDelete(offset)}
        )

    async def member(
        self, consumer: type[Consumer] = Consumer, commit_interval_s: float = NEVER_S
    ) -> Member:
        """Start one more app."""
        member = Member(self, consumer, commit_interval_s)
        self.members.append(member)
        await member.app.start()
        return member

    async def committed(self) -> dict[int, int]:
        """The committed offsets in Kafka, by partition."""
        offsets = await self.admin.list_consumer_group_offsets(self.name)
        return {at.partition: found.offset for at, found in offsets.items() if found.offset >= 0}

    async def stop(self) -> None:
        for member in self.members:
            member.may_release.set()
            await member.app.stop()
