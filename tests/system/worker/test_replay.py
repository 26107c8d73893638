"""`millpond replay` against real servers: equal replays, differences, time ranges and refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from redis import Redis

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.schemas import keys
from millpond.schemas.keys import Partition
from tests.support import given
from tests.support.replays import other_database, replay
from tests.support.workers import PARTITIONS
from tests.support.world import Consumer, World, numbered, publish, running

RULES = (
    given.queue(max_inflight=8),
    given.pubsub(max_inflight=8),
    given.store("#", expired_time=3_600),
    given.retain("#", expired_time=3_600),
    given.receipt(topic="#"),
    given.command("INCR seen:${msgid}"),
    given.a_rule(hook="client.connected", action="on_client_connected"),
    given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
)
APP = "replayed"


@pytest.fixture(scope="module")
def world(
    kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """All agents after some traffic: messages wait, are leased, are acknowledged, are read."""
    directory = tmp_path_factory.mktemp("replay")
    for world in running(APP, kafka, redis_server, directory, RULES, *AGENT_NAMES):
        asyncio.run(_traffic(world))
        yield world


async def _traffic(world: World) -> None:
    holder = await Consumer(world, "holder", "queue/#", acks=False).come()
    reader = await Consumer(world, "reader", "pubsub/#", clean=False).come()
    await publish(world, "queue/a", *numbered(0, 40))
    await publish(world, "pubsub/a", *numbered(0, 40))
    await publish(world, "plain/a", *numbered(0, 40))
    await reader.until_got(40)
    holder.ack(*(await holder.until_got(8))[:3])
    # Without this wait the last three deliveries can fall into the first test.
    await holder.until_got(11)
    await reader.leave()
    await publish(world, "pubsub/a", *numbered(40, 10))
    await world.until_stored(37, "queue/a")
    await world.until_stored(90, "pubsub/a", "plain/a")


@pytest.fixture
def into(redis_server: str) -> Iterator[str]:
    """An empty database."""
    url = other_database(redis_server)
    with Redis.from_url(url) as target:
        target.flushdb()
        yield url
        target.flushdb()


def config(world: World) -> Path:
    return world.directory / "millpond.toml"


async def kafka_content(bootstrap: str) -> tuple[dict[str, int], list[Any]]:
    """Return the number of records of each output topic, and the consumer groups of this application.

    Kafka removes empty groups of other tests after a while.
    """
    admin, reader = (
        AIOKafkaAdminClient(bootstrap_servers=bootstrap),
        AIOKafkaConsumer(bootstrap_servers=bootstrap),
    )
    await admin.start()
    await reader.start()
    try:
        ends = {
            topic: sum(
                (
                    await reader.end_offsets(
                        [TopicPartition(topic, at) for at in range(PARTITIONS)]
                    )
                ).values()
            )
            for topic in (keys.DELIVERIES_TOPIC, keys.DEAD_LETTERS_TOPIC)
        }
        groups = await admin.list_consumer_groups()
        return ends, sorted(group for group in groups if group[0].startswith(f"{APP}."))
    finally:
        await reader.stop()
        await admin.close()


@pytest.mark.parametrize("hash_seed", [1, 2])
async def test_a_replay_of_all_agents_equals_the_live_state_and_produces_nothing(
    world: World, redis_server: str, into: str, hash_seed: int
) -> None:
    before = await kafka_content(world.bootstrap)
    ended = replay(config(world), into, "--diff", redis_server, hash_seed=hash_seed)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "no difference in" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert await kafka_content(world.bootstrap) == before
    with Redis.from_url(into, decode_responses=True) as target:
        # User commands run in the target.
        assert len(target.keys("seen:*")) == len(world.redis.keys("seen:*")) == 130
        for agent in AGENT_NAMES:
            assert target.hget(keys.replay_marker(APP, agent), "complete") == "1"


@pytest.mark.parametrize("agent", AGENT_NAMES)
def test_a_replay_of_one_agent_is_compared_by_its_own_keys(
    world: World, redis_server: str, into: str, agent: str
) -> None:
    ended = replay(config(world), into, "--diff", redis_server, "--json", agent=agent)
    outcome = json.loads(ended.stdout)
    assert (ended.returncode, outcome["diff"]["differences"]) == (0, [])
    assert outcome["diff"]["keys"] > PARTITIONS


async def test_publishes_during_the_comparison_are_no_difference(
    world: World, redis_server: str, into: str
) -> None:
    compared = asyncio.Event()

    async def keep_publishing() -> int:
        number = 0
        while not compared.is_set():
            await publish(world, f"plain/{number % 7}", *numbered(number, 50))
            number += 50
        return number

    publishing = asyncio.create_task(keep_publishing())
    try:
        ended = await asyncio.to_thread(replay, config(world), into, "--diff", redis_server)
    finally:
        compared.set()
    assert await publishing > 100
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_each_kind_of_difference_is_named_and_ends_with_exit_code_1(
    world: World, redis_server: str, into: str
) -> None:
    (first,) = world.redis.zrange(keys.message_index("plain/a"), 0, 0)
    message_id = str(first)
    body, index = keys.message_body(message_id), keys.message_index("plain/a")
    payload = world.redis.hget(body, "payload")
    assert isinstance(payload, str)
    fence = keys.applied(Partition(APP, "messages", 0))
    # Given a changed field, an additional field and key, and a removed entry and lifetime
    world.redis.hset(body, mapping={"payload": "another", "more": "1"})
    world.redis.set(keys.read_offset("absent", "pubsub/a"), "m")
    score = world.redis.zscore(index, message_id)
    assert score is not None
    world.redis.zrem(index, message_id)
    lifetime = world.redis.pexpiretime(body)
    world.redis.persist(body)
    try:
        ended = replay(config(world), into, "--diff", redis_server, "--json")
        with Redis.from_url(into) as target:
            target.flushdb()
        table = replay(config(world), into, "--diff", redis_server)
    finally:
        world.redis.hset(body, "payload", payload)
        world.redis.hdel(body, "more")
        world.redis.delete(keys.read_offset("absent", "pubsub/a"))
        world.redis.zadd(index, {message_id: score})
        world.redis.pexpireat(body, lifetime)
    assert ended.returncode == table.returncode == 1
    outcome = json.loads(ended.stdout)
    assert not outcome["diff"]["equal"]
    found = {(each["key"], each["field"]): each["what"] for each in outcome["diff"]["differences"]}
    assert found == {
        (body, "payload"): "changed",
        (body, "more"): "missing",
        (body, "(lifetime)"): "changed",
        (keys.read_offset("absent", "pubsub/a"), None): "missing",
        (keys.read_offset("absent", "pubsub/a"), "(lifetime)"): "missing",
        (index, message_id): "added",
    }
    assert "1 added, 3 missing, 2 changed" in table.stdout
    assert fence not in table.stdout


# -- from and to ----------------------------------------------------------------------------------------


def test_a_replay_from_a_time_begins_there_and_notes_that_earlier_state_is_missing(
    world: World, redis_server: str, into: str
) -> None:
    asyncio.run(asyncio.sleep(0.01))
    begins = datetime.now(UTC).isoformat()
    asyncio.run(publish(world, "plain/late", *numbered(0, 5)))
    ends = datetime.now(UTC).isoformat()
    asyncio.run(publish(world, "plain/late", *numbered(5, 5)))
    ended = replay(config(world), into, "--from", begins, "--to", ends, agent="messages")
    assert ended.returncode == 0, ended.stderr
    assert f"begins at {begins} with empty state: earlier state is missing" in ended.stdout
    with Redis.from_url(into, decode_responses=True) as target:
        assert target.zcard(keys.message_index("plain/late")) == 5
        assert not target.exists(keys.message_index("plain/a"))


# -- refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["--from", "yesterday"], 2, "--from: 'yesterday' is neither earliest nor an ISO time"),
        (["--to", "tomorrow"], 2, "--to: 'tomorrow' is neither latest nor an ISO time"),
        (["--to", "2026-01-01", "--diff", "LIVE"], 2, "leave --to out"),
        (["--diff", "cache:6379"], 2, "--diff: 'cache:6379' is not redis://"),
        (["--diff", "redis://cache:port"], 2, "--diff: the port of"),
        (["--diff", "EMPTY"], 1, "there is nothing to compare with"),
        (["--diff", "CLOSED"], 1, "cannot connect to"),
        (["--password-file", "missing"], 2, "--password-file: cannot read missing"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(
    world: World, redis_server: str, into: str, arguments: list[str], exit_code: int, said: str
) -> None:
    named = {
        "LIVE": redis_server,
        "EMPTY": into.removesuffix("15") + "14",
        "CLOSED": f"redis://{HOST}:{free_port()}",
    }
    ended = replay(config(world), into, *(named.get(each, each) for each in arguments))
    assert ended.returncode == exit_code
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    with Redis.from_url(into) as target:
        assert target.dbsize() == 0


def test_an_unknown_agent_is_refused(world: World, into: str) -> None:
    ended = replay(config(world), into, agent="everything")
    assert (ended.returncode, "no agent 'everything'" in ended.stderr) == (2, True)


@pytest.mark.parametrize("host", [HOST, "localhost"])
def test_the_live_store_is_refused_as_target_under_any_name(
    world: World, redis_server: str, host: str
) -> None:
    url = redis_server.replace(HOST, host)
    ended = replay(config(world), url, agent="queue")
    assert ended.returncode == 1
    assert "is the live store" in ended.stderr


@pytest.mark.parametrize(
    ("agent", "key", "refused"),
    [
        ("messages", "millpond:{replayed:messages:1}:states", True),
        ("messages", "mqtt:msg:plain/z", True),
        ("messages", "mqtt:msg:queue/z", False),
        ("queue", "mqtt:msg:queue/z", True),
        ("sessions", "mqtt:client:c", True),
        ("sessions", "mqtt:msg:plain/z", False),
        ("pubsub", "mqtt:acked:c:pubsub/z", True),
    ],
)
def test_a_target_with_keys_of_the_agent_is_refused(
    world: World, into: str, agent: str, key: str, *, refused: bool
) -> None:
    with Redis.from_url(into) as target:
        target.zadd(key, {"m": 1})
    ended = replay(config(world), into, agent=agent)
    assert (ended.returncode == 1) == refused, ended.stderr
    assert (f"such as {key}" in ended.stderr) == refused


def test_a_complete_replay_is_refused_as_target(world: World, into: str) -> None:
    assert replay(config(world), into, agent="sessions").returncode == 0
    ended = replay(config(world), into, agent="sessions")
    assert (ended.returncode, "that is complete" in ended.stderr) == (1, True)
    # A replay of another agent has a marker of its own.
    assert replay(config(world), into, agent="queue").returncode == 0


def test_a_kafka_that_is_down_is_reported(world: World, into: str, tmp_path: Path) -> None:
    away = tmp_path / "away.toml"
    away.write_text(config(world).read_text().replace(world.bootstrap, f"{HOST}:{free_port()}"))
    ended = replay(away, into)
    assert (ended.returncode, "Kafka cannot be reached" in ended.stderr) == (1, True)


def test_another_partition_count_is_refused(world: World, into: str, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    text = config(world).read_text()
    other.write_text(text.replace(f"partitions = {PARTITIONS}", "partitions = 5"))
    ended = replay(other, into)
    assert (ended.returncode, "set partitions = 4" in ended.stderr) == (2, True)
