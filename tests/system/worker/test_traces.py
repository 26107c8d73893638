"""One trace from a publish to its delivery, as a collector receives it. Without an endpoint there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from millpond.schemas import keys
from tests.support import given
from tests.support import world as worlds
from tests.support.emqx.world import a_world
from tests.support.otlp import Collector, collecting
from tests.support.workers import PARTITIONS, until
from tests.support.world import Consumer, World, numbered, publish

RULES = (given.store(), given.queue("queue/#", ack_timeout_s=2))
AGENTS = ("sessions", "messages", "queue")
PAYLOAD = "a-private-payload"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def traced(
    collector: Collector, app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> Iterator[World]:
    telemetry = f'[telemetry]\notlp_endpoint = "{collector.url}"\ntrace_ratio = 1.0\n'
    rules = (telemetry, *RULES)
    yield from worlds.running(app_name, kafka, redis_server, tmp_path, rules, *AGENTS)


async def test_a_publish_its_fold_and_its_delivery_are_one_trace(
    traced: World, collector: Collector
) -> None:
    # Given a consumer of a queue
    consumer = await Consumer(traced, "anna", "queue/#").come()
    await publish(traced, "queue/a", PAYLOAD)
    await consumer.until_got(1)

    async def complete() -> bool:
        return all(map(collector.named, ("publish", "fold", "batch", "deliver")))

    # Then each span is a child of the one before, over three processes
    await until(complete, "the spans")
    (published,), (folded,) = collector.named("publish"), collector.named("fold")
    (delivered,) = collector.named("deliver")
    assert published.parent_id == ""
    assert (folded.trace_id, folded.parent_id) == (published.trace_id, published.span_id)
    assert (delivered.trace_id, delivered.parent_id) == (published.trace_id, folded.span_id)
    services = [span.service for span in (published, folded, delivered)]
    assert services == [
        "millpond-bridge-embedded", "millpond-worker-queue", "millpond-bridge-embedded",
    ]  # fmt: skip
    assert published.began_ns <= folded.began_ns <= folded.ended_ns <= delivered.ended_ns
    # and links connect the fold with the batch, which is a trace of its own
    (batch,) = collector.named("batch")
    assert batch.trace_id != published.trace_id
    assert batch.links == [(published.trace_id, published.span_id)]
    assert folded.links == [(batch.trace_id, batch.span_id)]
    # and the spans have the message id, but not the payload
    ids = {span.attributes["messaging.message.id"] for span in (published, folded, delivered)}
    assert len(ids) == 1
    assert delivered.attributes["messaging.client.id"] == "anna"
    assert delivered.attributes["messaging.destination.name"] == "queue/a"
    assert PAYLOAD not in str(collector.spans)
    await consumer.leave()


async def test_a_trace_begins_and_ends_at_an_emqx_bridge_and_no_log_has_the_api_key(
    collector: Collector, app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> None:
    # Given an EMQX through which Millpond delivers, and whose API needs a key
    telemetry = f'[telemetry]\notlp_endpoint = "{collector.url}"\ntrace_ratio = 1.0\nlisten = "0"\n'
    logs = '[log]\nformat = "json"\n'
    rules = (telemetry, logs, *RULES)
    async with a_world(app_name, kafka, redis_server, tmp_path, *rules, agents=AGENTS) as world:
        consumer = await world.emqx.connect("anna")
        await consumer.subscribe("queue/#")
        publisher = await world.emqx.connect("publisher")
        await publisher.publish("queue/a", PAYLOAD.encode())
        await consumer.until_received(1)

        async def complete() -> bool:
            return all(map(collector.named, ("publish", "fold", "deliver")))

        await until(complete, "the spans")
        (published,), (folded,) = collector.named("publish"), collector.named("fold")
        (delivered,) = collector.named("deliver")
        assert (folded.trace_id, folded.parent_id) == (published.trace_id, published.span_id)
        assert (delivered.trace_id, delivered.parent_id) == (published.trace_id, folded.span_id)
        assert published.service == delivered.service == "millpond-bridge-emqx"
        # When EMQX's API refuses the key
        world.rest.key = "another:key"
        await publisher.publish("queue/a", PAYLOAD.encode())
        await world.until_stored("queue/a", 1)
        logs_text = [log.read_text() for log in tmp_path.glob("*.log")]
        assert logs_text
        # Then the logs have neither the key nor the payload
        secret = (tmp_path / "api-key").read_text().strip()
        for text in logs_text:
            assert secret.partition(":")[2] not in text
            assert PAYLOAD not in text


async def test_a_redelivery_belongs_to_the_same_trace(traced: World, collector: Collector) -> None:
    # Given a consumer that disconnects without an acknowledgement
    idle = await Consumer(traced, "idle", "queue/#", acks=False).come()
    await publish(traced, "queue/a", "once more")
    await idle.until_got(1)
    await idle.vanish()
    # When another consumer gets the message
    anna = await Consumer(traced, "anna", "queue/#").come()
    await anna.until_got(1)

    async def both() -> bool:
        return len(collector.named("deliver")) == 2

    await until(both, "both deliveries")
    (published,) = collector.named("publish")
    assert {span.trace_id for span in collector.named("deliver")} == {published.trace_id}
    attempts = [span.attributes["millpond.attempt"] for span in collector.named("deliver")]
    assert sorted(attempts) == [1, 2]
    await anna.leave()


async def test_without_an_endpoint_no_record_carries_a_context(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> None:
    world = World(app_name, kafka, redis_server, tmp_path, *RULES)
    try:
        await world.start(*AGENTS)
        consumer = await Consumer(world, "anna", "queue/#").come()
        await publish(world, "queue/a", *numbered(0, 5))
        await consumer.until_got(5)
        await world.until_nothing_is_left("queue/a")
        assert await headers(kafka) == {()}
        await consumer.leave()
    finally:
        world.stop()


async def headers(bootstrap: str) -> set[tuple[object, ...]]:
    """The headers of all publishes and commands in Kafka."""
    found = set()
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False) as consumer:
        parts = [
            TopicPartition(topic, number)
            for topic in (keys.MESSAGES_TOPIC, keys.DELIVERIES_TOPIC)
            for number in range(PARTITIONS)
        ]
        consumer.assign(parts)
        await consumer.seek_to_beginning(*parts)
        ends = await consumer.end_offsets(parts)
        assert sum(ends.values()) > 10
        for part in parts:
            while await consumer.position(part) < ends[part]:
                fetched = await consumer.getmany(part, timeout_ms=500)
                found |= {tuple(record.headers) for record in fetched.get(part, [])}
    return found


async def test_no_process_waits_for_a_collector_that_is_down(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> None:
    telemetry = '[telemetry]\notlp_endpoint = "http://127.0.0.1:9"\ntrace_ratio = 1.0\n'
    world = World(app_name, kafka, redis_server, tmp_path, telemetry, *RULES)
    try:
        await world.start(*AGENTS)
        consumer = await Consumer(world, "anna", "queue/#").come()
        await publish(world, "queue/a", *numbered(0, 20))
        await consumer.until_got(20)
        await consumer.leave()
        for worker in world.workers:
            worker.process.terminate()
        for worker in world.workers:
            assert await worker.ended() == 0
    finally:
        world.stop()
