"""`millpond rewind` with real MQTT clients, a real bridge, real workers, Kafka and Redis."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from millpond.schemas import keys
from tests.support import given
from tests.support.workers import until
from tests.support.world import Consumer, World, numbered, publish, running

RULES = (given.pubsub("pubsub/#", max_inflight=32, ack_timeout_s=3_600), given.queue("queue/#"))
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def world(
    kafka: str, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("rewind")
    yield from running("rewinding", kafka, redis_server, directory, RULES, "sessions", "pubsub")


async def run(world: World, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `millpond rewind …`."""
    config = str(world.directory / "millpond.toml")
    command = [
        sys.executable,
        "-m",
        "millpond",
        "rewind",
        *options,
        "--config",
        config,
    ]
    return await asyncio.to_thread(
        subprocess.run, command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


async def rewind(world: World, subscriber: str, topic: str, to: str, *more: str) -> str:
    """The output of a rewind that succeeds."""
    done = await run(world, "--subscriber", subscriber, "--topic", topic, "--to", to, *more)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


async def refused(world: World, subscriber: str, topic: str, to: str) -> tuple[int, str]:
    """The exit code and the one line on stderr of a rewind that fails."""
    done = await run(world, "--subscriber", subscriber, "--topic", topic, "--to", to)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return done.returncode, line


def ids(world: World, topic: str) -> list[str]:
    return [str(each) for each in world.redis.zrange(keys.message_index(topic), 0, -1)]


def time_of(world: World, topic: str, number: int) -> datetime:
    """The time of the message with this number."""
    score = world.redis.zscore(keys.message_index(topic), ids(world, topic)[number])
    assert isinstance(score, float)
    return EPOCH + timedelta(microseconds=int(score))


def shown(world: World, subscriber: str, topic: str) -> str | None:
    """The read offset in its public Redis key."""
    offset = world.redis.get(keys.read_offset(subscriber, topic))
    return None if offset is None else str(offset)


async def until_at(world: World, subscriber: str, topic: str, number: int) -> None:
    """Wait until the read offset is the message with this number."""

    async def there() -> bool:
        stored = ids(world, topic)
        return number < len(stored) and shown(world, subscriber, topic) == stored[number]

    await until(there, f"{subscriber} at message {number} of {topic}")


async def with_messages(world: World, topic: str, number: int, *client_ids: str) -> list[Consumer]:
    """Online subscribers that have read this many messages of a topic."""
    consumers = [await Consumer(world, each, topic, clean=False).come() for each in client_ids]
    await publish(world, topic, *numbered(0, number))
    for each in consumers:
        await until_at(world, each.client_id, topic, number - 1)
    return consumers


async def test_an_online_subscriber_reads_everything_again_and_no_other_does(world: World) -> None:
    topic = "pubsub/online"
    again, other = await with_messages(world, topic, 50, "again", "other")
    assert await rewind(world, "again", topic, "earliest") == (
        f"again will read {topic} from earliest on: 50 messages as of now\n"
    )
    await again.until_got(100)
    await publish(world, topic, "50")
    for consumer in (again, other):
        await until_at(world, consumer.client_id, topic, 50)
    assert again.payloads() == [*numbered(0, 50), *numbered(0, 51)]
    assert other.payloads() == numbered(0, 51)
    for consumer in (again, other):
        await consumer.leave()


async def test_an_offline_subscriber_reads_on_from_a_message_when_it_connects(
    world: World,
) -> None:
    topic = "pubsub/away"
    away, other = await with_messages(world, topic, 20, "away", "stays")
    await away.leave()
    seventh = ids(world, topic)[7]
    said = await rewind(world, "away", topic, seventh)
    assert said == f"away will read {topic} from {seventh} on: 13 messages as of now\n"
    await until_at(world, "away", topic, 6)
    assert shown(world, "stays", topic) == ids(world, topic)[-1]
    await away.come(subscribe=False)
    await until_at(world, "away", topic, 19)
    assert away.payloads() == [*numbered(0, 20), *numbered(7, 13)]
    assert other.payloads() == numbered(0, 20)
    await away.leave()
    await other.leave()


@pytest.mark.parametrize("zone", ["UTC", "other", "none"])
async def test_a_time_selects_the_messages_of_that_time_and_later(world: World, zone: str) -> None:
    topic = f"pubsub/time/{zone}"
    (consumer,) = await with_messages(world, topic, 10, f"timed-{zone}")
    await publish(world, topic, *numbered(10, 10))
    await until_at(world, consumer.client_id, topic, 19)
    at = time_of(world, topic, 10)
    if zone == "none":
        at = at.astimezone().replace(tzinfo=None)  # this machine's
    elif zone == "other":
        at = at.astimezone(tz=datetime.strptime("+0530", "%z").tzinfo)
    said = await rewind(world, consumer.client_id, topic, at.isoformat(), "--json")
    assert json.loads(said) == {
        "subscriber": consumer.client_id, "topic": topic, "to": at.isoformat(), "messages": 10,
        "dry_run": False,
    }  # fmt: skip
    await consumer.until_got(30)
    await until_at(world, consumer.client_id, topic, 19)
    assert consumer.payloads()[20:] == numbered(10, 10)
    await consumer.leave()


@pytest.mark.parametrize("to", ["latest", "2999-01-01", "9999-12-31T23:59:59-14:00"])
async def test_a_rewind_to_the_latest_skips_waiting_and_leased_messages(
    world: World, to: str
) -> None:
    # A persistent session would get its copies again from the broker [MQTT-4.4.0-1], so this one is clean.
    topic, client_id = f"pubsub/passed/{to}", f"passed-{to}"
    consumer = await Consumer(world, client_id, topic, acks=False).come()
    await publish(world, topic, *numbered(0, 40))
    await consumer.until_got(32)
    await world.until_stored(40, topic)
    said = await rewind(world, client_id, topic, to)
    assert said == f"{client_id} will read {topic} from {to} on: 0 messages as of now\n"
    await until_at(world, client_id, topic, 39)
    await consumer.vanish()
    consumer.acks = True
    await consumer.come()
    await publish(world, topic, "40")
    await until_at(world, client_id, topic, 40)
    assert set(consumer.payloads()[32:]) == {"40"}  # twice, if the join was folded after the lease
    await consumer.leave()


async def test_a_time_before_the_epoch_is_the_earliest(world: World) -> None:
    topic = "pubsub/long-ago"
    (consumer,) = await with_messages(world, topic, 3, "long-ago")
    for number, to in enumerate(("0001-01-01T00:00+14:00", "1969-12-31"), start=2):
        assert "3 messages as of now" in await rewind(world, "long-ago", topic, to)
        await consumer.until_got(3 * number)
    assert consumer.payloads() == numbered(0, 3) * 3
    await consumer.leave()


async def test_a_group_reads_everything_again_as_one_subscriber(world: World) -> None:
    topic, group = "pubsub/group", "$share/readers/pubsub/group"
    alone = await Consumer(world, "alone", topic).come()
    members = [await Consumer(world, f"member-{at}", group).come() for at in range(2)]
    await publish(world, topic, *numbered(0, 100))
    await until_at(world, group, topic, 99)
    before = [len(each.got) for each in members]
    said = await rewind(world, group, topic, ids(world, topic)[40])
    assert said.endswith("on: 60 messages as of now\n")

    async def sixty_more() -> bool:
        return sum(len(each.got) for each in members) >= 160

    await until(sixty_more, "60 more copies for the group")
    await until_at(world, group, topic, 99)
    again = [
        got.payload
        for each, number in zip(members, before, strict=True)
        for got in each.got[number:]
    ]
    assert sorted(again, key=int) == numbered(40, 60)
    await alone.until_got(100)
    assert alone.payloads() == numbered(0, 100)
    for consumer in (alone, *members):
        await consumer.leave()


async def test_a_dry_run_counts_messages_and_changes_nothing(world: World) -> None:
    topic = "pubsub/dry"
    (consumer,) = await with_messages(world, topic, 10, "dry")
    for to, number in (("earliest", 10), ("latest", 0), (ids(world, topic)[9], 1)):
        said = await rewind(world, "dry", topic, to, "--dry-run")
        messages = f"{number} message{'s'[: number != 1]}"
        assert said == f"dry would read {topic} from {to} on: {messages} as of now\n"
    said = await rewind(world, "dry", topic, "earliest", "--dry-run", "--json")
    assert json.loads(said)["messages"] == 10
    assert json.loads(said)["dry_run"] is True
    await publish(world, topic, "10")
    await until_at(world, "dry", topic, 10)
    assert consumer.payloads() == numbered(0, 11)
    await consumer.leave()


async def test_index_entries_of_another_program_are_not_counted(world: World) -> None:
    topic = "pubsub/before"
    world.redis.zadd(keys.message_index(topic), {"of-another-program": 1})
    await publish(world, topic, *numbered(0, 4))
    consumer = await Consumer(world, "before", topic, clean=False).come()
    await until_at(world, "before", topic, 4)
    assert "4 messages as of now" in await rewind(world, "before", topic, "earliest")
    assert shown(world, "before", topic) != "of-another-program"
    await until_at(world, "before", topic, 4)
    assert consumer.payloads() == numbered(0, 4) * 2
    await consumer.leave()
    world.redis.zrem(keys.message_index(topic), "of-another-program")  # a replay would not have it


async def test_an_error_is_one_line(world: World) -> None:
    topic, elsewhere = "pubsub/errors", "pubsub/elsewhere"
    (consumer,) = await with_messages(world, topic, 2, "errors")
    await publish(world, elsewhere, "1")
    await world.until_stored(1, elsewhere)
    never = "it never read the topic, or has unsubscribed"
    for subscriber, of in (
        ("nobody", topic), ("errors", elsewhere), ("errors", "pubsub/nothing"),
        (f"$share/g/{topic}", topic), ("errors", "pubsub/#"),
    ):  # fmt: skip
        assert await refused(world, subscriber, of, "earliest") == (
            1, f"millpond: {subscriber!r} has no read offset of {of!r}: {never}",
        )  # fmt: skip
    for of in ("queue/a", "other/a"):
        reason = f"millpond: {of!r} is no pubsub topic by the configured rules"
        assert await refused(world, "errors", of, "earliest") == (2, reason)
    (other,) = ids(world, elsewhere)
    for to in ("yesterday", "2026-13-01", "0001-01-01", "", other, "0" * 32):
        reason = f"{to!r} is not earliest, latest, an ISO time, or the id of a stored message of"
        assert await refused(world, "errors", topic, to) == (
            2, f"millpond: --to: {reason} {topic!r}",
        )  # fmt: skip
    done = await run(world, "--subscriber", "errors", "--topic", topic)
    assert done.returncode == 2
    assert "--to" in done.stderr
    assert consumer.payloads() == numbered(0, 2)
    await consumer.unsubscribe(topic)

    async def deleted() -> bool:
        return shown(world, "errors", topic) is None

    await until(deleted, "the read offset to be deleted")
    code, line = await refused(world, "errors", topic, "earliest")
    assert (code, line.endswith(never)) == (1, True)
    await consumer.leave()
