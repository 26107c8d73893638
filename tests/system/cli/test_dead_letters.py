"""`millpond dead-letters` with a real queue worker, Kafka and Redis.

The queues hold one message. Every further message makes a dead letter of the one before it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from millpond.pipeline.kafka import topics
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.operate import operator_events
from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.schemas import keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import OperatorDrop
from tests.support import given
from tests.support.servers import Server
from tests.support.workers import Pipeline, running, until

REASON = "the queue was longer than max_length"
WEEK_MS = 7 * 86_400_000


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(given.queue("queue/#", max_length=1, overflow="dead_letter"))
        await started.worker("queue")
        yield started


async def run(
    pipeline: Pipeline, *arguments: str, stdin: int = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    """Run `millpond dead-letters …`. Stdin is empty unless it is given."""
    command = [sys.executable, "-m", "millpond", "dead-letters", *arguments]
    option = ["--config", str(pipeline.directory / "millpond.toml")]

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *option], stdin=stdin, capture_output=True, text=True, check=False,
            env={**os.environ, "COLUMNS": "120"},
        )  # fmt: skip

    return await asyncio.to_thread(call)


async def output(pipeline: Pipeline, *arguments: str) -> str:
    done = await run(pipeline, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


async def refused(pipeline: Pipeline, *arguments: str, exit_code: int = 1) -> str:
    """The one line that a command prints on stderr before it fails."""
    done = await run(pipeline, *arguments)
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stdout
    (line,) = done.stderr.splitlines()
    return line


async def dead(pipeline: Pipeline, *arguments: str) -> list[str]:
    """The ids of the dead letters, from the JSON output."""
    found = json.loads(await output(pipeline, "list", "--json", "--limit", "10000", *arguments))
    return [each["message_id"] for each in found]


async def until_dead(pipeline: Pipeline, *message_ids: str) -> None:
    async def all_dead() -> bool:
        return sorted(await dead(pipeline)) == sorted(message_ids)

    await until(all_dead, f"the dead letters {message_ids}")


async def queued(pipeline: Pipeline, topic: str) -> list[str]:
    ids: Any = await pipeline.redis.zrange(keys.message_index(topic), 0, -1)
    return [message_id.decode() for message_id in ids]


async def test_dead_letters_are_listed_and_shown_as_text_and_as_json(
    pipeline: Pipeline,
) -> None:
    assert await output(pipeline, "list") == "no dead letters\n"
    await pipeline.publish(given.published(f"m{at}", "queue/a", payload=f"p{at}") for at in "123")
    binary = b64encode(b"\xff\x00").decode()
    await pipeline.publish([
        given.published("b1", "queue/[b]/x", payload=binary, payload_encoding="base64", qos=2),
        given.published("b2", "queue/[b]/x"),
    ])  # fmt: skip
    await until_dead(pipeline, "m1", "m2", "b1")

    lines = (await output(pipeline, "list", "--topic", "queue/a")).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["m1", "queue/a"], ["m2", "queue/a"]]
    assert all(line.split()[4] == "0" and line.rstrip().endswith(REASON) for line in lines[1:3])
    assert lines[3:] == ["2 dead letters of topics that match 'queue/a'"]
    lines = (await output(pipeline, "list", "-t", "queue/+", "--limit", "1")).splitlines()
    assert lines[1].split()[0] == "m2"
    assert lines[2].startswith("the 1 newest of 2 dead letters")
    assert await dead(pipeline, "--topic", "queue/+/#") != []

    limited = await run(pipeline, "list", "--json", "--limit", "2")
    assert len(json.loads(limited.stdout)) == 2
    assert limited.stderr.startswith("the 2 newest of 3 dead letters")
    (listed,) = json.loads(await output(pipeline, "list", "--json", "-t", "queue/[b]/#"))
    expected = {
        "message_id": "b1", "topic": "queue/[b]/x", "agent": "queue", "deliveries": 0,
        "reason": REASON, "kept_until": listed["at"] + WEEK_MS,
    }  # fmt: skip
    assert listed.items() >= expected.items()
    assert json.loads(await output(pipeline, "show", "b1", "--json")) == {
        **listed,
        "message": {
            "client_id": "pub", "qos": 2, "retain": False, "published_at": 1_000, "expires_at": None,
            "payload": binary, "payload_encoding": "base64",
        },
    }  # fmt: skip
    shown = (await output(pipeline, "show", "m1")).splitlines()
    assert [line.split()[-1] for line in shown if line.split()[0] in ("topic", "publisher")] == [
        "queue/a",
        "pub",
    ]
    assert shown[-1] == "p1"


async def test_requeue_puts_a_message_back_into_its_queue_and_drop_deletes_it(
    pipeline: Pipeline,
) -> None:
    await pipeline.publish(given.published(f"m{at}", "queue/a") for at in "123")
    await until_dead(pipeline, "m1", "m2")

    ordered = await output(pipeline, "requeue", "m1")
    assert ordered == (
        "1 dead letter will be requeued when the agents read the orders from Kafka\n"
    )
    await until_dead(pipeline, "m2", "m3")  # the queue has room for one
    assert await queued(pipeline, "queue/a") == ["m1"]

    answer = await output(pipeline, "drop", "m2", "m3", "m2", "--json")
    assert json.loads(answer) == {"written": 2, "left_out": 0}
    await until_dead(pipeline)
    assert await pipeline.redis.exists(*map(keys.message_body, ("m2", "m3"))) == 0
    assert await pipeline.redis.exists(keys.message_body("m1")) == 1


async def test_orders_for_all_or_for_a_filter_are_about_the_dead_letters_at_the_start(
    pipeline: Pipeline,
) -> None:
    many = [given.published(f"m{at:04}", f"queue/{at % 5}") for at in range(2_505)]
    await pipeline.publish(many)
    ids = [event.message_id for event in many[:-5]]
    await until_dead(pipeline, *ids)

    answer = await output(pipeline, "requeue", "--topic", "queue/0", "--yes", "--json")
    assert json.loads(answer) == {"written": 500, "left_out": 0}

    async def in_order() -> bool:  # each pushes out the one before it; the last one stays
        return await queued(pipeline, "queue/0") == ["m2495"]

    await until(in_order, "the last dead letter to be requeued last")
    await until_dead(pipeline, "m2500", *(name for name in ids if name != "m2495"))

    assert json.loads(await output(pipeline, "drop", "--all", "--yes", "--json")) == {
        "written": 2_500,
        "left_out": 0,
    }
    await until_dead(pipeline)
    assert await output(pipeline, "drop", "--all", "-y") == "no dead letters to drop\n"


async def test_on_a_terminal_orders_for_many_need_a_confirmation(
    pipeline: Pipeline,
) -> None:
    await pipeline.publish(given.published(f"m{at}", "queue/a") for at in "123")
    await until_dead(pipeline, "m1", "m2")
    line = await refused(pipeline, "drop", "--all", exit_code=2)
    assert "--yes" in line

    keyboard, terminal = os.openpty()
    try:
        os.write(keyboard, b"n\n")
        done = await run(pipeline, "drop", "--all", stdin=terminal)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "Drop 2 dead letters? [y/N] millpond: not confirmed: nothing was changed\n"
        )
        assert sorted(await dead(pipeline)) == ["m1", "m2"]
        os.write(keyboard, b"y\n")
        done = await run(pipeline, "drop", "--all", stdin=terminal)
        assert (done.returncode, done.stdout[:15]) == (0, "2 dead letters ")
    finally:
        os.close(keyboard)
        os.close(terminal)
    await until_dead(pipeline)


async def test_an_order_that_no_agent_would_apply_is_refused_before_anything_is_written(
    pipeline: Pipeline,
) -> None:
    await pipeline.publish(given.published(f"m{at}", "queue/a") for at in "123")
    await until_dead(pipeline, "m1", "m2")
    for command in ("requeue", "drop", "show"):
        line = await refused(pipeline, command, *(["m1"] if command != "show" else []), "m3")
        assert line.startswith("millpond: these ids are no dead letters: 'm3' (")
        assert "`millpond dead-letters list`" in line

    # A configuration in which no rule owns the topic any more.
    config = pipeline.directory / "millpond.toml"
    configured = config.read_text()
    config.write_text(configured.replace('"queue/#"', '"other/#"'))
    assert "restore the delivery rule of 'queue/a'" in await refused(pipeline, "drop", "m1")
    assert (await output(pipeline, "drop", "--all", "--yes")).splitlines() == [
        "left out 2 dead letters of topics without a delivery rule",
        "no dead letters to drop",
    ]

    # A Kafka that cannot be reached.
    config.write_text(configured.replace(pipeline.bootstrap, f"{HOST}:{free_port()}"))
    assert "Kafka cannot be reached" in await refused(pipeline, "drop", "m1", exit_code=1)

    config.write_text(configured)
    await output(pipeline, "drop", "m2")
    await until_dead(pipeline, "m1")  # and the refused orders have changed nothing


async def test_records_that_could_not_be_read_are_listed_with_their_bytes(
    pipeline: Pipeline,
) -> None:
    # Given a dead message, and records with what would hurt a terminal
    await pipeline.publish(given.published(f"m{at}", "queue/a") for at in "12")
    await until_dead(pipeline, "m1")
    assert await output(pipeline, "list", "--unreadable") == (
        "no records that could not be read or stored\n"
    )
    poison = [b"\x1b[2J[bold]not JSON", b"\xff\xfe" + b"x" * 10_000, None]
    for value in poison:
        await pipeline.producer.send_and_wait(keys.MESSAGES_TOPIC, key=b"queue/a", value=value)

    async def all_there() -> list[Any]:
        found: list[Any] = json.loads(await output(pipeline, "list", "--unreadable", "--json"))
        return found if len(found) == len(poison) else []

    # Then they are listed as text and as JSON, and the message is not among them
    first, second, third = await until(all_there, "the unreadable records")
    assert b64decode(first["value"]) == poison[0]
    assert (second["size"], b64decode(second["value"])[:3]) == (10_002, b"\xff\xfex")
    assert (third["size"], third["value"], third["key"]) == (0, "", "queue/a")
    assert first["source"].startswith(f"{keys.MESSAGES_TOPIC}[")
    assert all(each["reason"] for each in (first, second, third))
    lines = (await output(pipeline, "list", "--unreadable")).splitlines()
    assert "\\x1b[2J[bold]not JSON" in lines[1]
    assert "\\xff\\xfexxx" in lines[2]
    assert lines[4:] == ["3 records that could not be read or stored"]
    lines = (await output(pipeline, "list", "--unreadable", "--limit", "1")).splitlines()
    assert len(lines) == 3 and "the newest 1 record" in lines[2]
    assert "--topic" in await refused(
        pipeline, "list", "--unreadable", "--topic", "queue/#", exit_code=2
    )


async def test_if_kafka_stops_answering_midway_the_error_counts_the_acknowledged_orders(
    own_kafka: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_events, "ACKNOWLEDGED_TIMEOUT_S", 3.0)
    monkeypatch.setattr(operator_events, "STOP_TIMEOUT_S", 60.0)
    stop = Producer.stop

    async def resume_and_stop(producer: Producer) -> None:
        own_kafka.resume()
        await stop(producer)

    monkeypatch.setattr(Producer, "stop", resume_and_stop)
    settings = KafkaSettings(bootstrap_servers=(own_kafka.address,), partitions=2)
    await topics.create(settings)

    def drops() -> Iterator[OperatorDrop]:
        for at in range(3 * operator_events.WRITTEN_AT_ONCE):
            if at == operator_events.WRITTEN_AT_ONCE:
                own_kafka.pause()
            yield OperatorDrop(at=at, node="n", topic="queue/a", message_id=f"m{at}")

    with pytest.raises(MillpondError, match="acknowledged 1000 orders and then failed: no ack"):
        await operator_events.write(settings, drops())
