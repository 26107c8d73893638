"""Commands for a bridge, as the agents write them, and the bridge's reports."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from millpond.pipeline.kafka import partitioning
from millpond.schemas import codec, keys
from millpond.schemas.commands import Command, Deliver, Subscribe
from millpond.schemas.events import DeliveriesSent, DeliveryFailed, MessageAcked, Sent
from millpond.schemas.leases import LeaseName
from tests.support.embedded_bridge import Bridge, Log
from tests.support.mqtt import PUBACK, PUBLISH, Client, Packet, delivered
from tests.support.workers import PARTITIONS, until

VALID_FOR_S = 300  # longer than any test


def partition_of(key: str) -> int:
    """The partition of records with this key."""
    return partitioning.partition_of(key, PARTITIONS)


def a_deliver(client_id: str, number: int, **fields: Any) -> Deliver:
    """Lease `number` of a message of `queue/{client_id}`, whose payload is the number."""
    topic = fields.pop("topic", f"queue/{client_id}")
    values: dict[str, Any] = {
        "lease": str(LeaseName("queue", partition_of(topic), number)), "epoch": 1,
        "valid_for_s": VALID_FOR_S, "attempt": 1, "message_id": f"m{number}", "qos": 1,
        "retain": False, "payload": str(number), **fields,
    }  # fmt: skip
    return Deliver(client_id=client_id, topic=topic, **values)


class Commands:
    """Writes to `mqtt.deliveries`."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer

    async def write(self, *commands: Command) -> None:
        for command in commands:
            await self.write_bytes(command.client_id, codec.encode(command))
        await self._producer.flush()

    async def write_bytes(self, client_id: str, value: bytes | None) -> None:
        await self._producer.send(keys.DELIVERIES_TOPIC, key=client_id.encode(), value=value)

    async def deliver(self, client_id: str, *numbers: int, **fields: Any) -> None:
        await self.write(*(a_deliver(client_id, number, **fields) for number in numbers))

    async def subscribe(self, client_id: str, topic_filter: str) -> None:
        command = Subscribe(client_id=client_id, topic_filters=((topic_filter, 1),))
        await self.write(command)


@contextlib.asynccontextmanager
async def commanding(bootstrap: str) -> AsyncIterator[Commands]:
    """A writer of commands."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, max_request_size=4 << 20)
    await producer.start()
    try:
        yield Commands(producer)
    finally:
        await producer.stop()


def reported(log: Log, client_id: str) -> Iterator[Sent | DeliveryFailed | MessageAcked]:
    """The reports about a client's copies, in the order of the log."""
    for record in log.records:
        match record.event:
            case DeliveriesSent(sent=sent):
                assert record.key == keys.agent_record_key(record.event.agent)
                for one in sent:
                    if one.client_id == client_id:
                        assert one.lease.split("/")[:2] == ["queue", str(record.partition)]
                        yield one
            case DeliveryFailed() if record.event.client_id == client_id:
                assert record.key == keys.agent_record_key(record.event.agent)
                assert record.event.lease.split("/")[:2] == ["queue", str(record.partition)]
                yield record.event
            case MessageAcked() if record.event.client_id == client_id:
                yield record.event


def sent(log: Log, client_id: str) -> list[int]:
    """The numbers of the leases reported as sent."""
    return [_number(one) for one in reported(log, client_id) if isinstance(one, Sent)]


def failed(log: Log, client_id: str) -> list[tuple[int, str]]:
    """The numbers of the leases reported as failed, with the reasons."""
    return [
        (_number(one), one.reason)
        for one in reported(log, client_id)
        if isinstance(one, DeliveryFailed)
    ]


def acked(log: Log, client_id: str) -> list[str]:
    """The message ids reported as acknowledged."""
    return [one.message_id for one in reported(log, client_id) if isinstance(one, MessageAcked)]


def _number(one: Sent | DeliveryFailed) -> int:
    return int(one.lease.rpartition("/")[2])


async def until_sent(log: Log, client_id: str, *numbers: int) -> None:
    """Wait until exactly these leases are reported as sent, in this order."""
    await log.until(lambda: len(sent(log, client_id)) >= len(numbers), f"{len(numbers)} sent")
    assert sent(log, client_id) == list(numbers)


async def until_failed(log: Log, client_id: str, *failures: tuple[int, str]) -> None:
    """Wait until exactly these leases are reported as failed, in this order."""
    await log.until(lambda: len(failed(log, client_id)) >= len(failures), f"failed: {failures}")
    assert failed(log, client_id) == list(failures)


async def until_acked(log: Log, client_id: str, *numbers: int) -> None:
    """Wait until exactly these messages are reported as acknowledged, in this order."""
    names = [f"m{number}" for number in numbers]
    await log.until(lambda: len(acked(log, client_id)) >= len(names), f"acknowledged: {names}")
    assert acked(log, client_id) == names


async def answer_all(client: Client, count: int) -> list[int]:
    """Acknowledge the next copies; their numbers."""
    numbers = []
    for _ in range(count):
        copy = await client.next(PUBLISH)
        ack(client, copy)
        numbers.append(number_of(copy))
    return numbers


async def next_copies(client: Client, count: int) -> list[Packet]:
    """The next packets, which must be PUBLISHes."""
    return [await client.next(PUBLISH) for _ in range(count)]


def number_of(packet: Packet) -> int:
    return int(delivered(packet)[1])


def is_repeated(packet: Packet) -> bool:
    """True if the DUP flag is set."""
    return bool(packet.flags & 8)


def ack(client: Client, packet: Packet) -> None:
    client.answer(PUBACK, delivered(packet)[3])


async def until_dead_letters(
    bootstrap: str, client_id: str, count: int
) -> list[tuple[bytes | None, dict[str, bytes]]]:
    """Wait for the dead letters of a client's commands; their values and headers."""
    consumer = AIOKafkaConsumer(
        keys.DEAD_LETTERS_TOPIC, bootstrap_servers=bootstrap, auto_offset_reset="earliest"
    )
    await consumer.start()
    dead_letters: list[tuple[bytes | None, dict[str, bytes]]] = []

    async def read() -> bool:
        for records in (await consumer.getmany(timeout_ms=200)).values():
            dead_letters.extend(
                (record.value, dict(record.headers))
                for record in records
                if record.key == client_id.encode()
            )
        return len(dead_letters) >= count

    try:
        await until(read, f"{count} dead letters of {client_id!r}")
    finally:
        await consumer.stop()
    return dead_letters


async def until_read(bridge: Bridge, log: Log, commands: Commands, client_id: str) -> int:
    """Wait until the bridge has read the commands of a client's partition: write one more, and wait for its report.

    Returns the number of commands written for that.
    """
    names = (f"{client_id}-after-{number}" for number in itertools.count())
    name = next(name for name in names if partition_of(name) == partition_of(client_id))
    client = await bridge.connect(name)
    await commands.deliver(name, 0)
    assert await answer_all(client, 1) == [0]
    await until_acked(log, name, 0)
    return 1


async def until_committed(bridge: Bridge, client_id: str, count: int) -> None:
    """Wait until the bridge has committed this many commands of a client's partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bridge.bootstrap)
    await admin.start()
    partition = TopicPartition(keys.DELIVERIES_TOPIC, partition_of(client_id))

    async def committed() -> bool:
        offsets = await admin.list_consumer_group_offsets(keys.bridge_group_id(bridge.app))
        return partition in offsets and offsets[partition].offset == count

    try:
        await until(committed, f"{count} committed commands")
    finally:
        await admin.close()
