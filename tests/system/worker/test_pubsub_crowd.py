"""Five subscribers come and go while 10,000 messages are published and everything is killed in turn: all get all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import pytest

from millpond.schemas import keys
from tests.support import given
from tests.support.crowd import Crowd, Load
from tests.support.workers import PARTITIONS, until
from tests.support.world import Consumer, World, running

IN_FLIGHT = 16
WINDOW = IN_FLIGHT * PARTITIONS  # what one subscriber has in hand at most
SUBSCRIBERS = 5
ACK_TIMEOUT_S = 3_600  # longer than any test: whatever comes again has another reason
RULES = (given.pubsub("pubsub/#", max_inflight=IN_FLIGHT, ack_timeout_s=ACK_TIMEOUT_S),)


@pytest.fixture
def world(
    app_name: str, kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("crowd")
    yield from running(app_name, kafka, redis_server, directory, RULES, "sessions", "pubsub")


async def until_all_read_all(world: World, crowd: Crowd, load: Load) -> None:
    """Every read offset is at the end of its topic."""

    async def at_the_end() -> bool:
        for topic in load.topics:
            last = world.redis.zrange(keys.message_index(topic), -1, -1)
            names = [keys.read_offset(each.client_id, topic) for each in crowd.consumers]
            if set(world.redis.mget(names)) != set(last):
                return False
        return True

    await until(at_the_end, "everybody to have read everything")


async def test_on_a_calm_day_everybody_gets_2000_messages_once_and_in_order(world: World) -> None:
    load = Load(world, [f"pubsub/calm/{at}" for at in range(10)], 2_000, publishers=2)
    crowd = Crowd(
        [Consumer(world, f"reader-{at}", "pubsub/calm/+") for at in range(SUBSCRIBERS)], Random(1)
    )
    for consumer in crowd.consumers:
        await consumer.come()
    await load.publish()
    await crowd.until_got(SUBSCRIBERS * load.number)
    await until_all_read_all(world, crowd, load)
    for own in crowd.each():
        assert own.acked() == load.acknowledged()
        assert len(own.acked()) == len(own.copies()) == load.number
        assert own.backwards() == []
        assert not any(got.repeated for got in own.copies())


async def test_whatever_is_killed_while_10000_messages_are_published_everybody_gets_all_in_order(
    world: World,
) -> None:
    load = Load(
        world, [f"pubsub/big/{at}" for at in range(10)], 10_000, publishers=2, rate_max=350
    )  # fmt: skip
    # Some have sessions that go on, some are away for longer, one is always here.
    consumers = [
        Consumer(world, f"reader-{at}", "pubsub/big/+", clean=at % 2 > 0)
        for at in range(SUBSCRIBERS)
    ]
    crowd = Crowd(consumers, Random(2), absences=(0, 1_000, 2_000, 4_000, 8_000))

    async def a_second_worker_joins() -> None:
        await world.worker("pubsub")

    async def the_first_worker_is_killed() -> None:
        await world.kill_worker("pubsub")

    async def the_bridge_is_killed() -> None:
        await world.kill_bridge()

    async def the_sessions_worker_is_killed() -> None:
        await world.kill_worker("sessions")
        await world.worker("sessions")

    async def everything_happens() -> None:
        publishing = asyncio.create_task(load.publish())
        await crowd.hurt(
            (5_000, a_second_worker_joins),
            (12_000, the_first_worker_is_killed),
            (22_000, the_bridge_is_killed),
            (34_000, the_sessions_worker_is_killed),
        )
        await publishing

    await crowd.live(1_500, everything_happens())
    await until_all_read_all(world, crowd, load)
    duplicates = [own.duplicates() for own in crowd.each()]
    print(
        f"{crowd.got()} copies, duplicates {duplicates}, {load.sent_again()} published again; subscribers left "
        f"{crowd.left} times, vanished {crowd.vanished}, lost their connection {crowd.lost}; "
        f"{sum(got.repeated for got in crowd.copies())} marked as repeated"
    )
    assert len(load.acknowledged()) == load.number
    for own in crowd.each():
        assert load.acknowledged() <= own.acked()
        assert own.backwards() == []
    # What a subscriber had in hand when it went; what the bridge carried out and had not committed, which is no more; and
    # a killed worker's successor says once more what it cannot know to have been said.
    expected = SUBSCRIBERS * (load.sent_again() + WINDOW)
    assert sum(duplicates) <= crowd.explained(WINDOW) + expected
