"""Unusual and bad input, with a real Kafka, Redis and worker. A bad record stops no other one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from millpond.schemas import codec, keys
from tests.support import given
from tests.support.workers import Pipeline, running, until

TOPIC_LIKE_AN_ID = "00058CE94E63BEADF44300000A530001"


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(given.store(), given.retain(), given.clear_retained())
        await started.worker()
        yield started


async def stored(pipeline: Pipeline, topic: str, count: int) -> list[bytes]:
    """Wait for `count` entries in a topic's index, and return the message ids."""

    async def enough() -> list[bytes]:
        found: Any = await pipeline.redis.zrange(keys.message_index(topic), 0, -1)
        return found if len(found) >= count else []

    found: list[bytes] = await until(enough, f"{count} messages of {topic!r}")
    return found


async def dead_letters(pipeline: Pipeline, count: int) -> dict[bytes, str]:
    """Wait for `count` dead letters, and return the reason of each, by value."""

    async def enough() -> dict[bytes, str]:
        found = await pipeline.dead_letters()
        reasons = {each.value: dict(each.headers)["reason"].decode() for each in found}
        return reasons if len(found) >= count else {}

    found: dict[bytes, str] = await until(enough, f"{count} dead letters")
    return found


async def test_messages_are_stored_completely_and_in_order(pipeline: Pipeline) -> None:
    await pipeline.publish(given.published(f"m{number}", "a/b") for number in range(10))
    assert await stored(pipeline, "a/b", 10) == [b"m%d" % number for number in range(10)]
    assert await pipeline.redis.hgetall(keys.message_body("m3")) == {
        b"id": b"m3", b"from": b"pub", b"qos": b"1", b"topic": b"a/b",
        b"payload": b"hello", b"ts": b"1", b"retain": b"false",
    }  # fmt: skip


@pytest.mark.parametrize("payload", [b"", b"\xff\x00binary", "emoji 🦆".encode(), b"x" * (1 << 20)])
async def test_any_payload_is_stored_byte_for_byte(pipeline: Pipeline, payload: bytes) -> None:
    text, encoding = codec.payload_text(payload)
    await pipeline.publish([given.published(payload=text, payload_encoding=encoding)])
    await stored(pipeline, "t", 1)
    assert await pipeline.redis.hget(keys.message_body("m1"), "payload") == payload


async def test_any_utf_8_can_be_a_topic_and_a_client_id(pipeline: Pipeline) -> None:
    topics = ["with space", "with:colon", "🦆/é", "a//b", "{tag}", 'quote"', "new\nline", "/"]
    await pipeline.publish(
        given.published(f"m{number}", topic, client_id=topic) for number, topic in enumerate(topics)
    )
    for number, topic in enumerate(topics):
        assert await stored(pipeline, topic, 1) == [b"m%d" % number]
        body = await pipeline.redis.hgetall(keys.message_body(f"m{number}"))
        assert body[b"from"] == topic.encode()


async def test_an_unreadable_record_becomes_a_dead_letter_with_its_bytes_and_the_others_are_applied(
    pipeline: Pipeline,
) -> None:
    good = json.loads(codec.encode(given.published("bad")))
    poison = {
        b"not json": "JSON is malformed",
        b"[]": "Expected `object`",
        b'{"type":"message.unheard_of"}': "message.unheard_of",
        json.dumps({**good, "qos": 7}).encode(): "qos",
        json.dumps({**good, "topic": 7}).encode(): "Expected `str`",
        json.dumps({**good, "payload": "%", "payload_encoding": "base64"}).encode(): "",
        json.dumps({**good, "topic": "elsewhere"}).encode(): "key",
        b"\xff\xfe": "",
    }
    for value in poison:
        await pipeline.producer.send_and_wait(keys.MESSAGES_TOPIC, key=b"t", value=value)
    await pipeline.producer.send_and_wait(keys.MESSAGES_TOPIC, key=b"t", value=None)
    await pipeline.producer.send_and_wait(keys.MESSAGES_TOPIC, key=b"\xff", value=b"unreadable key")
    await pipeline.publish([given.published("after")])
    assert await stored(pipeline, "t", 1) == [b"after"]
    found = await dead_letters(pipeline, len(poison) + 2)
    for value, reason in poison.items():
        assert reason in found[value]


async def test_a_dead_letter_says_where_it_came_from(pipeline: Pipeline) -> None:
    metadata = await pipeline.producer.send_and_wait(keys.MESSAGES_TOPIC, key=b"t", value=b"poison")

    async def arrived() -> list[object]:
        return await pipeline.dead_letters()

    (dead_letter,) = await until(arrived, "a dead letter")
    headers = {name: value.decode() for name, value in dead_letter.headers}
    assert dead_letter.key == b"t"
    assert headers["source-topic"] == keys.MESSAGES_TOPIC
    assert headers["source-partition"] == str(metadata.partition)
    assert headers["source-offset"] == str(metadata.offset)
    assert headers["agent"] == "messages"


async def test_a_topic_shaped_like_a_message_id_does_no_harm(pipeline: Pipeline) -> None:
    pipeline.replays_as_live = False  # the order of two partitions is not in the log
    await pipeline.publish([given.published("m1", TOPIC_LIKE_AN_ID)])
    await stored(pipeline, TOPIC_LIKE_AN_ID, 1)
    # The body of this message would have the key of that topic's index. The message is refused; the topic stays.
    await pipeline.publish([given.published(TOPIC_LIKE_AN_ID, "t"), given.published("after", "t")])
    found = await dead_letters(pipeline, 1)
    assert "WRONGTYPE" in next(iter(found.values()))

    async def cleaned() -> bool:
        ids = await pipeline.redis.zrange(keys.message_index("t"), 0, -1)
        return bool(ids == [b"after"])

    await until(cleaned, "an index without the refused message")
    assert await stored(pipeline, TOPIC_LIKE_AN_ID, 1) == [b"m1"]
    assert await pipeline.redis.ttl(keys.message_index(TOPIC_LIKE_AN_ID)) == -1


async def test_a_foreign_key_stays_and_only_the_messages_of_its_topic_are_refused(
    pipeline: Pipeline,
) -> None:
    # The log does not have this key.
    pipeline.replays_as_live = False
    await pipeline.redis.set(keys.message_index("taken"), "foreign")
    await pipeline.publish([given.published("m1", "taken"), given.published("m2", "free")])
    assert await stored(pipeline, "free", 1) == [b"m2"]
    await dead_letters(pipeline, 1)

    async def cleaned() -> bool:
        return not await pipeline.redis.exists(keys.message_body("m1"))

    await until(cleaned, "no body without an index entry")
    assert await pipeline.redis.get(keys.message_index("taken")) == b"foreign"


async def test_a_retained_message_is_stored_replaced_and_cleared(pipeline: Pipeline) -> None:
    await pipeline.publish([given.published("m1", retain=True)])
    await stored(pipeline, "t", 1)
    assert await pipeline.redis.zrange(keys.retained("t"), 0, -1) == [b"m1"]
    await pipeline.publish([given.published("m2", retain=True)])
    await stored(pipeline, "t", 2)
    assert await pipeline.redis.zrange(keys.retained("t"), 0, -1) == [b"m2"]
    await pipeline.publish([given.published("m3", retain=True, payload="")])
    await stored(pipeline, "t", 3)
    assert not await pipeline.redis.exists(keys.retained("t"))


async def test_receipts_commands_and_expiry(pipeline: Pipeline) -> None:
    for worker in pipeline.workers:
        worker.process.terminate()
        assert await worker.ended() == 0
    pipeline.configure(
        given.store("short/#", expired_time=1),
        given.receipt("message.acked", "t"),
        given.command("HSET last:${clientid} ${topic} ${payload}"),
    )
    await pipeline.worker()
    await pipeline.publish([given.published("m1", "short/x"), given.published("m2", payload="a b")])
    await pipeline.publish([given.acked("m2", at=7_000)])

    async def noted() -> Any:
        return await pipeline.redis.hgetall(keys.receipt("m2"))

    assert await until(noted, "a receipt") == {b"acked:sub": b"7"}
    assert await pipeline.redis.hgetall("last:pub") == {b"short/x": b"hello", b"t": b"a b"}

    async def gone() -> bool:
        index, body = keys.message_index("short/x"), keys.message_body("m1")
        return not await pipeline.redis.exists(index, body)

    await until(gone, "an expired message to be deleted, body and index entry")


async def test_a_dead_letter_that_would_be_too_large_for_kafka_has_no_bytes(
    pipeline: Pipeline,
) -> None:
    # The record fits. With the headers of a dead letter it does not.
    value = b"x" * ((4 << 20) - 150)
    await pipeline.producer.send_and_wait(keys.MESSAGES_TOPIC, key=b"t", value=value)
    await pipeline.publish([given.published("after")])
    assert await stored(pipeline, "t", 1) == [b"after"]

    async def arrived() -> list[Any]:
        return await pipeline.dead_letters()

    (dead_letter,) = await until(arrived, "a dead letter")
    headers = {name: text.decode() for name, text in dead_letter.headers}
    assert (dead_letter.key, dead_letter.value) == (b"t", b"")
    assert "JSON is malformed" in headers["reason"]
    assert "too large" in headers["not-produced"]
