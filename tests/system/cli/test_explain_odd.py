"""`millpond explain`, `topics` and `lag` with odd names, failing servers, a Redis Cluster, and `--watch`."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from millpond.pipeline.explain import log_search
from millpond.pipeline.explain.topics import deepest
from millpond.pipeline.settings import load
from millpond.pipeline.stack.ports import free_port
from millpond.schemas import keys
from millpond.schemas.errors import MillpondError
from tests.support import given
from tests.support.bridge_commands import partition_of
from tests.support.inspection import (
    RULES,
    command,
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
from tests.support.servers import Server
from tests.support.workers import Pipeline, running, until

ODD = (
    "plain", "with space", 'quo"te', "back\\slash", "sla/sh", "new\nline", "tab\t", "[bold]", "\x1b[31m",
    "-dash", "--json", "é", "日本", "\N{PILE OF POO}", "a" * 256, "'", "%s", "{}", "*", "\u202e", "null",
)  # fmt: skip


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(*RULES)
        yield started


async def test_messages_and_topics_with_odd_names_are_found_and_printed_without_control_characters(
    pipeline: Pipeline,
) -> None:
    await start(pipeline, "messages", "queue")
    topics = [f"{prefix}/{name}" for prefix in ("kept", "queue") for name in ODD if name != "*"]
    events = [
        given.published(f"{name}\n{at}"[-200:], topic, client_id=name)
        for at, topic in enumerate(topics)
        for name in ODD[at % len(ODD) :][:2]
    ]
    await write(pipeline, *events)
    for event in events:
        state = "ready" if event.topic.startswith("queue") else "stored"
        await until_state(pipeline, event.message_id, state)
        found = await explain(pipeline, event.message_id)
        assert (found.topic, kinds(found)) == (event.topic, ["published"])
        assert found.stored.message is not None
        assert found.stored.message.client_id == event.client_id
        with pytest.raises(MillpondError, match=" is a message of topic "):
            await explain(pipeline, event.message_id, topic=event.topic + "x")
    settings, rules = load(pipeline.directory / "millpond.toml", {})
    listed = await deepest(settings, rules, 1_000)
    assert {each.topic for each in listed.rows} == set(topics)
    for arguments in (
        ("topics", "--limit", "1000"),
        *(("explain", "--", each.message_id) for each in events[:6]),
        *(("topics", "--", topic) for topic in topics[:6]),
    ):
        done = await run(pipeline, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(each.isprintable() for each in done.stdout.replace("\n", ""))
    for name in ("\udcff", "a\udc80b"):
        assert "is no UTF-8" in await refused(pipeline, "explain", name)
        assert "is no UTF-8" in await refused(pipeline, "explain", "m", "--topic", name)


async def test_an_acked_message_is_found_by_the_id_of_a_copy_within_the_search_limit(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(pipeline, "queue")
    topic = "queue/a"
    await write(pipeline, given.joined("anna", topic), given.published("m1", topic))
    await sent(pipeline, topic, "m1", alias="copy")
    await write(pipeline, given.acked("copy", topic, client_id="anna"))
    await until_state(pipeline, "m1", "acked")
    found = await explain(pipeline, "copy")
    assert (found.message_id, kinds(found)) == ("m1", ["published", "sent", "acked"])
    assert found.notes[0] == "'copy' is the id that the broker gave to a copy of it"
    # When many messages are published after it, Then it is found within the limit.
    await write(pipeline, *(given.published(f"x{at}", topic + "/b") for at in range(50)))
    await write(pipeline, *(given.published(f"y{at}", topic) for at in range(50)))
    number = partition_of(topic)
    monkeypatch.setattr(
        log_search, "CHUNK_RECORDS", 7
    )  # so that the search takes many steps backwards
    for options in ({}, {"topic": topic}):
        assert kinds(await explain(pipeline, "m1", **options)) == ["published", "sent", "acked"]
    everything = await explain(pipeline, "m1", topic=topic)
    assert everything.events[0].offset == found.events[0].offset
    assert [
        each.whole for each in everything.searched if each.kafka_topic == keys.MESSAGES_TOPIC
    ] == [True]
    line = await refused(pipeline, "explain", "m1", "-t", topic, "--search", "1")
    assert f"mqtt.messages[{number}], records " in line
    assert line.endswith("; --search N searches more")


async def test_a_server_that_does_not_answer_is_one_sentence(pipeline: Pipeline) -> None:
    config = pipeline.directory / "millpond.toml"
    original = config.read_text()
    for server in (
        pipeline.bootstrap,
        pipeline.redis_url.removeprefix("redis://").partition("/")[0],
    ):
        away = f"127.0.0.1:{free_port()}"
        config.write_text(original.replace(server, away))
        commands = [("explain", "m"), ("lag",), ("lag", "--json")]
        if server != pipeline.bootstrap:
            commands += [("topics",), ("topics", "queue/a"), ("explain", "-t", "queue/a")]
        for arguments in commands:
            assert away in await refused(pipeline, *arguments), arguments
    config.write_text(original)
    for wrong in ((), ("m", "-t", "a/#"), ("-t", "a/+")):
        done = await run(pipeline, "explain", *wrong)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


async def test_lag_is_printed_repeatedly_until_ctrl_c(pipeline: Pipeline) -> None:
    worker = await pipeline.worker("queue")
    await write(pipeline, given.published("m1", "queue/a"))
    await until_state(pipeline, "m1", "ready")
    worker.signal(signal.SIGSTOP)
    watching = await asyncio.create_subprocess_exec(
        *command(pipeline, "lag", "--watch", "--json", "--interval", "0.2"), stdout=subprocess.PIPE
    )
    assert watching.stdout is not None

    async def behind() -> tuple[int, int | None]:
        assert watching.stdout is not None
        (queue,) = (
            each for each in json.loads(await watching.stdout.readline())["agents"]
            if each["agent"] == "queue"
        )  # fmt: skip
        return queue["behind"], queue["oldest_at"]

    async def none() -> bool:
        return await behind() == (0, None)

    await until(none, "nothing to be behind")
    await write(pipeline, *(given.published(f"x{at}", "queue/a") for at in range(3)))

    async def three() -> Any:
        number, oldest_at = await behind()
        return number == 3 and oldest_at

    assert await until(three, "three records to be behind, with their age")
    worker.signal(signal.SIGCONT)
    await until(none, "nothing to be behind once more")
    watching.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(watching.wait(), 30) == 0
    assert "--watch needs a terminal" in (await run(pipeline, "lag", "--watch")).stderr


async def test_a_redis_cluster_is_read_as_well(
    pipeline: Pipeline, redis_cluster: list[tuple[str, int]]
) -> None:
    pipeline.replays_as_live = False  # the replay of the tests compares with a single Redis
    config = pipeline.directory / "millpond.toml"
    nodes = ", ".join(f'"{host}:{port}"' for host, port in redis_cluster)
    before, _, rules = config.read_text().partition("[pool.pool1]\n")
    rules = rules.partition("database = ")[2].partition("\n")[2]
    config.write_text(f'{before}[pool.pool1]\ntype = "cluster"\nserver = [{nodes}]\n{rules}')
    await start(pipeline, "queue", "pubsub", "messages")
    await write(
        pipeline,
        given.published("k1", "kept/a"),
        *(given.published(f"q{at}", "queue/a") for at in range(3)),
        *(given.published(f"p{at}", "pubsub/a") for at in range(4)),
        given.joined("anna", "queue/a"),
        given.joined("reader", "pubsub/a"),
    )
    await until_state(pipeline, "q0", "leased", client_id="anna")
    await until_state(pipeline, "q1", "ready")
    await until_state(pipeline, "p1", "leased", "reader")
    await until_state(pipeline, "k1", "stored")
    assert [each.ready for each in (await topic_of(pipeline, "pubsub/a")).subscribers] == [2]
    settings, loaded = load(config, {})

    async def listed() -> bool:
        found = await deepest(settings, loaded)
        rows = [(each.topic, each.messages, each.ready, each.leased) for each in found.rows]
        return rows == [("pubsub/a", 4, 2, 2), ("queue/a", 3, 2, 1), ("kept/a", 1, None, None)]

    await until(listed, "all topics of the cluster")


@pytest.mark.parametrize("lost", ["Kafka", "Redis"])
async def test_watching_ends_with_one_sentence_when_a_server_stops(
    app_name: str, own_kafka: Server, own_redis: Server, tmp_path: Path, lost: str
) -> None:
    async with running(app_name, own_kafka.address, own_redis.address, tmp_path) as started:
        started.configure(*RULES)
        watching = await asyncio.create_subprocess_exec(
            *command(started, "lag", "--watch", "--json", "--interval", "0.2"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert watching.stdout is not None
        assert await watching.stdout.readline()
        (own_kafka if lost == "Kafka" else own_redis).kill()
        _, output = await asyncio.wait_for(watching.communicate(), 60)
        (line,) = output.decode().splitlines()
        print(line)
        assert watching.returncode == 1
        assert line.startswith("millpond: ")
        if lost == "Kafka":
            own_kafka.start()
