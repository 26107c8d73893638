"""Ten consumers come and go while 20,000 messages are published and everything is killed in turn: nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import pytest

from tests.support import given
from tests.support.crowd import Crowd, Load
from tests.support.workers import PARTITIONS
from tests.support.world import Consumer, World, running

IN_FLIGHT = 16
CONSUMERS = 10
# What one consumer has in hand at most: it is in each partition a member of its own.
WINDOW = IN_FLIGHT * PARTITIONS
ACK_TIMEOUT_S = 3_600  # longer than any test: whatever comes back has another reason
RULES = (given.queue("queue/#", max_inflight=IN_FLIGHT, ack_timeout_s=ACK_TIMEOUT_S),)


@pytest.fixture
def world(
    app_name: str, kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("crowd")
    yield from running(app_name, kafka, redis_server, directory, RULES, "sessions", "queue")


def a_crowd(world: World, *filters: str) -> Crowd:
    """Of ten consumers, two have sessions that go on."""
    consumers = [
        Consumer(world, f"consumer-{at}", *filters, clean=at % 5 > 0) for at in range(CONSUMERS)
    ]
    return Crowd(consumers, Random(1))


async def test_on_a_calm_day_each_of_2000_messages_comes_once_and_in_order(world: World) -> None:
    load = Load(world, [f"queue/calm/{at}" for at in range(20)], 2_000, publishers=4)
    crowd = a_crowd(world, "queue/calm/+")
    for consumer in crowd.consumers:
        await consumer.come()
    await load.publish()
    await crowd.until_got(load.number)
    await world.until_nothing_is_left(*load.topics)
    print(f"shares: {[len(consumer.got) for consumer in crowd.consumers]}")
    assert crowd.acked() == load.acknowledged()
    assert len(crowd.acked()) == len(crowd.copies()) == load.number
    assert not any(got.repeated for got in crowd.copies())
    assert crowd.backwards() == []


async def test_whatever_is_killed_while_20000_messages_are_published_each_is_acked_by_somebody(
    world: World,
) -> None:
    load = Load(world, [f"queue/big/{at}" for at in range(20)], 20_000, publishers=4, rate_max=700)
    crowd = a_crowd(world, "queue/big/+")

    async def a_second_worker_joins() -> None:
        await world.worker("queue")

    async def the_first_worker_is_killed() -> None:
        await world.kill_worker("queue")

    async def the_bridge_is_killed() -> None:
        await world.kill_bridge()

    async def the_sessions_worker_is_killed() -> None:
        await world.kill_worker("sessions")
        await world.worker("sessions")

    async def everything_happens() -> None:
        publishing = asyncio.create_task(load.publish())
        await crowd.hurt(
            (2_000, a_second_worker_joins),
            (5_000, the_first_worker_is_killed),
            (10_000, the_bridge_is_killed),
            (15_000, the_sessions_worker_is_killed),
        )
        await publishing
        await crowd.until_got(load.number)

    await crowd.live(500, everything_happens())
    await world.until_nothing_is_left(*load.topics)
    copies, duplicates, backwards = crowd.copies(), crowd.duplicates(), crowd.backwards()
    print(
        f"{len(copies)} copies, {duplicates} duplicates, {load.sent_again()} published again; consumers left "
        f"{crowd.left} times, vanished {crowd.vanished}, lost their connection {crowd.lost}; "
        f"{sum(got.repeated for got in copies)} marked as repeated, {len(backwards)} went back unmarked"
    )
    assert len(load.acknowledged()) == load.number
    assert load.acknowledged() <= crowd.acked()
    # What a consumer had in hand when it went; what the bridge carried out and had not committed, which is no more; and
    # a killed worker's successor says once more what it cannot know to have been said.
    assert duplicates <= crowd.explained(WINDOW) + load.sent_again() + CONSUMERS * WINDOW
    # What was on its way to a consumer that went is not marked when it goes to another.
    assert len(backwards) <= crowd.explained(WINDOW)
