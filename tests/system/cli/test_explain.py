"""`millpond explain`, `topics` and `lag` with real workers, Kafka and Redis. The test plays the bridge."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from millpond.pipeline.explain.topics import deepest
from millpond.pipeline.settings import load
from millpond.schemas import keys
from millpond.schemas.events import OperatorDrop
from tests.support import given
from tests.support.bridge_commands import partition_of
from tests.support.inspection import (
    AT,
    RULES,
    explain,
    kinds,
    refused,
    run,
    sent,
    start,
    topic_of,
    until_state,
    write,
)
from tests.support.workers import Pipeline, running, until


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(*RULES)
        yield started


async def test_a_queued_message_is_ready_then_leased_then_sent_then_acked(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "queue")
    topic = "queue/a"
    await write(pipeline, *(given.published(each, topic) for each in ("m1", "m2")))
    ready = await until_state(pipeline, "m2", "ready")
    assert ready.words == "ready: 1 stored message before it, no clients online"

    await write(pipeline, given.joined("anna", topic))
    leased = await until_state(pipeline, "m1", "leased", client_id="anna", sent=False, attempt=1)
    assert leased.words.startswith("leased by 'anna' since 20")
    assert ", delivery 1, not confirmed by the bridge, returns at 20" in leased.words
    second = await until_state(pipeline, "m2", "ready", online=1)
    assert second.words == "ready: 1 stored message before it, 1 client online"

    await sent(pipeline, topic, "m1", alias="copy")
    confirmed = await until_state(pipeline, "m1", "leased", sent=True, attempt=1)
    assert ", delivery 1, sent, its ack is due by 20" in confirmed.words
    facts = await topic_of(pipeline, topic, "anna")
    assert [(each.message_id, each.sent) for each in facts.leases] == [("m1", True)]
    assert [(each.client_id, each.in_hand) for each in facts.members] == [("anna", 1)]
    assert (facts.messages, facts.ready, facts.leased) == (2, 1, 1)

    await write(pipeline, given.acked("copy", topic, client_id="anna"))
    acked = await until_state(pipeline, "m1", "acked", client_id="anna")
    assert acked.words.startswith("acked by 'anna' at 20")
    found = await explain(pipeline, "m1", topic=topic)
    assert kinds(found) == ["published", "sent", "acked"]
    assert [each.message_id for each in found.events] == ["m1", "copy", "copy"]
    assert {each.partition for each in found.events} == {partition_of(topic)}
    assert {each.partition for each in found.searched} == {partition_of(topic)}
    assert found.stored.message is None

    shown = (await run(pipeline, "explain", "m1", "--topic", topic)).stdout
    assert "acked by 'anna' at 20" in shown
    assert "as copy" in shown
    answer = json.loads((await run(pipeline, "explain", "m2", "--json")).stdout)
    assert (answer["topic"], answer["agent"], answer["states"][0]["state"]) == (
        topic,
        "queue",
        "leased",
    )
    listed = (await run(pipeline, "explain", "-t", topic, "--client", "anna")).stdout
    assert "1 of 1" in listed


async def test_a_queued_message_expires_or_dies_or_is_dropped(pipeline: Pipeline) -> None:
    await start(pipeline, "queue")
    await write(pipeline, given.published("old", "short/a"), given.published("bad", "poison/a"))
    await write(pipeline, given.joined("ben", "poison/a"))
    await until_state(pipeline, "bad", "leased", sent=False)
    await sent(pipeline, "poison/a", "bad")
    await write(pipeline, given.left("ben", "poison/a", source_offset=1))
    dead = await until_state(pipeline, "bad", "dead")
    assert dead.reason == "delivered 1 times without an acknowledgement"
    expired = await until_state(pipeline, "old", "expired", reason=None)
    assert expired.words.startswith("expired at 20")

    async def recorded() -> bool:
        return "dead_letter" in kinds(await explain(pipeline, "bad"))

    await until(recorded, "the record in the dead-letter topic")
    found = await explain(pipeline, "bad")
    assert kinds(found) == ["published", "sent", "dead_letter"]
    assert found.events[-1].kafka_topic == keys.DEAD_LETTERS_TOPIC
    await write(pipeline, OperatorDrop(**AT, topic="poison/a", message_id="bad"))
    dropped = await until_state(pipeline, "bad", "dropped")
    assert dropped.words.startswith("dropped by an operator at 20")


async def test_a_pubsub_message_has_a_state_for_each_subscriber(pipeline: Pipeline) -> None:
    await start(pipeline, "pubsub")
    topic = "pubsub/a"
    names = ("done", "sent", "waiting", "away")
    await write(pipeline, *(given.joined(name, topic) for name in names))
    await write(pipeline, *(given.published(each, topic) for each in ("m1", "m2", "m3")))
    await until_state(pipeline, "m1", "leased", "away")
    await sent(pipeline, topic, "m1", "m2")
    await write(
        pipeline,
        *(given.acked(each, topic, client_id="done") for each in ("m1", "m2")),
        given.acked("m2", topic, client_id="sent"),
        given.left("away", topic, source_offset=1),
    )
    await until_state(pipeline, "m1", "ready", "away")
    await until_state(pipeline, "m2", "acked", "sent")
    found = await explain(pipeline, "m1")
    assert found.states[0].state == "stored"
    assert {each.subscriber: each.state for each in found.states[1:]} == {
        "done": "acked", "sent": "leased", "waiting": "leased", "away": "ready",
    }  # fmt: skip
    ahead = next(x for x in (await explain(pipeline, "m2")).states if x.subscriber == "sent")
    assert ahead.words.endswith("(ahead of the read offset: an earlier message is not done)")
    third = {each.subscriber: each.state for each in (await explain(pipeline, "m3")).states[1:]}
    assert third == {"done": "leased", "sent": "leased", "waiting": "ready", "away": "ready"}
    (only,) = (await explain(pipeline, "m1", client="waiting")).states[1:]
    assert only.subscriber == "waiting"

    facts = await topic_of(pipeline, topic)
    assert {each.subscriber: (each.ready, each.leased) for each in facts.subscribers} == {
        "done": (0, 1), "sent": (0, 2), "waiting": (1, 2), "away": (3, 0),
    }  # fmt: skip
    done_ahead = {each.subscriber: each.done_ahead for each in facts.subscribers}
    assert done_ahead == {"done": 0, "sent": 1, "waiting": 0, "away": 0}
    (one,) = (await topic_of(pipeline, topic, "away")).subscribers
    assert (one.read_offset, one.online) == (None, 0)
    shown = (await run(pipeline, "explain", "m1")).stdout
    assert "4 subscribers: " in shown
    assert "1 acked" in shown


async def test_a_message_that_is_dead_for_one_subscriber_and_messages_that_are_not_stored(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "pubsub", "messages")
    topic = "brief/a"
    await write(pipeline, given.joined("slow", topic), given.joined("quick", topic))
    await write(pipeline, given.published("m1", topic), given.published("zero", topic, qos=0))
    await write(pipeline, given.published("other", "elsewhere"))
    await until_state(pipeline, "m1", "leased", "slow")
    await sent(pipeline, topic, "m1")
    await write(pipeline, given.acked("m1", topic, client_id="quick"))
    await write(pipeline, given.left("slow", topic, source_offset=1))
    dead = await until_state(pipeline, "m1", "dead", "slow")
    assert dead.reason == "slow: delivered 1 times without an acknowledgement"
    await until_state(pipeline, "m1", "acked", "quick")
    assert (await until_state(pipeline, "zero", "passed_on")).words.startswith("passed on: ")
    other = await until_state(pipeline, "other", "not_stored")
    assert other.words == "not stored: no rule stores messages of its topic"


async def test_messages_without_a_delivery_rule_and_unknown_messages(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "messages")
    await write(
        pipeline,
        given.published("k1", "kept/a"),
        given.published("r1", "retained/a", retain=True),
        given.published("z1", "kept/a", qos=0),
        given.acked("k1", "kept/a", client_id="reader"),
        given.acked("k2", "kept/a", client_id="quick"),
        given.published("k2", "kept/a"),
    )
    await until_state(pipeline, "k1", "stored")
    await until_state(pipeline, "r1", "retained")
    zero = await until_state(pipeline, "z1", "not_stored")
    assert zero.words == "not stored: its QoS is 0"

    async def receipt() -> dict[str, int]:
        return (await explain(pipeline, "k1")).stored.receipts

    assert list(await until(receipt, "the receipt")) == ["acked:reader"]
    await until_state(pipeline, "k2", "stored")
    assert kinds(await explain(pipeline, "k2")) == ["acked", "published"]
    found = await explain(pipeline, "r1")
    assert (found.stored.retained, found.stored.index_score) == (True, None)
    line = await refused(pipeline, "explain", "no one's")
    assert line.startswith('millpond: no message "no one\'s" is known: neither in Redis, nor in ')
    assert "records in the 4 partitions of mqtt.messages" in line
    line = await refused(pipeline, "explain", "no one's", "-t", "kept/a", "--json")
    assert f"mqtt.messages[{partition_of('kept/a')}], records " in line


async def test_the_deepest_topics_are_listed_with_their_messages_and_subscribers(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "messages", "queue", "pubsub")
    await write(
        pipeline,
        *(given.published(f"k{at}", "kept/[b]") for at in range(3)),
        *(given.published(f"q{at}", "queue/a") for at in range(5)),
        *(given.published(f"p{at}", "pubsub/ü") for at in range(4)),
        given.published("r", "retained/a", retain=True),
        given.published("rq", "queue/r", retain=True, qos=0),
        given.joined("anna", "queue/a"),
        given.joined("reader", "pubsub/ü"),
        given.joined("gone", "pubsub/ü"),
        given.left("gone", "pubsub/ü", source_offset=1),
    )
    settings, rules = load(pipeline.directory / "millpond.toml", {})

    async def all_there() -> Any:
        found = await deepest(settings, rules)
        rows = {
            each.topic: (each.agent, each.messages, each.ready, each.leased, each.subscribers)
            for each in found.rows
        }
        return rows == {
            "queue/a": ("queue", 5, 4, 1, 1),
            "pubsub/ü": ("pubsub", 4, 6, 2, 2),
            "kept/[b]": ("messages", 3, None, None, 0),
            "retained/a": ("messages", 0, None, None, 0),
        }

    await until(all_there, "all topics to be listed")
    lines = (await run(pipeline, "topics", "--limit", "2")).stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["queue/a", "queue", "5"],
        ["pubsub/ü", "pubsub", "4"],
    ]
    assert lines[3] == "the 2 deepest of 4 topics, 12 messages: --limit shows more"
    answer = json.loads((await run(pipeline, "topics", "--json")).stdout)
    assert [each["topic"] for each in answer["rows"]][:2] == ["queue/a", "pubsub/ü"]
    one = (await run(pipeline, "topics", "pubsub/ü")).stdout
    assert "reader" in one
    line = await refused(pipeline, "topics", "queue/none")
    assert line.startswith("millpond: nothing is known of the topic 'queue/none'")


async def test_lag_counts_the_records_that_the_agents_have_not_applied(pipeline: Pipeline) -> None:
    await start(pipeline, "queue")
    await write(pipeline, *(given.published(f"q{at}", "queue/a") for at in range(7)))
    await until_state(pipeline, "q6", "ready")

    async def caught_up() -> Any:
        answer = json.loads((await run(pipeline, "lag", "--json")).stdout)
        agents = {each["agent"]: each for each in answer["agents"]}
        queue = agents["queue"]
        return agents if queue["behind"] == 0 and queue["oldest_at"] is None else None

    agents = await until(caught_up, "the queue agent to have applied all")
    # The messages agent has never run.
    assert agents["messages"]["behind"] >= 7
    assert oldest_at(agents["messages"]) > 0
    queue = agents["queue"]["partitions"][partition_of("queue/a")]
    assert queue["applied"] == queue["end"] - 1
    shown = (await run(pipeline, "lag", "--partitions")).stdout
    assert shown.split()[:5] == ["agent", "partitions", "behind", "oldest", "uncommitted"]


def oldest_at(agent: dict[str, Any]) -> int:
    at = agent["oldest_at"]
    assert isinstance(at, int)
    return at
