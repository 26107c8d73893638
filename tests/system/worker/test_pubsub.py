"""Pubsub with real MQTT clients, a real bridge, real workers, Kafka and Redis: every subscriber its own read offset."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from millpond.schemas import keys
from tests.support import given
from tests.support.servers import pause
from tests.support.workers import until
from tests.support.world import Consumer, World, numbered, publish, running

IN_FLIGHT = 32
ACK_TIMEOUT_S = 3_600  # longer than any test: whatever comes again has another reason
SETTINGS = {"max_inflight": IN_FLIGHT, "ack_timeout_s": ACK_TIMEOUT_S}
RULES = (
    given.pubsub("pubsub/#", **SETTINGS),
    given.pubsub("latest/#", start="latest", **SETTINGS),
    # As in old files: the view goes at once.
    given.command("DEL mqtt:acked:${clientid}:${topic}", "session.unsubscribed", "pubsub/at-once"),
)


@pytest.fixture(scope="module")
def world(
    kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("pubsub")
    yield from running(
        "pubsub-stories", kafka, redis_server, directory, RULES, "sessions", "pubsub"
    )  # fmt: skip


async def until_read_to(world: World, client_id: str, topic: str, number: int) -> None:
    """The read offset shows the message with this place in the topic's index."""

    async def there() -> bool:
        (message_id,) = world.redis.zrange(keys.message_index(topic), number, number) or [None]
        return message_id is not None and message_id == world.redis.get(
            keys.read_offset(client_id, topic)
        )

    await until(there, f"{client_id} to have read {topic} up to its message {number}")


async def test_two_subscribers_each_read_all_from_where_they_were(world: World) -> None:
    # Given one that is here all the time, and one that leaves after a while
    topic = "pubsub/two"
    here = await Consumer(world, "here", topic).come()
    away = await Consumer(world, "away", topic, clean=False).come()
    await publish(world, topic, *numbered(0, 40))
    await away.until_got(40)
    await until_read_to(world, "away", topic, 39)
    await away.leave()
    await publish(world, topic, *numbered(40, 100))
    await until_read_to(world, "here", topic, 139)
    await until_read_to(world, "away", topic, 39)
    # When it is back without a SUBSCRIBE, and a third one comes late
    await away.come(subscribe=False)
    late = await Consumer(world, "late", topic).come()
    # Then all have everything, once and in order
    for consumer in (here, away, late):
        await until_read_to(world, consumer.client_id, topic, 139)
        assert consumer.payloads() == numbered(0, 140)
        assert not any(got.repeated for got in consumer.got)
        await consumer.leave()
    assert world.stored(topic) == 140


@pytest.mark.parametrize("clean", [True, False])
async def test_what_was_not_acknowledged_comes_again_with_the_next_connection(
    world: World, *, clean: bool
) -> None:
    topic, client_id = f"pubsub/again/{clean}", f"again-{clean}"
    consumer = await Consumer(world, client_id, topic, clean=clean, acks=False).come()
    await publish(world, topic, *numbered(0, 50))
    consumer.ack(*(await consumer.until_got(IN_FLIGHT))[:5], consumer.got[7])
    await until_read_to(world, client_id, topic, 4)
    await consumer.until_got(IN_FLIGHT + 6)
    await consumer.vanish()
    again = await Consumer(world, client_id, topic, clean=clean).come()
    await until_read_to(world, client_id, topic, 49)
    assert again.payloads() == [*numbered(5, 2), *numbered(8, 42)]
    assert [got.repeated for got in again.got] == [True] * IN_FLIGHT + [False] * 12
    await again.leave()


async def test_who_unsubscribes_is_forgotten_and_begins_anew(world: World) -> None:
    topic = "pubsub/forgets"
    consumer = await Consumer(world, "forgets", topic).come()
    await publish(world, topic, *numbered(0, 10))
    await until_read_to(world, "forgets", topic, 9)
    await consumer.unsubscribe(topic)

    async def forgotten() -> bool:
        return not world.redis.exists(keys.read_offset("forgets", topic))

    await until(forgotten, "the read offset to be forgotten")
    await consumer.leave()
    await publish(world, topic, *numbered(10, 10))
    await consumer.come()
    await until_read_to(world, "forgets", topic, 19)
    assert consumer.payloads() == [*numbered(0, 10), *numbered(0, 20)]
    await consumer.leave()


async def test_who_subscribes_again_at_once_begins_anew_each_time(world: World) -> None:
    topic, rounds = "pubsub/at-once", 6
    consumer = await Consumer(world, "at-once", topic).come()
    await publish(world, topic, *numbered(0, 3))
    for number in range(1, rounds + 1):
        await consumer.until_got(3 * number)
        await until_read_to(world, "at-once", topic, 2)
        await consumer.unsubscribe(topic)
        assert await consumer.subscribe()
    await consumer.until_got(3 * (rounds + 1))
    await until_read_to(world, "at-once", topic, 2)
    assert consumer.payloads() == numbered(0, 3) * (rounds + 1)
    await consumer.leave()


async def test_a_wildcard_reads_all_topics_and_those_born_later(world: World) -> None:
    old, born, missed = (f"pubsub/wild/{name}" for name in ("old", "born", "missed"))
    await publish(world, old, *numbered(0, 20))
    consumer = await Consumer(world, "wild", "pubsub/wild/#").come()
    await until_read_to(world, "wild", old, 19)
    await publish(world, born, *numbered(0, 20))
    await until_read_to(world, "wild", born, 19)
    await consumer.leave()
    for topic in (old, born, missed):
        await publish(world, topic, *numbered(20, 20))
    await consumer.come()
    for topic, last in ((old, 39), (born, 39), (missed, 19)):
        await until_read_to(world, "wild", topic, last)
    assert consumer.payloads(old) == consumer.payloads(born) == numbered(0, 40)
    assert consumer.payloads(missed) == numbered(20, 20)
    await consumer.leave()


@pytest.mark.parametrize("topic_filter", ["latest/{}", "latest/{}/#", "$share/group/latest/{}"])
async def test_who_begins_with_the_latest_misses_nothing_that_is_published_after_its_suback(
    world: World, topic_filter: str
) -> None:
    # Given topics with old messages, and agents that do not hear of subscriptions for a while
    topics = [f"latest/{len(topic_filter)}-{at}" for at in range(10)]
    for topic in topics:
        await publish(world, topic, *numbered(0, 3))
    await world.until_stored(30, *topics)
    (sessions,) = world.workers_of("sessions")
    pause(sessions.process)
    # When messages are published as soon as a client has subscribed
    consumers = []
    for topic in topics:
        own = topic_filter.format(topic.removeprefix("latest/"))
        consumers.append(await Consumer(world, f"{topic} reader", own).come())
        await publish(world, topic, *numbered(3, 3))
    await world.until_stored(60, *topics)
    sessions.signal(signal.SIGCONT)
    # Then each gets them, and none of the old ones
    for topic, consumer in zip(topics, consumers, strict=True):
        await publish(world, topic, "6")
        await consumer.until_got(4)
        assert consumer.payloads() == numbered(3, 4)
        await consumer.leave()


async def test_the_members_of_a_group_read_as_one_beside_a_subscriber_of_its_own(
    world: World,
) -> None:
    topic = "pubsub/group"
    alone = await Consumer(world, "alone", topic).come()
    group = [
        await Consumer(world, f"member-{at}", f"$share/readers/{topic}").come() for at in range(2)
    ]
    await publish(world, topic, *numbered(0, 200))
    await alone.until_got(200)

    async def all_there() -> bool:
        return sum(len(member.got) for member in group) >= 200

    await until(all_there, "200 copies for the group")
    assert alone.payloads() == numbered(0, 200)
    print(f"shares: {[len(member.got) for member in group]}")
    assert all(member.got for member in group)
    assert sorted((got.payload for each in group for got in each.got), key=int) == numbered(0, 200)
    for consumer in (alone, *group):
        await consumer.leave()
