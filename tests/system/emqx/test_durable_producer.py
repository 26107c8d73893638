"""The durable producer through outages of Kafka and kills of its process: stored events reach Kafka, and in order."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from millpond.pipeline.brokers.spool.durable_producer import DurableProducer, NotStored
from millpond.pipeline.brokers.spool.sender import LOST_IN_THE_SPOOL
from millpond.schemas import keys
from millpond.schemas.events import NodeStarted
from tests.support import servers
from tests.support.durable_producer import (
    HOOK,
    TOPICS,
    Process,
    enter,
    first_times,
    numbers,
    running,
    topic_of,
)
from tests.support.embedded_bridge import MESSAGE_BYTES_MAX, Log, make_topics, reading
from tests.support.servers import Server
from tests.support.workers import PARTITIONS, WAIT_S, until

PATIENCE_S = 0.5
ANSWER_S = PATIENCE_S + 3.0  # a commit takes milliseconds, but machines are shared
SEED = 7
ROUNDS = 6


@pytest.fixture(scope="module")
def hurt_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Kafka of this module's own."""
    server = servers.kafka_server(tmp_path_factory.mktemp("kafka"))
    try:
        server.start()
        asyncio.run(make_topics(server.address))
        yield server
    finally:
        server.kill()


@pytest.fixture
def paused(hurt_kafka: Server) -> Iterator[Server]:
    """A Kafka that a test may pause. It is resumed in any case."""
    yield hurt_kafka
    hurt_kafka.resume()


@pytest.fixture
async def log(hurt_kafka: Server) -> AsyncIterator[Log]:
    async with reading(hurt_kafka.address) as log:
        yield log


def has(log: Log, topics: Sequence[str], number: int) -> bool:
    return any(number in numbers(log, topic) for topic in topics)


async def has_answered(process: Process, count: int) -> bool:
    return len(process.answered) >= count


async def until_drained(durable_producer: DurableProducer) -> None:
    async def drained() -> bool:
        return not durable_producer.spooling and durable_producer.depth == (0, 0)

    await until(drained, "the spool to be empty")


async def test_while_kafka_answers_the_disk_is_not_used(
    hurt_kafka: Server, log: Log, tmp_path: Path
) -> None:
    async with running(hurt_kafka.address, tmp_path, patience_s=WAIT_S) as one:
        await asyncio.gather(
            *(enter(one.durable_producer, "direct", number) for number in range(500))
        )
        assert one.durable_producer.depth == (0, 0)
        assert one.durable_producer.spooled.total() == 0
        assert one.durable_producer.entered == {HOOK: 500}
        assert one.durable_producer.complaint is None
    await log.until_published("direct", 500)
    assert numbers(log, "direct") == list(range(500))


async def test_an_event_for_a_partition_reaches_it(
    hurt_kafka: Server, log: Log, tmp_path: Path
) -> None:
    async with running(hurt_kafka.address, tmp_path) as one:
        event = NodeStarted(at=1, node="n")
        for number in range(PARTITIONS):
            await one.durable_producer.enter(keys.CLIENTS_TOPIC, event, number, hook="node")

    def started() -> list[int]:
        return [record.partition for record in log.records if record.event == event]

    await log.until(lambda: len(started()) == PARTITIONS, "one in each partition")
    assert sorted(started()) == list(range(PARTITIONS))


async def test_an_outage_in_the_middle_of_a_flood_delays_and_loses_nothing(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    async with running(paused.address, tmp_path) as one:
        await enter(one.durable_producer, "flood/0", 0)
        waits: list[float] = []
        rest: list[asyncio.Future[None]] = []

        async def publish(number: int) -> None:
            begun = time.monotonic()
            await enter(one.durable_producer, f"flood/{number % 3}", number)
            waits.append(time.monotonic() - begun)

        async def publish_for(seconds: float, first: int) -> int:
            end, number = time.monotonic() + seconds, first
            while time.monotonic() < end:
                for _ in range(20):
                    rest.append(asyncio.ensure_future(publish(number)))
                    number += 1
                await asyncio.sleep(0.02)
            return number

        # When Kafka stops in the middle, and continues
        number = await publish_for(0.3, 1)
        paused.pause()
        number = await publish_for(2 * PATIENCE_S + 1, number)
        assert one.durable_producer.spooling
        assert one.durable_producer.depth[0] > 500
        paused.resume()
        number = await publish_for(1, number)
        # Then every event is stored in time
        await asyncio.gather(*rest)
        assert max(waits) < ANSWER_S
        await until_drained(one.durable_producer)
        number = await publish_for(0.3, number)
        await asyncio.gather(*rest)
        assert one.durable_producer.lost.total() == 0
    # And Kafka has each event once, in order
    for each in range(3):
        expected = list(range(each, number, 3))
        await log.until_published(f"flood/{each}", len(expected))
        assert numbers(log, f"flood/{each}") == expected


async def test_too_many_unstored_bytes_begin_spooling_before_the_patience_ends(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    # Given a Kafka that stops, and more for one partition than the producer takes
    async with running(paused.address, tmp_path) as one:
        await enter(one.durable_producer, "large", 0)
        paused.pause()
        begun = time.monotonic()
        await asyncio.gather(
            *(enter(one.durable_producer, "large", n, 200_000) for n in range(1, 60))
        )
        # Then spooling begins before the patience is over
        assert time.monotonic() - begun < ANSWER_S
        await enter(one.durable_producer, "large", 60)
        paused.resume()
        await until_drained(one.durable_producer)
    await log.until_published("large", 61)
    assert numbers(log, "large") == list(range(61))


async def test_a_bridge_that_stops_in_an_outage_leaves_its_events_to_the_next_one(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    one = running(paused.address, tmp_path, patience_s=30)
    durable_producer = await one.__aenter__()
    await enter(durable_producer.durable_producer, "ends", 0)
    paused.pause()
    futures = [enter(durable_producer.durable_producer, "ends", number) for number in range(1, 100)]
    # When it is stopped while Kafka does not answer
    await durable_producer.end(grace_s=0.1)
    # Then its events are stored, and the next process sends them first
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(NotStored, match="ended"):
        await enter(durable_producer.durable_producer, "ends", 1_000)
    paused.resume()
    async with running(paused.address, tmp_path) as two:
        assert two.spool.number == 0
        await enter(two.durable_producer, "ends", 100)
        await until_drained(two.durable_producer)
    await log.until(lambda: 100 in numbers(log, "ends"), "the last")
    assert first_times(numbers(log, "ends")) == list(range(101))


async def test_a_bridge_stops_although_its_events_do_not_fit_into_the_spool(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    one = running(paused.address, tmp_path, bytes_max=100_000, patience_s=30)
    durable_producer = await one.__aenter__()
    await enter(durable_producer.durable_producer, "more", 0)
    paused.pause()
    futures = [
        enter(durable_producer.durable_producer, "more", number, 10_000) for number in range(1, 100)
    ]
    await durable_producer.end(grace_s=0.1)
    # Then the first events are stored, and the others raise an error
    kept = [number for number, future in enumerate(futures, 1) if future.exception() is None]
    assert kept == list(range(1, 10))
    paused.resume()
    async with running(paused.address, tmp_path) as two:
        await until_drained(two.durable_producer)
        await enter(two.durable_producer, "more", 100)
    await log.until(lambda: 100 in numbers(log, "more"), "the last")
    assert set(kept) <= set(numbers(log, "more"))


async def test_a_bridge_that_is_killed_in_an_outage_loses_no_stored_event(
    hurt_kafka: Server, log: Log, tmp_path: Path
) -> None:
    # Given processes that share a directory, and are killed while Kafka is down
    spool = tmp_path / "spool"
    processes = [Process(hurt_kafka.address, spool, f"k{n}", 0) for n in range(2)]

    async def answered(count: int) -> None:
        async def reached() -> bool:
            return all(len(process.answered) >= count for process in processes)

        await until(reached, f"{count} answers")

    await answered(500)
    await asyncio.to_thread(hurt_kafka.kill)
    await answered(max(len(process.answered) for process in processes) + 2_000)
    stored = [await process.kill() for process in processes]
    # When one process starts while Kafka is still down, and another when it is back
    first = [max(numbers) + 1 for numbers in stored]
    later = Process(hurt_kafka.address, spool, "k0", first[0] + 10_000)
    processes = [later]
    await answered(500)
    stored[0] += await later.kill()
    await asyncio.to_thread(hurt_kafka.start)
    async with running(hurt_kafka.address, spool) as one:
        await until_drained(one.durable_producer)
        assert one.spool.orphans == []
    # Then Kafka has every event that they stored, and no event overtook an earlier one
    for client, stored_numbers in enumerate(stored):
        topics = [topic_of(f"k{client}", number) for number in range(TOPICS)]
        await log.until(partial(has, log, topics, max(stored_numbers)), "the last")
        found = [first_times(numbers(log, topic)) for topic in topics]
        assert all(each == sorted(each) for each in found)
        assert set(stored_numbers) <= {number for each in found for number in each}


async def test_a_bridge_without_kafka_starts_stores_events_and_stops(
    hurt_kafka: Server, log: Log, tmp_path: Path
) -> None:
    async with running("127.0.0.1:1", tmp_path) as one:
        begun = time.monotonic()
        await asyncio.gather(
            *(enter(one.durable_producer, "early", number) for number in range(10))
        )
        assert time.monotonic() - begun < ANSWER_S
        await enter(one.durable_producer, "early", 10)
        assert not one.durable_producer.connected.is_set()
    async with running(hurt_kafka.address, tmp_path) as two:
        await enter(two.durable_producer, "early", 11)
        await until_drained(two.durable_producer)
    await log.until_published("early", 12)
    assert numbers(log, "early") == list(range(12))


async def test_a_spool_file_damaged_in_an_outage_is_moved_aside_and_its_records_counted(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    async with running(paused.address, tmp_path) as one:
        await enter(one.durable_producer, "unreadable", 0)
        paused.pause()
        await asyncio.gather(
            *(enter(one.durable_producer, "unreadable", n, 50_000) for n in range(1, 300))
        )
        own = one.durable_producer._sender.own
        untaken, database = own.last - own.taken, own.file._database
        assert database is not None
        assert 100 < untaken < 299
        # When the file becomes unreadable
        await one.spool.submit(database.execute, "UPDATE block SET packed = x'c1'")
        paused.resume()
        await until_drained(one.durable_producer)
        # Then it is moved aside, its records are counted as lost, and the bridge continues
        assert one.durable_producer.lost == {LOST_IN_THE_SPOOL: untaken}
        (aside,) = own.file.damaged
        assert aside.exists()
        await enter(one.durable_producer, "unreadable", 300)
    await log.until_published("unreadable", 301 - untaken)
    assert numbers(log, "unreadable") == [*range(300 - untaken), 300]


async def test_after_a_spool_file_is_deleted_lost_records_are_counted_and_later_ones_stored(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    async with running(paused.address, tmp_path) as one:
        await enter(one.durable_producer, "damaged", 0)
        paused.pause()
        # Given more than the producer takes: otherwise it would still have what the file loses
        await asyncio.gather(
            *(enter(one.durable_producer, "damaged", n, 50_000) for n in range(1, 300))
        )
        untaken = one.durable_producer._sender.own.last - one.durable_producer._sender.own.taken
        assert 100 < untaken < 299
        # When the file is deleted, and more events follow
        one.spool.own.path.unlink()
        await asyncio.gather(*(enter(one.durable_producer, "damaged", n) for n in range(300, 320)))
        paused.resume()
        await until_drained(one.durable_producer)
        # Then lost events are counted, and Kafka has the rest
        assert one.durable_producer.lost == {LOST_IN_THE_SPOOL: untaken}
        await enter(one.durable_producer, "damaged", 320)
    await log.until_published("damaged", 321 - untaken)
    first = 300 - untaken
    assert numbers(log, "damaged") == [*range(first), *range(300, 321)]


async def test_only_the_record_that_kafka_refuses_is_lost_and_it_is_counted(
    paused: Server, log: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def limit(size: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=paused.address)
        await admin.start()
        topic = ConfigResource(
            ConfigResourceType.TOPIC, keys.MESSAGES_TOPIC, {"max.message.bytes": str(size)}
        )
        await admin.alter_configs([topic])
        await admin.close()

    # The first one has the patience to wait for Kafka's refusal
    async with running(paused.address, tmp_path, patience_s=WAIT_S) as one:
        # Given a record that is larger than the bridge's limit
        with pytest.raises(NotStored) as refused:
            await enter(one.durable_producer, "sizes", -1, MESSAGE_BYTES_MAX)
        assert refused.value.reason == "too_large"
        assert one.durable_producer.lost == {HOOK: 1}
        # And a Kafka whose limit is lower than the bridge's
        await limit(300_000)
        await enter(one.durable_producer, "sizes", 0)
        futures = [
            enter(one.durable_producer, "sizes", n, 400_000 * (n % 10 == 5)) for n in range(1, 20)
        ]
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [n for n, result in enumerate(results, 1) if result is not None] == [5, 15]
        assert one.durable_producer.lost == {HOOK: 3}
    async with running(paused.address, tmp_path) as one:
        # When such records are in the spool
        paused.pause()
        await asyncio.gather(
            *(
                enter(one.durable_producer, "sizes", n, 400_000 * (n % 10 == 5))
                for n in range(20, 40)
            )
        )
        paused.resume()
        await until_drained(one.durable_producer)
        # Then only these are lost, with log lines that hold no payload
        assert one.durable_producer.lost == {HOOK: 2}
        lost = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
        assert len(lost) == 4
        assert all("b'sizes'" in line and "..." not in line for line in lost)
        await limit(MESSAGE_BYTES_MAX)
    await log.until_published("sizes", 36)
    assert numbers(log, "sizes") == [n for n in range(40) if n % 10 != 5]


async def test_a_full_spool_refuses_events_until_kafka_is_back(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    async with running(paused.address, tmp_path, bytes_max=500_000) as one:
        await enter(one.durable_producer, "full", 0)
        paused.pause()
        kept: list[int] = [0]
        number = 0
        while one.durable_producer.complaint is None:
            number += 1
            try:
                await enter(one.durable_producer, "full", number, 10_000)
            except NotStored as refused:
                assert refused.reason == "full"
            else:
                kept.append(number)
        assert 20 < len(kept) < 60
        assert "is full" in one.durable_producer.complaint
        assert one.durable_producer.lost == {HOOK: 1}
        paused.resume()
        await until_drained(one.durable_producer)
        assert one.durable_producer.complaint is None
        number += 1
        await enter(one.durable_producer, "full", number)
        kept.append(number)
    await log.until_published("full", len(kept))
    assert numbers(log, "full") == kept


async def test_events_are_refused_while_the_spool_cannot_be_written(
    paused: Server, log: Log, tmp_path: Path
) -> None:
    directory, away = tmp_path / "spool", tmp_path / "away"
    async with running(paused.address, directory) as one:
        await enter(one.durable_producer, "broken", 0)
        paused.pause()
        directory.rename(away)
        # Then an event is refused when the patience is over, and the next one at once
        with pytest.raises(NotStored) as refused:
            await enter(one.durable_producer, "broken", 1)
        assert refused.value.reason == "unwritable"
        assert enter(one.durable_producer, "broken", 2).done()
        assert "cannot be written" in (one.durable_producer.complaint or "")
        # When it can be written again
        away.rename(directory)

        async def well() -> bool:
            return one.durable_producer.complaint is None

        await until(well, "no complaint")
        await enter(one.durable_producer, "broken", 3)
        paused.resume()
        await until_drained(one.durable_producer)
        await enter(one.durable_producer, "broken", 4)
    await log.until(lambda: 4 in numbers(log, "broken"), "the last")
    # An event that was in flight may be in Kafka although it was refused
    assert [n for n in numbers(log, "broken") if n not in {1, 2}] == [0, 3, 4]
    assert numbers(log, "broken") == sorted(numbers(log, "broken"))


@pytest.mark.parametrize("seed", [SEED])
async def test_order_holds_through_pauses_and_kills_of_kafka(
    paused: Server, log: Log, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    async with running(paused.address, tmp_path, patience_s=0.3) as one:
        counts = [0] * TOPICS
        futures: list[asyncio.Future[None]] = []
        done = asyncio.Event()

        async def publish() -> None:
            while not done.is_set():
                for _ in range(chance.randrange(40)):
                    each = chance.randrange(TOPICS)
                    size = chance.choice((0, 0, 0, 100, 5_000))
                    futures.append(
                        enter(one.durable_producer, f"s{seed}/{each}", counts[each], size)
                    )
                    counts[each] += 1
                await asyncio.sleep(chance.choice((0.001, 0.01, 0.03)))

        publishing = asyncio.create_task(publish())
        for number in range(ROUNDS):
            await asyncio.sleep(chance.uniform(0, 1))
            if number == ROUNDS // 2:
                await asyncio.to_thread(paused.kill)
                await asyncio.sleep(chance.uniform(0, 1))
                await asyncio.to_thread(paused.start)
            else:
                paused.pause()
                await asyncio.sleep(chance.uniform(0.1, 1))
                paused.resume()
        done.set()
        await publishing
        await asyncio.gather(*futures)
        await until_drained(one.durable_producer)
        assert one.durable_producer.spooled.total() > 0
        assert one.durable_producer.lost.total() == 0
    for each, count in enumerate(counts):
        await log.until_published(f"s{seed}/{each}", count)
        assert numbers(log, f"s{seed}/{each}") == list(range(count))


@pytest.mark.parametrize("seed", [SEED])
async def test_order_holds_through_kills_of_the_bridge(
    paused: Server, log: Log, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    client, stored = f"r{seed}", list[int]()
    for number in range(ROUNDS):
        # Given a bridge that is killed before, in or after an outage, or while the spool is sent
        process = Process(paused.address, tmp_path / "spool", client, number * 1_000_000)
        await until(partial(has_answered, process, 200), "answers")
        for _ in range(chance.randrange(4)):
            paused.pause()
            await asyncio.sleep(chance.uniform(0, 2))
            paused.resume()
            await asyncio.sleep(chance.uniform(0, 0.3))
        stored += await process.kill()
    async with running(paused.address, tmp_path / "spool") as one:
        await until_drained(one.durable_producer)
    # Then Kafka has every stored event, in order. A batch of a killed process may still be on its way.
    topics = [topic_of(client, number) for number in range(TOPICS)]
    await log.until(
        lambda: set(stored) <= {number for topic in topics for number in numbers(log, topic)}, "all"
    )
    answered = set(stored)
    for topic in topics:
        found = first_times(number for number in numbers(log, topic) if number in answered)
        assert found == sorted(found)
