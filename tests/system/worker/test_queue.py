"""Queues with real MQTT clients, a real bridge, real workers, Kafka and Redis: one message, one consumer."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest

from millpond.schemas import keys
from millpond.schemas.events import OperatorRequeue
from tests.support import given
from tests.support.bridge_commands import until_dead_letters
from tests.support.workers import until
from tests.support.world import Consumer, World, numbered, publish, running

IN_FLIGHT = 32
ACK_TIMEOUT_S = 3_600  # longer than any test: whatever comes back has another reason
RULES = (
    given.queue("queue/#", max_inflight=IN_FLIGHT, ack_timeout_s=ACK_TIMEOUT_S),
    given.queue("poison/#", ack_timeout_s=1, max_deliveries=2),
    given.queue("slow/#", ack_timeout_s=2, max_deliveries=2, max_inflight=IN_FLIGHT),
)


@pytest.fixture(scope="module")
def world(
    kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("queue")
    yield from running(
        "queue-stories", kafka, redis_server, directory, RULES, "sessions", "queue"
    )  # fmt: skip


async def until_acked(*consumers: Consumer, number: int) -> list[str]:
    """So many messages have been acknowledged, by all consumers together."""

    async def so_many() -> bool:
        return sum(len(each.acked) for each in consumers) >= number

    await until(so_many, f"{number} acknowledgements")
    return sorted((payload for each in consumers for payload in each.acked), key=int)


# -- one consumer


async def test_what_is_published_while_nobody_listens_comes_later_in_order_and_leaves_nothing(
    world: World,
) -> None:
    topic = "queue/later"
    await publish(world, topic, *numbered(0, 100))
    await world.until_stored(100, topic)
    consumer = await Consumer(world, "later", topic).come()
    await consumer.until_got(100)
    await world.until_nothing_is_left(topic)
    assert consumer.payloads() == numbered(0, 100)
    assert not any(got.repeated for got in consumer.got)
    await consumer.leave()


async def test_a_session_that_goes_on_without_a_subscribe_is_served(world: World) -> None:
    topic = "queue/resumed"
    consumer = await Consumer(world, "resumed", topic, clean=False).come()
    await publish(world, topic, *numbered(0, 5))
    await consumer.until_got(5)
    await consumer.leave()
    await publish(world, topic, *numbered(5, 50))
    await world.until_stored(50, topic)
    await consumer.come(subscribe=False)
    await consumer.until_got(55)
    await world.until_nothing_is_left(topic)
    assert consumer.payloads() == numbered(0, 55)
    await consumer.leave()


@pytest.mark.parametrize("clean", [True, False])
async def test_a_client_taken_over_by_itself_loses_and_doubles_nothing(
    world: World, *, clean: bool
) -> None:
    # Given a consumer that has acknowledged five of what it has in hand
    topic, client_id = f"queue/taken/{clean}", f"taken-{clean}"
    first = await Consumer(world, client_id, topic, clean=clean, acks=False).come()
    await publish(world, topic, *numbered(0, 60))
    first.ack(*(await first.until_got(IN_FLIGHT))[:5])
    await world.until_stored(55, topic)
    await first.until_got(IN_FLIGHT + 5)
    # When another connection takes its place
    second = await Consumer(world, client_id, topic, clean=clean).come()
    await until_acked(first, second, number=60)
    # Then that one gets everything else, what the first one had marked as repeated
    await world.until_nothing_is_left(topic)
    assert not first.online
    assert second.payloads() == numbered(5, 55)
    assert [got.repeated for got in second.got] == [True] * IN_FLIGHT + [False] * 23
    await second.leave()


async def test_a_wildcard_fetches_and_receives_from_several_topics(world: World) -> None:
    topics = [f"queue/wild/{at}" for at in range(5)]
    for topic in topics:
        await publish(world, topic, *numbered(0, 20))
    await world.until_stored(100, *topics)
    consumer = await Consumer(world, "wild", "queue/wild/+").come()
    await consumer.until_got(100)
    for topic in (*topics, "queue/wild/new"):
        await publish(world, topic, *numbered(20, 20))
    await consumer.until_got(220)
    await world.until_nothing_is_left(*topics, "queue/wild/new")
    for topic in topics:
        assert consumer.payloads(topic) == numbered(0, 40)
    assert consumer.payloads("queue/wild/new") == numbered(20, 20)
    assert len(consumer.got) == 220
    await consumer.leave()


@pytest.mark.parametrize("stored", [True, False])
async def test_a_subscriber_at_qos_0_is_served_once_and_nothing_is_left(
    world: World, *, stored: bool
) -> None:
    topic = f"queue/zero/{stored}"
    consumer = Consumer(world, f"zero-{stored}", topic, qos=0)
    if stored:
        await publish(world, topic, *numbered(0, 100))
        await world.until_stored(100, topic)
    await consumer.come()
    if not stored:
        await publish(world, topic, *numbered(0, 100))
    await consumer.until_got(100)
    await world.until_nothing_is_left(topic)
    assert consumer.payloads() == numbered(0, 100)
    assert {(got.qos, got.repeated) for got in consumer.got} == {(0, False)}
    await consumer.leave()


# -- several


@pytest.mark.parametrize("prefix", ["", "$share/workers/"])
async def test_consumers_share_a_queue_and_each_message_is_for_one_of_them(
    world: World, prefix: str
) -> None:
    topic = f"queue/shared/{len(prefix)}"
    consumers = [
        await Consumer(world, f"sharing-{at}-{len(prefix)}", prefix + topic).come()
        for at in range(3)
    ]
    await publish(world, topic, *numbered(0, 600))
    assert await until_acked(*consumers, number=600) == numbered(0, 600)
    await world.until_nothing_is_left(topic)
    shares = [len(consumer.got) for consumer in consumers]
    print(f"shares: {shares}")
    assert min(shares) > 0
    assert sum(shares) == 600
    for consumer in consumers:
        assert consumer.payloads() == sorted(consumer.payloads(), key=int)
        await consumer.leave()


async def test_when_a_consumer_vanishes_another_gets_what_it_had(world: World) -> None:
    topic = "queue/vanishes"
    holding = await Consumer(world, "holding", topic, acks=False).come()
    working = await Consumer(world, "working", topic).come()
    await publish(world, topic, *numbered(0, 200))
    await holding.until_got(IN_FLIGHT)
    await world.until_stored(IN_FLIGHT, topic)
    await holding.vanish()
    assert await until_acked(working, number=200) == numbered(0, 200)
    await world.until_nothing_is_left(topic)
    assert len(working.got) == 200
    repeated = [got.payload for got in working.got if got.repeated]
    assert repeated == holding.payloads()
    await working.leave()


# -- who takes long


async def test_a_consumer_that_works_through_what_it_has_keeps_it_however_long_it_takes(
    world: World,
) -> None:
    """Its last copies wait three times as long as an acknowledgement may take, and most of them in other partitions."""
    topics = [f"slow/{number}" for number in range(4)]
    slow = await Consumer(world, "slow", "slow/#", acks=False).come()
    for topic in topics:
        await publish(world, topic, *(f"{topic} {number}" for number in range(16)))
    await slow.until_got(64)
    # Another consumer with room gets what falls silent
    other = await Consumer(world, "idle", "slow/#").come()
    for got in sorted(slow.got, key=lambda got: got.topic):
        await asyncio.sleep(0.1)  # the work itself
        slow.ack(got)
    await world.until_nothing_is_left(*topics)
    assert len(slow.got) == 64
    assert other.got == []
    await slow.leave()
    await other.leave()


async def test_what_a_frozen_consumer_has_goes_to_another_one_and_is_no_dead_letter(
    world: World,
) -> None:
    topic = "slow/frozen"
    frozen = await Consumer(world, "frozen", topic, acks=False).come()
    await publish(world, topic, *numbered(0, 10))
    await frozen.until_got(10)
    other = await Consumer(world, "awake", topic).come()
    await other.until_got(10)
    await world.until_nothing_is_left(topic)
    assert other.payloads() == numbered(0, 10)
    # What it acknowledges when it continues changes nothing, and it gets new messages
    frozen.ack(*frozen.got)
    await other.leave()
    await publish(world, topic, *numbered(10, 10))
    await frozen.until_got(20)
    frozen.ack(*frozen.got[10:])
    await world.until_nothing_is_left(topic)
    # Some may have been meant for the consumer that has just left
    assert sorted(frozen.payloads(), key=int) == numbered(0, 20)
    await frozen.leave()


# -- what fails


async def test_a_message_that_nobody_acknowledges_ends_dead_and_comes_back_when_it_is_requeued(
    world: World,
) -> None:
    # Given a consumer that acknowledges all but one
    topic = "poison/a"
    consumer = await Consumer(world, "poisoned", topic, acks=False).come()
    await publish(world, topic, "poison", "good")
    _, good = await consumer.until_got(2)
    consumer.ack(good)
    # When its session ends, Then that one comes once more, and with the end of that one it is a dead letter
    await consumer.leave()
    consumer = await Consumer(world, "poisoned", topic, acks=False).come()
    await consumer.until_got(1)
    assert [(got.payload, got.repeated) for got in consumer.got] == [("poison", True)]
    await consumer.leave()
    ((_, headers),) = await until_dead_letters(world.bootstrap, topic, 1)
    await world.until_stored(0, topic)
    print({name: value.decode() for name, value in headers.items()})
    assert headers["agent"] == b"queue"
    assert b"delivered 2 times" in headers["reason"]
    assert world.bodies(topic) == ["poison"]
    # When an operator has it requeued, Then it comes as if for the first time, and goes
    (body,) = [
        key for key in world.redis.scan_iter("mqtt:msg:*", _type="HASH")
        if world.redis.hget(key, "topic") == topic
    ]  # fmt: skip
    consumer = await Consumer(world, "curing", topic).come()
    message_id = body.removeprefix(keys.message_body(""))
    await world.tell(OperatorRequeue(at=0, node="test", topic=topic, message_id=message_id))
    await consumer.until_got(1)
    await world.until_nothing_is_left(topic)
    assert [(got.payload, got.repeated) for got in consumer.got] == [("poison", False)]
    await consumer.leave()


async def test_a_worker_killed_between_storing_and_delivering_loses_nothing(world: World) -> None:
    topics = [f"queue/killed/{at}" for at in range(8)]
    consumer = await Consumer(world, "survivor", "queue/killed/+").come()
    for number in range(2):
        publishing = [
            asyncio.create_task(publish(world, topic, *numbered(100 * number, 100)))
            for topic in topics
        ]
        while not world.stored(*topics):
            await asyncio.sleep(0)
        world.workers_of("queue")[0].signal(signal.SIGKILL)
        await asyncio.gather(*publishing)
        had = len(consumer.got)
        await world.worker("queue")
        await consumer.until_got(800 * (number + 1))
        await world.until_nothing_is_left(*topics)
        print(f"killed after {had} copies; {len(consumer.got)} in the end")
    firsts = {topic: list(dict.fromkeys(consumer.payloads(topic))) for topic in topics}
    assert firsts == dict.fromkeys(topics, numbered(0, 200))
    assert len(consumer.got) <= 1_600 + 2 * 4 * IN_FLIGHT
    await consumer.leave()
