"""Kafka or the bridge goes away while commands are carried out: none vanishes, and what is finished is committed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from millpond.pipeline.brokers.embedded.outgoing import DELIVERY_WINDOW
from millpond.pipeline.kafka.offsets import UNFINISHED_BYTES_MAX, UNFINISHED_MAX
from millpond.schemas import keys
from tests.support import given, servers
from tests.support.bridge_commands import (
    Commands,
    ack,
    acked,
    answer_all,
    commanding,
    failed,
    next_copies,
    partition_of,
    reported,
    sent,
    until_acked,
    until_committed,
    until_dead_letters,
    until_failed,
    until_read,
    until_sent,
)
from tests.support.embedded_bridge import MESSAGE_BYTES_MAX, Bridge, Log, make_topics, reading
from tests.support.mqtt import PINGRESP, PUBLISH, Client
from tests.support.servers import Server

RULES = (
    given.store(),
    given.a_rule(hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue"),
)
# Of memory: the commands that may be unfinished, and what they were read from.
HELD_BYTES_MAX = 2 * UNFINISHED_BYTES_MAX


@pytest.fixture(scope="module")
def hurt_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Kafka of this module's own."""
    server = servers.kafka_server(tmp_path_factory.mktemp("kafka"))
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture
async def bridge(hurt_kafka: Server, tmp_path: Path) -> AsyncIterator[Bridge]:
    """A bridge with empty topics for each test."""
    hurt_kafka.resume()
    await make_topics(hurt_kafka.address)
    # Its group is its own, or it would wait for Kafka to miss the bridge of the test before
    bridge = Bridge(hurt_kafka.address, tmp_path / "bridge", *RULES, app=tmp_path.name)
    try:
        yield bridge.until_ready()
        assert "Traceback" not in bridge.said(), bridge.said()[-4_000:]
    finally:
        bridge.let_go()
        bridge.kill()
        hurt_kafka.resume()


@pytest.fixture
async def commands(bridge: Bridge) -> AsyncIterator[Commands]:
    async with commanding(bridge.bootstrap) as commands:
        yield commands


async def test_what_is_finished_is_committed_up_to_the_first_that_is_not(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    # Given a client without room, with commands that wait
    slow = await bridge.connect("slow")
    await commands.deliver("slow", *range(DELIVERY_WINDOW + 2))
    copies = await next_copies(slow, DELIVERY_WINDOW)
    await until_committed(bridge, "slow", DELIVERY_WINDOW)
    # When a later one of the same partition finishes, Then it is not committed before them
    await commands.write_bytes("slow", b"no command")
    await commands.deliver("slow", 999, epoch=2, topic="queue/#")
    await until_failed(log, "slow", (999, "bridge"))
    await until_committed(bridge, "slow", DELIVERY_WINDOW)
    # When they finish, Then all is
    for copy in copies:
        ack(slow, copy)
    await until_committed(bridge, "slow", DELIVERY_WINDOW + 4)


async def test_commands_that_a_killed_bridge_had_not_finished_come_again(
    bridge: Bridge, log: Log, commands: Commands, tmp_path: Path
) -> None:
    # Given commands that are finished, and more that wait for a client's room
    slow = await bridge.connect("killed")
    count = DELIVERY_WINDOW + 5
    await commands.deliver("killed", *range(count))
    await next_copies(slow, DELIVERY_WINDOW)
    await until_committed(bridge, "killed", DELIVERY_WINDOW)
    # When the bridge is killed, and another starts
    bridge.kill()
    other = Bridge(bridge.bootstrap, tmp_path / "other", *RULES, port=bridge.port, app=bridge.app)
    try:
        other.until_ready()
        # Then what was not finished comes again, and nothing else
        waiting = range(DELIVERY_WINDOW, count)
        await log.until(lambda: len(failed(log, "killed")) >= 5, "the commands that waited")
        assert [number for number, _ in failed(log, "killed")] == list(waiting)
        assert failed(log, "killed")[0] == (DELIVERY_WINDOW, "no_client")
        await until_committed(bridge, "killed", count)
        client = await other.connect("killed")
        await commands.deliver("killed", 1_000, epoch=2)
        assert await answer_all(client, 1) == [1_000]
        await until_sent(log, "killed", *range(DELIVERY_WINDOW), 1_000)
    finally:
        other.let_go()
        other.kill()


async def test_a_bridge_that_ends_says_what_has_not_been_sent(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("ending")
    await commands.deliver("ending", *range(DELIVERY_WINDOW + 2))
    copies = await next_copies(client, DELIVERY_WINDOW)
    ack(client, copies[5])
    await client.next(PUBLISH)
    bridge.signal(signal.SIGTERM)
    assert await bridge.ended() == 0, bridge.said()
    await until_acked(log, "ending", 5)
    await until_failed(log, "ending", (DELIVERY_WINDOW + 1, "no_client"))


async def test_a_command_that_is_read_after_its_validity_is_stale(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("slept")
    await commands.deliver("slept", 1)
    assert await answer_all(client, 1) == [1]
    # When the bridge does not run for longer than a command is valid
    bridge.signal(signal.SIGSTOP)
    await commands.deliver("slept", 2, valid_for_s=1)
    await commands.deliver("slept", 3)
    await commands.deliver("slept", 4, epoch=2)
    await asyncio.sleep(1.2)  # the validity itself
    bridge.signal(signal.SIGCONT)
    assert await answer_all(client, 1) == [4]
    await until_failed(log, "slept", (2, "stale"), (3, "stale"))


async def test_while_kafka_is_away_clients_are_served_with_what_was_read_and_told_of_later(
    bridge: Bridge, hurt_kafka: Server, log: Log, commands: Commands
) -> None:
    # Given two clients with more commands than room
    count = DELIVERY_WINDOW * 3
    client, leaving = await bridge.connect("outage"), await bridge.connect("outage-2")
    await commands.deliver("outage", *range(count))
    await commands.deliver("outage-2", *range(DELIVERY_WINDOW + 1))
    copies = await next_copies(client, DELIVERY_WINDOW)
    await next_copies(leaving, DELIVERY_WINDOW)
    await until_sent(log, "outage", *range(DELIVERY_WINDOW))
    more = await until_read(bridge, log, commands, "outage")
    # When Kafka goes away, Then acknowledgements are taken and the next copies come
    hurt_kafka.pause()
    for copy in copies:
        ack(client, copy)
    copies = await next_copies(client, DELIVERY_WINDOW)
    leaving.vanish()
    client.ping()
    await client.next(PINGRESP)
    for copy in copies:
        ack(client, copy)
    # And when it is back, all of it is told: each copy as sent before it is as acknowledged
    hurt_kafka.resume()
    copies = await next_copies(client, DELIVERY_WINDOW)
    for copy in copies:
        ack(client, copy)
    await until_acked(log, "outage", *range(count))
    await until_failed(log, "outage-2", (DELIVERY_WINDOW, "no_client"))
    await until_sent(log, "outage", *range(count))
    seen: set[str] = set()
    for one in reported(log, "outage"):
        if type(one).__name__ == "Sent":
            seen.add(one.message_id)
        assert one.message_id in seen
    await until_committed(bridge, "outage", count + more)


async def test_kafka_killed_in_the_middle_loses_no_report(
    bridge: Bridge, hurt_kafka: Server, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("crash")
    count = 3_000
    await commands.deliver("crash", *range(count))
    assert await answer_all(client, 200) == list(range(200))
    await asyncio.to_thread(hurt_kafka.kill)
    answering = asyncio.create_task(answer_until(client, count - 1))
    await asyncio.to_thread(hurt_kafka.start)
    # A command that Kafka had not taken as finished may come again; none is left out
    numbers = await answering
    assert sorted(set(numbers)) == list(range(200, count))
    await log.until(lambda: len(set(acked(log, "crash"))) == count, "every acknowledgement")
    assert sorted(set(sent(log, "crash"))) == list(range(count))
    await until_committed(bridge, "crash", count)


async def answer_until(client: Client, last: int) -> list[int]:
    """The numbers of the copies up to this one, each acknowledged as it comes."""
    numbers: list[int] = []
    while not numbers or numbers[-1] != last:
        numbers += await answer_all(client, 1)
    return numbers


@pytest.mark.parametrize(
    ("count", "size"), [(UNFINISHED_MAX * 2, 10), (UNFINISHED_BYTES_MAX * 5 // 100_000, 100_000)]
)
async def test_no_more_is_read_of_a_partition_than_may_be_unfinished(
    bridge: Bridge, log: Log, commands: Commands, count: int, size: int
) -> None:
    # Given a client that acknowledges nothing, and more commands, or larger ones, than may be unfinished
    client = await bridge.connect("hoard")
    before = psutil.Process(bridge.process.pid).memory_info().rss
    await commands.deliver("hoard", *range(count), payload="x" * size)
    await next_copies(client, DELIVERY_WINDOW)
    # Then others are served meanwhile
    assert partition_of("elsewhere-2") != partition_of("hoard")
    other = await bridge.connect("elsewhere-2")
    for number in range(50):
        await commands.deliver("elsewhere-2", number)
        assert await answer_all(other, 1) == [number]
    held = psutil.Process(bridge.process.pid).memory_info().rss - before
    assert held < HELD_BYTES_MAX
    # And when it leaves, each of them is reported
    client.vanish()
    await log.until(lambda: len(failed(log, "hoard")) == count - DELIVERY_WINDOW, "all")
    await until_committed(bridge, "hoard", count)


async def test_reports_that_kafka_refuses_for_what_is_beside_them_are_written_again(
    bridge: Bridge, hurt_kafka: Server, log: Log, commands: Commands
) -> None:
    # Given a Kafka whose limit is lower than the bridge believes, and a client with copies
    await limit_messages(bridge.bootstrap, 100_000)
    client, publisher = await bridge.connect("beside"), await bridge.connect("beside-pub")
    await commands.deliver("beside", *range(DELIVERY_WINDOW * 2))
    copies = await next_copies(client, DELIVERY_WINDOW)
    await until_sent(log, "beside", *range(DELIVERY_WINDOW))
    more = await until_read(bridge, log, commands, "beside")
    # When reports are to go in one batch with a publish that it does not take
    hurt_kafka.pause()
    topic = next(n for n in map(str, range(99)) if partition_of(n) == partition_of("queue/beside"))
    publisher.publish(topic, b"on its way before them", 1, 1)
    await asyncio.sleep(0.2)  # far longer than records wait for company
    publisher.publish(topic, b"l" * 150_000, 1, 2)
    publisher.ping()
    await publisher.next(PINGRESP)
    for copy in copies:
        ack(client, copy)
    await next_copies(client, DELIVERY_WINDOW)
    hurt_kafka.resume()
    assert await publisher.acknowledged(2) == [1]
    # Then that is refused, and they are there in the end
    await until_acked(log, "beside", *range(DELIVERY_WINDOW))
    await log.until(lambda: len(sent(log, "beside")) == DELIVERY_WINDOW * 2, "the copies as sent")
    await until_committed(bridge, "beside", DELIVERY_WINDOW * 2 + more)
    assert "Kafka refused a report" in bridge.said()


async def test_reports_that_are_too_large_for_kafka_are_written_in_parts(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    # Given a Kafka that takes the reports of some copies in one record, and not those of a window
    name = "n" * 300
    client = await bridge.connect(name)
    await limit_messages(bridge.bootstrap, 3_000)
    await commands.deliver(name, *range(DELIVERY_WINDOW))
    # Then each copy is reported nevertheless, and its command committed
    await next_copies(client, DELIVERY_WINDOW)
    await until_sent(log, name, *range(DELIVERY_WINDOW))
    await until_committed(bridge, name, DELIVERY_WINDOW)
    assert "a report is dropped" not in bridge.said()


async def test_a_dead_letter_that_kafka_refuses_is_not_taken_for_one_that_it_has(
    bridge: Bridge, commands: Commands
) -> None:
    # Given a Kafka whose limit for dead letters is lower than that for commands
    await limit_messages(bridge.bootstrap, 2_000, keys.DEAD_LETTERS_TOPIC)
    client = await bridge.connect("refused")
    # When a command that cannot be read is larger
    await commands.write_bytes("refused", b"no command" * 1_000)
    await commands.deliver("refused", 2)
    assert await answer_all(client, 1) == [2]
    # Then its marks are there, and the command is finished
    ((value, headers),) = await until_dead_letters(bridge.bootstrap, "refused", 1)
    assert value == b""
    assert headers["source-topic"] == keys.DELIVERIES_TOPIC.encode()
    assert b"too large" in headers["not-produced"]
    await until_committed(bridge, "refused", 2)


async def test_a_command_that_is_just_small_enough_and_unreadable_does_not_end_the_bridge(
    bridge: Bridge, commands: Commands
) -> None:
    client = await bridge.connect("limit")
    # The dead letter has headers beside the same bytes, so it is larger than the limit.
    await commands.write_bytes("limit", b"x" * (MESSAGE_BYTES_MAX - 120))
    await commands.deliver("limit", 2)
    assert await answer_all(client, 1) == [2]
    ((value, headers),) = await until_dead_letters(bridge.bootstrap, "limit", 1)
    assert (value, headers["agent"]) == (b"", b"bridge")
    await until_committed(bridge, "limit", 2)


async def limit_messages(bootstrap: str, size: int, name: str = keys.MESSAGES_TOPIC) -> None:
    """Kafka's own limit for the records of a topic."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    changes = {"max.message.bytes": str(size)}
    topic = ConfigResource(ConfigResourceType.TOPIC, name, changes)
    await admin.alter_configs([topic])
    await admin.close()


async def test_a_lone_command_is_carried_out_and_reported_at_once(
    bridge: Bridge, log: Log, commands: Commands
) -> None:
    client = await bridge.connect("lone")
    times = []
    for number in range(20):
        started = time.monotonic()
        await commands.deliver("lone", number)
        assert await answer_all(client, 1) == [number]
        times.append(time.monotonic() - started)
    assert sorted(times)[10] < 0.05
    async with reading(bridge.bootstrap, from_start=True) as everything:
        await until_acked(everything, "lone", *range(20))
