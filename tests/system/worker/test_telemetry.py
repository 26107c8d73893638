"""Metrics and health of real processes, compared with the work that they did."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from tests.support import given
from tests.support import world as worlds
from tests.support.scraping import LISTEN, Scrape, health
from tests.support.servers import Server
from tests.support.workers import PARTITIONS, until
from tests.support.world import Consumer, World, numbered, publish

STORED, QUEUED = 40, 25
RULES = (LISTEN, given.store(), given.queue("queue/#", ack_timeout_s=2))


@pytest.fixture
def world(app_name: str, kafka: str, redis_server: str, tmp_path: Path) -> Iterator[World]:
    yield from worlds.running(
        app_name, kafka, redis_server, tmp_path, RULES, "sessions", "messages", "queue"
    )


def log_of(world: World, agent: str) -> Path:
    return world.workers_of(agent)[0].log


async def test_the_metrics_match_the_published_messages(world: World) -> None:
    # Given stored messages without a consumer, and queued ones whose consumer acknowledges them
    consumer = await Consumer(world, "anna", "queue/#").come()

    async def joined() -> bool:
        queue = Scrape(log_of(world, "queue"))
        number = queue.value("millpond_events_total", type="subscriber.joined", outcome="applied")
        return number == PARTITIONS  # a join with a wildcard goes to every partition

    await until(joined, "the subscription to be known")
    await publish(world, "plain", *numbered(0, STORED))
    await publish(world, "queue/a", *numbered(0, QUEUED))
    await world.until_stored(STORED, "plain")
    await world.until_nothing_is_left("queue/a")

    async def caught_up() -> bool:
        scrapes = [Scrape(log_of(world, agent)) for agent in ("messages", "queue")]
        return all(
            {sample.value for sample in scrape.samples if sample.name == "millpond_lag_records"}
            == {0.0}
            for scrape in scrapes
        )

    await until(caught_up, "no lag")
    # Then the owner of each topic has counted its messages, and the other agent has skipped them
    messages, queue = Scrape(log_of(world, "messages")), Scrape(log_of(world, "queue"))
    applied = {"outcome": "applied", "type": "message.published"}
    assert messages.value("millpond_events_total", **applied, agent="messages") == STORED
    assert queue.value("millpond_events_total", **applied, agent="queue") == QUEUED
    assert messages.value("millpond_records_skipped_total") >= QUEUED
    assert messages.value("millpond_seen_ids_total") == STORED
    # and there are as many leases, reports and acknowledgements as messages
    assert queue.value("millpond_leases_total") == QUEUED
    assert queue.value("millpond_outputs_total", type="hand_out") == QUEUED
    assert queue.value("millpond_deliveries_total", outcome="sent") == QUEUED
    assert queue.value("millpond_events_total", type="message.acked") == QUEUED
    assert queue.value("millpond_leases_unconfirmed") == 0
    assert queue.value("millpond_redeliveries_total") == 0
    assert queue.value("millpond_publish_to_command_seconds_count") == QUEUED
    assert 0 < queue.value("millpond_publish_to_command_seconds_sum") < 60 * QUEUED
    assert queue.value("millpond_batch_records_sum") == sum(
        sample.value for sample in queue.samples if sample.name == "millpond_events_total"
    )
    assert queue.value("millpond_batch_duration_seconds_count") > 0
    assert queue.value("millpond_store_duration_seconds_count", operation="commit") > 0
    assert queue.value("millpond_partitions", state="loaded") == PARTITIONS
    # and the bridge has counted all of them
    bridge = Scrape(world.bridge.log)
    assert bridge.value("millpond_bridge_events_total", type="message.published") == (
        STORED + QUEUED
    )
    assert bridge.value("millpond_bridge_events_total", type="message.acked") == QUEUED
    assert bridge.value("millpond_bridge_events_lost_total") == 0
    assert bridge.value("millpond_bridge_events_unacknowledged") == 0
    assert bridge.value("millpond_bridge_event_duration_seconds_count") == bridge.value(
        "millpond_bridge_events_total"
    )
    assert bridge.value("millpond_bridge_commands_total", type="deliver") == QUEUED
    assert bridge.value("millpond_bridge_commands_unfinished") == 0
    assert bridge.value("millpond_bridge_deliveries_total", agent="queue", outcome="sent") == QUEUED
    assert bridge.value("millpond_publish_to_client_seconds_count", agent="queue") == QUEUED
    await consumer.leave()


async def test_redeliveries_and_unreadable_records_are_counted(world: World) -> None:
    # Given a consumer that does not acknowledge, and a second one after the end of its lease
    idle = await Consumer(world, "idle", "queue/#", acks=False).come()
    await publish(world, "queue/a", "once more")
    await idle.until_got(1)
    await idle.vanish()
    anna = await Consumer(world, "anna", "queue/#").come()
    await anna.until_got(1)
    await world.until_nothing_is_left("queue/a")
    queue = Scrape(log_of(world, "queue"))
    assert queue.value("millpond_leases_total") == 2
    assert queue.value("millpond_redeliveries_total") == 1
    # When a record is not an event
    async with AIOKafkaProducer(bootstrap_servers=world.bootstrap) as producer:
        await producer.send_and_wait("mqtt.messages", key=b"plain", value=b"not JSON")

    async def counted() -> bool:
        scrape = Scrape(log_of(world, "messages"))
        return scrape.value("millpond_dead_letters_total", reason="unreadable") == 1

    await until(counted, "a dead letter")
    messages = Scrape(log_of(world, "messages"))
    outcome = {"type": "unreadable", "outcome": "dead_letter"}
    assert messages.value("millpond_events_total", **outcome) == 1
    assert messages.value("millpond_outputs_total", type="dead_letter") == 1
    await anna.leave()


async def test_a_process_is_ready_when_kafka_and_redis_answer(world: World) -> None:
    for log in (log_of(world, "messages"), log_of(world, "sessions"), world.bridge.log):
        for path in ("/healthz", "/readyz"):
            status, said = await asyncio.to_thread(health, log, path)
            assert (status, said["ok"], said["reasons"]) == (200, True, []), said


@pytest.fixture
def own_redis_world(
    app_name: str, kafka: str, own_redis: Server, tmp_path: Path
) -> Iterator[World]:
    rules = (LISTEN, given.store())
    yield from worlds.running(app_name, kafka, own_redis.address, tmp_path, rules, "messages")


async def test_a_worker_without_its_store_is_not_ready_and_says_why(
    own_redis_world: World, own_redis: Server
) -> None:
    # Given a worker that is ready
    world = own_redis_world
    log = log_of(world, "messages")
    assert health(log, "/readyz")[0] == 200
    # When its store is down, and events arrive
    own_redis.kill()
    await publish(world, "plain", *numbered(0, 5))

    async def ready(expected: int) -> bool:
        status, said = await asyncio.to_thread(health, log, "/readyz")
        assert status == 200 or any(
            "the store has not answered" in each for each in said["reasons"]
        )
        return status == expected

    # Then it is not ready, and says why. It can continue, and its lag is visible.
    await until(lambda: ready(503), "a worker that is not ready")
    assert health(log, "/healthz")[0] == 200

    async def behind() -> bool:
        return Scrape(log).value("millpond_lag_records") == 5

    await until(behind, "lag")
    scrape = Scrape(log)
    assert scrape.value("millpond_lag_seconds") > 0
    assert scrape.value("millpond_store_failures_total") > 0
    # And when the store is back, the worker is ready again
    own_redis.start()
    await until(lambda: ready(200), "a worker that is ready")
    await world.until_stored(5, "plain")


@pytest.fixture
def own_kafka_world(
    app_name: str, own_kafka: Server, redis_server: str, tmp_path: Path
) -> Iterator[World]:
    rules = (LISTEN, given.store())
    world = World(app_name, own_kafka.address, redis_server, tmp_path, *rules)
    try:
        yield asyncio.run(world.start("messages"))
    finally:
        world.stop()


async def test_without_kafka_neither_worker_nor_bridge_is_ready(
    own_kafka_world: World, own_kafka: Server
) -> None:
    world = own_kafka_world
    logs = (log_of(world, "messages"), world.bridge.log)
    for log in logs:
        assert health(log, "/readyz")[0] == 200
    own_kafka.pause()
    for log in logs:
        status, said = await asyncio.to_thread(health, log, "/readyz")
        assert (status, said["ok"]) == (503, False)
        assert "Kafka has not answered within 2 s" in said["reasons"]
        assert health(log, "/healthz")[0] == 200
    own_kafka.resume()

    async def ready() -> bool:
        found = [await asyncio.to_thread(health, log, "/readyz") for log in logs]
        return all(status == 200 for status, _ in found)

    await until(ready, "worker and bridge to be ready")


async def test_a_worker_that_was_asked_to_stop_is_not_healthy(
    own_kafka_world: World, own_kafka: Server
) -> None:
    # Given a worker that cannot stop cleanly, because Kafka is down
    world = own_kafka_world
    log = log_of(world, "messages")
    own_kafka.pause()
    world.workers_of("messages")[0].signal(signal.SIGTERM)

    async def stopping() -> bool:
        status, said = await asyncio.to_thread(health, log, "/healthz")
        return status == 503 and said["reasons"] == ["the worker was asked to stop"]

    await until(stopping, "a worker that says that it was asked to stop")
    own_kafka.resume()
