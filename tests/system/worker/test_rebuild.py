"""Redis emptied under running workers, and `millpond rebuild`: the same state again, and no message delivered twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from redis import Redis

from millpond.agents.ports import Applied
from millpond.agents.registry import AGENT_NAMES
from millpond.schemas import keys
from millpond.schemas.keys import Partition
from tests.support import given
from tests.support.embedded_bridge import NODE
from tests.support.workers import PARTITIONS, Pipeline, Worker, until
from tests.support.workers import running as running_pipeline
from tests.support.world import Consumer, World, numbered, publish, running

RULES = (
    given.queue(max_inflight=8, ack_timeout_s=3_600),
    given.queue("dead/#", max_deliveries=1, ack_timeout_s=3_600),
    given.pubsub(max_inflight=8, ack_timeout_s=3_600),
    given.store("#"),
    given.retain("#"),
    given.receipt(topic="#"),
    given.command("INCR seen:${msgid}"),
    given.a_rule(hook="client.connected", action="on_client_connected"),
    given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
)
TIMEOUT_S = 120.0
TOPIC_OF = {"messages": "plain", "queue": "queue", "pubsub": "pubsub"}


def dump(redis: Redis) -> dict[str, Any]:
    """Return the content without private keys and `mqtt:sub:*`."""
    found: dict[str, Any] = {}
    for key in redis.scan_iter("*", count=1_000):
        if key.startswith((keys.PRIVATE_PREFIX, "mqtt:sub:")):
            continue
        match redis.type(key):
            case "zset":
                found[key] = redis.zrange(key, 0, -1, withscores=True)
            case "hash":
                found[key] = redis.hgetall(key)
            case _:
                found[key] = redis.get(key)
    return found


def private_keys(world: World, agent: str) -> set[str]:
    """Return an agent's private keys, without journals, which exist for moments only."""
    found = world.redis.scan_iter(f"{keys.PRIVATE_PREFIX}{{{world.app}:{agent}:*", count=1_000)
    return {key for key in found if not key.endswith(":journal")}


def rebuild(config: Path, agent: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millpond", "rebuild", agent, "--config", str(config), *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
        env=os.environ,
    )  # fmt: skip


# -- all agents, with clients -----------------------------------------------------------------------------


@pytest.fixture
def world(
    app_name: str, kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("rebuild")
    yield from running(app_name, kafka, redis_server, directory, RULES, *AGENT_NAMES)


async def busy(world: World) -> list[Consumer]:
    """Produce messages that wait, are leased, read, retained and dead, until all agents are idle."""
    victim = await Consumer(world, "victim", "dead/a", acks=False).come()
    await publish(world, "dead/a", "poison")
    await victim.until_got(1)
    await victim.vanish()
    await world.until_stored(0, "dead/a")
    await world.tell(
        *(given.published(f"r-{at}", f"{at}/r", retain=True) for at in ("plain", "dead"))
    )
    holder = await Consumer(world, "holder", "queue/#", acks=False).come()
    reader = await Consumer(world, "reader", "pubsub/#", acks=False).come()
    await publish(world, "queue/a", *numbered(0, 40))
    await publish(world, "pubsub/a", *numbered(0, 40))
    await publish(world, "plain/a", *numbered(0, 40))
    holder.ack(*(await holder.until_got(8))[:3])
    reader.ack(*(await reader.until_got(8))[:5])
    await holder.until_got(11)
    await reader.until_got(13)
    await world.until_stored(117, "queue/a", "pubsub/a", "plain/a")
    await world.until_stored(1, "plain/r")
    return [holder, reader]


async def settled(world: World) -> dict[str, Any]:
    """Return the dump once it has not changed for a while."""
    last: list[Any] = [None, 0]

    async def same() -> bool:
        found = dump(world.redis)
        last[:] = found, last[1] + 1 if found == last[0] else 0
        await asyncio.sleep(0.2)
        return bool(last[1] >= 10)

    await until(same, "Redis to rest")
    found: dict[str, Any] = last[0]
    return found


async def test_workers_rebuild_an_emptied_redis_and_deliver_nothing_again(
    world: World,
) -> None:
    consumers = await busy(world)
    world.redis.hset(keys.subscriptions("display"), "alerts/+", "1")
    before = await settled(world)
    got = [len(each.got) for each in consumers]
    assert len([key for key in before if key.startswith("seen:")]) == 123
    world.redis.flushall()

    async def as_before() -> bool:
        return dump(world.redis) == before

    await until(as_before, "Redis to be as before")
    assert await settled(world) == before
    assert [len(each.got) for each in consumers] == got
    for worker in world.workers:
        said = worker.log.read_text()
        assert "the store holds no state of it: rebuilding it from the log" in said
    # Delivery continues where it was.
    consumers[0].ack(*consumers[0].got[3:])
    await consumers[0].until_got(got[0] + 8)
    await world.until_stored(109, "queue/a", "pubsub/a", "plain/a")


def damage(world: World, agent: str) -> None:
    """Change keys that the agent has written, and add entries that it has not."""
    if agent == "sessions":
        world.redis.hset(keys.presence("reader"), mapping={"state": "7", "online_at": "1"})
        world.redis.hdel(keys.node(NODE), "holder")
        return
    topic = f"{TOPIC_OF[agent]}/a"
    first, second = map(str, world.redis.zrange(keys.message_index(topic), 0, 1))
    world.redis.zrem(keys.message_index(topic), first)
    world.redis.hset(keys.message_body(second), "payload", "changed")
    world.redis.hset(keys.message_body("stray"), mapping={"id": "stray", "topic": topic})
    now_us = time.time_ns() // 1_000
    world.redis.zadd(keys.message_index(topic), {"stray": now_us, "bodiless": now_us - 60_000_000})
    if agent == "pubsub":
        world.redis.set(keys.read_offset("reader", topic), "another")
    if agent == "messages":
        world.redis.hset(keys.message_body("r-plain"), "payload", "changed")
    if agent == "queue":
        (dead,) = [
            key for key in world.redis.scan_iter("mqtt:msg:*", _type="HASH")
            if world.redis.hget(key, "topic") == "dead/a"
        ]  # fmt: skip
        world.redis.hset(dead, "payload", "changed")


@pytest.mark.parametrize("agent", AGENT_NAMES)
async def test_a_rebuilt_agent_continues_exactly_where_it_was(world: World, agent: str) -> None:
    consumers = await busy(world)
    before = await settled(world)
    got = [len(each.got) for each in consumers]
    private = private_keys(world, agent)
    (worker,) = world.workers_of(agent)
    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0
    world.workers.remove(worker)
    damage(world, agent)
    # Given keys of another program
    world.redis.set("mqtt:msg:foreign", "foreign")
    world.redis.zadd("mqtt:msg:ranking", {"foreign": 1})
    world.redis.set("mqtt:acked:foreign:pubsub/a", "foreign")
    ended = await asyncio.to_thread(rebuild, world.directory / "millpond.toml", agent, "--yes")
    assert ended.returncode == 0, ended.stderr
    assert "user commands are not run again" in ended.stdout
    assert f"{agent} is rebuilt: its workers may start" in ended.stdout
    for key in ("mqtt:msg:foreign", "mqtt:msg:ranking", "mqtt:acked:foreign:pubsub/a"):
        assert world.redis.delete(key) == 1
    assert dump(world.redis) == before
    assert private_keys(world, agent) == private
    await world.worker(agent)
    consumers[0].ack(*consumers[0].got[3:])
    await consumers[0].until_got(got[0] + 8)
    await world.until_stored(109, "queue/a", "pubsub/a", "plain/a")
    assert [len(each.got) for each in consumers] == [got[0] + 8, got[1]]
    for consumer in consumers:
        await consumer.leave()


# -- one agent ---------------------------------------------------------------------------------------------


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running_pipeline(app_name, kafka, redis_server, tmp_path) as pipeline:
        pipeline.configure(given.store(), given.command("INCR seen:${msgid}"), batch_records_max=20)
        yield pipeline


async def applied(pipeline: Pipeline) -> dict[int, Applied]:
    names = [keys.applied(Partition(pipeline.app, "messages", at)) for at in range(PARTITIONS)]
    fences = await pipeline.redis.mget(names)
    return {
        at: msgspec.json.decode(fence, type=Applied)
        for at, fence in enumerate(fences)
        if fence is not None
    }


async def stored_and_stopped(pipeline: Pipeline, number: int) -> None:
    worker = await pipeline.worker()
    await pipeline.publish(given.published(f"m{at}", f"t/{at % 20}") for at in range(number))

    async def all_there() -> bool:
        return len(await pipeline.redis.keys("seen:*")) == number

    await until(all_there, "all messages to be applied")
    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0


async def rebuilt(pipeline: Pipeline, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = pipeline.directory / "millpond.toml"
    return await asyncio.to_thread(rebuild, config, "messages", *arguments)


async def test_outputs_that_the_old_state_owes_are_produced_first_and_once(
    pipeline: Pipeline,
) -> None:
    await stored_and_stopped(pipeline, 100)
    # As if the worker had crashed between its transaction and the dead letter that it journaled.
    (number, fence), *_ = (await applied(pipeline)).items()
    journal = keys.journal(Partition(pipeline.app, "messages", number))
    outputs = [{"type": "dead_letter", "offset": 0, "reason": "owed"}]
    await pipeline.redis.hset(journal, str(fence.sequence), msgspec.json.encode(outputs).decode())
    before = len(await pipeline.dead_letters())
    ended = await rebuilt(pipeline, "--yes")
    assert ended.returncode == 0, ended.stderr
    assert len(await pipeline.dead_letters()) == before + 1
    await pipeline.worker()
    await pipeline.publish([given.published("more", "t/0")])

    async def continues() -> bool:
        return bool(await pipeline.redis.get("seen:more"))

    await until(continues, "the worker to continue")
    assert len(await pipeline.dead_letters()) == before + 1
    assert set(await pipeline.redis.mget(await pipeline.redis.keys("seen:*"))) == {b"1"}


async def test_a_rebuild_is_refused_while_workers_run_and_without_a_confirmation(
    pipeline: Pipeline,
) -> None:
    await pipeline.worker()
    refused = await rebuilt(pipeline, "--yes")
    assert refused.returncode == 1
    assert "1 worker of messages in the consumer group" in refused.stderr
    assert not await pipeline.redis.exists(keys.rebuild_marker(pipeline.app, "messages"))
    asked = await rebuilt(pipeline)
    assert (asked.returncode, "add --yes" in asked.stderr) == (2, True)


async def test_a_rebuild_requires_state_of_this_log(pipeline: Pipeline) -> None:
    pipeline.replays_as_live = False
    nothing = await rebuilt(pipeline, "--yes")
    assert nothing.returncode == 1
    assert "holds no state of messages" in nothing.stderr
    await stored_and_stopped(pipeline, 100)
    name = keys.applied(Partition(pipeline.app, "messages", 0))
    fence: Any = await pipeline.redis.get(name)
    for other, reason in (
        (fence.replace(b'"cluster_id":"', b'"cluster_id":"another-'), "of Kafka cluster another-"),
        (fence.replace(b'"offset":', b'"offset":9'), "but the log ends before"),
        (b"?", "holds no fence in"),
    ):
        await pipeline.redis.set(name, other)
        refused = await rebuilt(pipeline, "--yes")
        assert refused.returncode == 1
        assert reason in refused.stderr
    unknown = await asyncio.to_thread(
        rebuild, pipeline.directory / "millpond.toml", "everything", "--yes"
    )
    assert (unknown.returncode, "no agent 'everything'" in unknown.stderr) == (2, True)


async def test_a_log_that_begins_later_than_the_oldest_message_is_refused_unless_that_is_accepted(
    pipeline: Pipeline,
) -> None:
    # A replay at the end of the test would miss the deleted records.
    pipeline.replays_as_live = False
    await stored_and_stopped(pipeline, 400)
    admin = AIOKafkaAdminClient(bootstrap_servers=pipeline.bootstrap)
    await admin.start()
    first = TopicPartition(keys.MESSAGES_TOPIC, 1)
    await admin.delete_records({first: RecordsToDelete(30)})
    await admin.close()
    refused = await rebuilt(pipeline, "--yes")
    assert refused.returncode == 1
    assert (
        "stored messages are older than the log; --accept-loss rebuilds all the same"
        in refused.stderr
    )
    assert "mqtt.messages has lost its first 30 records, in 1 of 4 partitions: complete from" in (
        refused.stdout
    )
    fences = await applied(pipeline)
    ended = await rebuilt(pipeline, "--yes", "--accept-loss")
    assert ended.returncode == 0, ended.stderr
    left = sum([await pipeline.redis.zcard(keys.message_index(f"t/{at}")) for at in range(20)])
    assert 370 <= left < 400
    assert {at: each.offset for at, each in (await applied(pipeline)).items()} == {
        at: each.offset for at, each in fences.items()
    }


async def test_workers_refuse_to_start_until_an_interrupted_rebuild_is_finished(
    pipeline: Pipeline,
) -> None:
    await stored_and_stopped(pipeline, 8_000)
    fences = await applied(pipeline)
    config = pipeline.directory / "millpond.toml"
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", "rebuild", "messages", "--config", str(config), "--yes"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    async def folding() -> bool:
        assert process.poll() is None
        found = await applied(pipeline)
        return bool(found) and all(each.offset < fences[at].offset for at, each in found.items())

    await until(folding, "the rebuild to be folding")
    process.send_signal(signal.SIGTERM)
    _, said = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 1
    assert "no worker of messages starts before another" in said
    refused = Worker(config, pipeline.directory / "refused.log")
    pipeline.workers.append(refused)
    assert await refused.ended() == 1
    assert "is in the middle of a rebuild of messages" in refused.log.read_text()
    ended = await rebuilt(pipeline, "--yes")
    assert ended.returncode == 0, ended.stderr
    assert {at: each.offset for at, each in (await applied(pipeline)).items()} == {
        at: each.offset for at, each in fences.items()
    }
    assert not await pipeline.redis.exists(keys.rebuild_marker(pipeline.app, "messages"))
    counts = await pipeline.redis.mget(await pipeline.redis.keys("seen:*"))
    assert (len(counts), set(counts)) == (8_000, {b"1"})
    await pipeline.worker()
