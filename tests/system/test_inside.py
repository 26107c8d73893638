"""`millpond explain`, `topics` and `lag` with real workers, a real Kafka and a real Redis; the test plays the bridge."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.inside import message as messages
from pipeline.inside import topic as topics
from pipeline.inside.facts import MessageFacts, MessageState
from pipeline.inside.topic import TopicFacts
from pipeline.inside.topics import deepest
from pipeline.settings import load
from schemas import codec, keys
from schemas.errors import MillpondError
from schemas.events import DeliveriesSent, Event, OperatorDrop, Sent
from tests import given
from tests.system.commands import partition_of
from tests.system.pipeline import Pipeline, running, until

AT: dict[str, Any] = {"at": 0, "node": "n"}
RULES = (
    given.queue("queue/#", max_inflight=1, ack_timeout_s=3_600),
    given.queue("short/#", expired_time=1),
    given.queue("poison/#", ack_timeout_s=1, max_deliveries=1),
    given.pubsub("pubsub/#", max_inflight=2, ack_timeout_s=3_600),
    given.pubsub("brief/#", max_inflight=1, ack_timeout_s=1, max_deliveries=1),
    given.a_rule(
        hook="message.publish", topic="kept/#", action="on_message_publish", expired_time=3_600
    ),
    given.retain("retained/#"),
    given.receipt(topic="kept/#"),
)


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(*RULES)
        yield started


async def start(pipeline: Pipeline, *agents: str) -> None:
    await asyncio.gather(*(pipeline.worker(agent) for agent in agents))


async def explain(pipeline: Pipeline, message_id: str, **options: Any) -> MessageFacts:
    settings, rules = load(pipeline.directory / "millpond.toml", {})
    return await messages.explain(settings, rules, message_id, **options)


async def topic_of(pipeline: Pipeline, topic: str, client: str | None = None) -> TopicFacts:
    settings, rules = load(pipeline.directory / "millpond.toml", {})
    return await topics.explain(settings, rules, topic, client)


async def until_state(
    pipeline: Pipeline, message_id: str, state: str, subscriber: str | None = None, **fields: Any
) -> MessageState:
    """It is in that state, as a whole or for one subscriber."""

    async def so_it_is() -> MessageState | None:
        try:
            found = await explain(pipeline, message_id)
        except MillpondError:
            return None
        for each in found.states:
            if each.subscriber == subscriber and each.state == state:
                given_fields = {name: getattr(each, name) for name in fields}
                return each if given_fields == fields else None
        return None

    answer = await until(so_it_is, f"{message_id} to be {state} for {subscriber}")
    assert isinstance(answer, MessageState)
    return answer


async def sent(pipeline: Pipeline, topic: str, *message_ids: str, alias: str | None = None) -> None:
    """The bridge has handed over these copies, whoever has them."""
    wanted = set(message_ids)

    async def all_leased() -> list[Any]:
        leases = (await topic_of(pipeline, topic)).leases
        return leases if wanted <= {each.message_id for each in leases} else []

    leases = await until(all_leased, f"{message_ids} to be leased")
    agent = (await topic_of(pipeline, topic)).agent
    number = partition_of(topic)
    report = DeliveriesSent(
        **AT, agent=agent,
        sent=tuple(
            Sent(f"{agent}/{number}/{each.number}", each.client_id, each.message_id, alias)
            for each in leases if each.message_id in wanted and not each.sent
        ),
    )  # fmt: skip
    key = keys.record_key(report).encode()
    await pipeline.producer.send_and_wait(
        keys.MESSAGES_TOPIC, key=key, value=codec.encode(report), partition=number
    )


async def tell(pipeline: Pipeline, *events: Event) -> None:
    await pipeline.publish(events)


async def run(pipeline: Pipeline, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One `millpond …`, without a terminal."""
    option = ["--config", str(pipeline.directory / "millpond.toml")]
    command = [sys.executable, "-m", "pipeline.cli", *arguments, *option]

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            env={**os.environ, "COLUMNS": "120"},
        )  # fmt: skip

    return await asyncio.to_thread(call)


def kinds(found: MessageFacts) -> list[str]:
    return [each.kind for each in found.events]


async def test_a_queued_message_is_ready_then_leased_then_sent_then_acked(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "queue")
    topic = "queue/a"
    await tell(pipeline, *(given.published(each, topic) for each in ("m1", "m2")))
    ready = await until_state(pipeline, "m2", "ready")
    assert ready.words == "ready: 1 stored message before it, nobody is online to take it"

    await tell(pipeline, given.joined("anna", topic))
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

    await tell(pipeline, given.acked("copy", topic, client_id="anna"))
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
    told = json.loads((await run(pipeline, "explain", "m2", "--json")).stdout)
    assert (told["topic"], told["agent"], told["states"][0]["state"]) == (topic, "queue", "leased")
    listed = (await run(pipeline, "explain", "-t", topic, "--client", "anna")).stdout
    assert "1 of 1" in listed


async def test_a_queued_message_expires_or_dies_or_is_dropped(pipeline: Pipeline) -> None:
    await start(pipeline, "queue")
    await tell(pipeline, given.published("old", "short/a"), given.published("bad", "poison/a"))
    await tell(pipeline, given.joined("ben", "poison/a"))
    await until_state(pipeline, "bad", "leased", sent=False)
    await sent(pipeline, "poison/a", "bad")
    dead = await until_state(pipeline, "bad", "dead")
    assert dead.reason == "delivered 1 times without an acknowledgement"
    expired = await until_state(pipeline, "old", "expired", reason=None)
    assert expired.words.startswith("expired at 20")

    async def letter() -> bool:
        return "dead_letter" in kinds(await explain(pipeline, "bad"))

    await until(letter, "the record among the dead letters")
    found = await explain(pipeline, "bad")
    assert kinds(found) == ["published", "sent", "dead_letter"]
    assert found.events[-1].kafka_topic == keys.DEAD_LETTERS_TOPIC
    await tell(pipeline, OperatorDrop(**AT, topic="poison/a", message_id="bad"))
    dropped = await until_state(pipeline, "bad", "dropped")
    assert dropped.words.startswith("dropped by an operator at 20")


async def test_a_pubsub_message_is_something_else_for_each_subscriber(pipeline: Pipeline) -> None:
    await start(pipeline, "pubsub")
    topic = "pubsub/a"
    names = ("done", "sent", "waiting", "away")
    await tell(pipeline, *(given.joined(name, topic) for name in names))
    await tell(pipeline, *(given.published(each, topic) for each in ("m1", "m2", "m3")))
    await until_state(pipeline, "m1", "leased", "away")
    await sent(pipeline, topic, "m1", "m2")
    await tell(
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
    assert ahead.words.endswith("(ahead of the read offset: something before it is not done with)")
    third = {each.subscriber: each.state for each in (await explain(pipeline, "m3")).states[1:]}
    assert third == {"done": "leased", "sent": "leased", "waiting": "ready", "away": "ready"}
    (only,) = (await explain(pipeline, "m1", client="waiting")).states[1:]
    assert only.subscriber == "waiting"

    facts = await topic_of(pipeline, topic)
    assert {each.subscriber: (each.ready, each.leased) for each in facts.subscribers} == {
        "done": (0, 1), "sent": (0, 2), "waiting": (1, 2), "away": (3, 0),
    }  # fmt: skip
    (one,) = (await topic_of(pipeline, topic, "away")).subscribers
    assert (one.read_offset, one.online) == (None, 0)
    shown = (await run(pipeline, "explain", "m1")).stdout
    assert "4 subscribers: " in shown
    assert "1 acked" in shown


async def test_a_message_dead_for_one_subscriber_and_one_that_nobody_stores(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "pubsub", "messages")
    topic = "brief/a"
    await tell(pipeline, given.joined("slow", topic), given.joined("quick", topic))
    await tell(pipeline, given.published("m1", topic), given.published("zero", topic, qos=0))
    await tell(pipeline, given.published("other", "elsewhere"))
    await until_state(pipeline, "m1", "leased", "slow")
    await sent(pipeline, topic, "m1")
    await tell(pipeline, given.acked("m1", topic, client_id="quick"))
    dead = await until_state(pipeline, "m1", "dead", "slow")
    assert dead.reason == "slow: delivered 1 times without an acknowledgement"
    await until_state(pipeline, "m1", "acked", "quick")
    assert (await until_state(pipeline, "zero", "passed_on")).words.startswith("passed on: ")
    nobody = await until_state(pipeline, "other", "not_stored")
    assert nobody.words == "not stored: no rule stores messages of its topic"


async def test_messages_that_nobody_delivers_and_those_that_nobody_knows(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "messages")
    await tell(
        pipeline,
        given.published("k1", "kept/a"),
        given.published("r1", "retained/a", retain=True),
        given.published("z1", "kept/a", qos=0),
        given.acked("k1", "kept/a", client_id="reader"),
    )
    await until_state(pipeline, "k1", "stored")
    await until_state(pipeline, "r1", "retained")
    zero = await until_state(pipeline, "z1", "not_stored")
    assert zero.words == "not stored: it is of QoS 0"

    async def receipt() -> dict[str, int]:
        return (await explain(pipeline, "k1")).stored.receipts

    assert list(await until(receipt, "the receipt")) == ["acked:reader"]
    found = await explain(pipeline, "r1")
    assert (found.stored.retained, found.stored.index_score) == (True, None)
    unknown = await run(pipeline, "explain", "nobody's")
    assert unknown.returncode == 1
    (line,) = unknown.stderr.splitlines()
    assert line.startswith('millpond: no message "nobody\'s" is known: neither in Redis, nor in ')
    assert "records in the 4 partitions of mqtt.messages" in line
    there = await run(pipeline, "explain", "nobody's", "-t", "kept/a", "--json")
    assert (there.returncode, there.stdout) == (1, "")
    assert f"mqtt.messages[{partition_of('kept/a')}], records " in there.stderr


async def test_the_deepest_topics_are_listed_with_all_that_is_in_them(pipeline: Pipeline) -> None:
    await start(pipeline, "messages", "queue", "pubsub")
    await tell(
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

    await until(all_there, "all topics, with what is in them")
    lines = (await run(pipeline, "topics", "--limit", "2")).stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["queue/a", "queue", "5"],
        ["pubsub/ü", "pubsub", "4"],
    ]
    assert lines[3] == "the 2 deepest of 4 topics, 12 messages: --limit shows more"
    told = json.loads((await run(pipeline, "topics", "--json")).stdout)
    assert [each["topic"] for each in told["rows"]][:2] == ["queue/a", "pubsub/ü"]
    one = (await run(pipeline, "topics", "pubsub/ü")).stdout
    assert "reader" in one
    nothing = await run(pipeline, "topics", "queue/none")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith("millpond: nothing is known of the topic 'queue/none'")


async def test_lag_is_what_the_agents_have_not_applied(pipeline: Pipeline) -> None:
    await start(pipeline, "queue")
    await tell(pipeline, *(given.published(f"q{at}", "queue/a") for at in range(7)))
    await until_state(pipeline, "q6", "ready")

    async def caught_up() -> Any:
        told = json.loads((await run(pipeline, "lag", "--json")).stdout)
        agents = {each["agent"]: each for each in told["agents"]}
        queue = agents["queue"]
        return agents if queue["behind"] == 0 and queue["oldest_at"] is None else None

    agents = await until(caught_up, "the queue agent to have applied all")
    # The messages agent has never run: all is to come.
    assert agents["messages"]["behind"] >= 7
    assert told_at(agents["messages"]) > 0
    queue = agents["queue"]["partitions"][partition_of("queue/a")]
    assert queue["applied"] == queue["end"] - 1
    shown = (await run(pipeline, "lag", "--partitions")).stdout
    assert shown.split()[:5] == ["agent", "partitions", "behind", "oldest", "uncommitted"]


def told_at(agent: dict[str, Any]) -> int:
    at = agent["oldest_at"]
    assert isinstance(at, int)
    return at
