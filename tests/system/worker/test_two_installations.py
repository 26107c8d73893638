"""Two whole installations on one Kafka and one Redis server: two topic prefixes, two applications, two databases."""

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
from aiokafka.admin import AIOKafkaAdminClient
from redis.asyncio import Redis

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.stack.ports import free_port
from millpond.schemas import keys
from tests.support import given
from tests.support.mqtt import PUBLISH, Client, delivered
from tests.support.replays import other_database, replay
from tests.support.workers import PARTITIONS, WAIT_S, Worker, until

RULES = (
    given.a_rule(hook="client.connected", action="on_client_connected"),
    given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
    given.queue("queue/#"),
    given.pubsub("pubsub/#"),
    given.store("kept/#"),
)


class Installation:
    """One installation: its settings, its processes and its database."""

    def __init__(self, app: str, prefix: str, kafka: str, database: str, directory: Path) -> None:
        directory.mkdir()
        self.app, self.prefix, self.port = app, prefix, free_port()
        self.database = database
        self.redis: Redis = Redis.from_url(database, decode_responses=True)
        self.config, self.directory = directory / "millpond.toml", directory
        self.processes: list[subprocess.Popen[bytes]] = []
        server, _, number = database.removeprefix("redis://").partition("/")
        self.config.write_text(
            f'app = "{app}"\n[kafka]\nbootstrap_servers = ["{kafka}"]\npartitions = {PARTITIONS}\n'
            f'topic_prefix = "{prefix}"\n[worker]\nsession_timeout_s = 6\n[bridge]\n'
            f"mqtt_port = {self.port}\nwebsocket_port = {free_port()}\n"
            f'[pool.pool1]\nserver = "{server}"\ndatabase = {number}\n' + "".join(RULES)
        )

    def topics(self) -> set[str]:
        return {f"{self.prefix}{topic}" for topic in keys.TOPICS}

    async def millpond(self, *arguments: str, **changed: str) -> tuple[int, str, str]:
        """Run a command. Return its exit code, and what it prints to stdout and stderr."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "millpond", *arguments, "--config", str(self.config)],
            capture_output=True, text=True, check=False, env={**os.environ, **changed},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    async def start(self) -> None:
        """Start the bridge and a worker of each agent, and wait until all are ready."""
        workers = [
            Worker(self.config, self.directory / f"{agent}.log", agent) for agent in AGENT_NAMES
        ]
        self.processes += [each.process for each in workers]
        ready, log = self.directory / "bridge.ready", self.directory / "bridge.log"
        with log.open("ab") as output:
            bridge = subprocess.Popen(
                [
                    sys.executable, "-m", "millpond", "bridge", "embedded",
                    "--config", str(self.config),
                ],
                stdout=output, stderr=output,
                env={**os.environ, "MILLPOND_READY_FILE": str(ready)},
            )  # fmt: skip
        self.processes.append(bridge)
        await asyncio.gather(*(each.until_ready() for each in workers))

        async def listens() -> bool:
            assert bridge.poll() is None, log.read_text()
            return ready.exists()

        await until(listens, "the bridge to listen")

    async def connect(self, client_id: str) -> Client:
        client = await Client.open(self.port)
        await client.connect(client_id, clean=True)
        return client

    async def clients(self) -> set[str]:
        """The clients that Redis knows."""
        prefix = keys.PRESENCE_PREFIX
        found = {key async for key in self.redis.scan_iter(match=f"{prefix}*")}
        return {key.removeprefix(prefix) for key in found}

    async def applied_all(self) -> bool:
        """True if no agent is behind."""
        code, said, complaint = await self.millpond("lag", "--json")
        assert code == 0, complaint
        return all(agent["behind"] == 0 for agent in json.loads(said)["agents"])

    async def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(WAIT_S)
        await self.redis.aclose()


@pytest.fixture
async def both(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[tuple[Installation, Installation]]:
    first, second = (
        Installation(
            f"{app_name}-{name}", f"{app_name}-{name}.", kafka, f"{redis_server}/{number}",
            tmp_path / name,
        )
        for number, name in ((3, "a"), (4, "b"))
    )  # fmt: skip
    for each in (first, second):
        await each.redis.flushdb()
    try:
        yield first, second
    finally:
        for each in (first, second):
            await each.stop()


async def topics_of(kafka: str) -> set[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        return {name for name in await admin.list_topics() if not name.startswith("__")}
    finally:
        await admin.close()


async def test_two_installations_on_one_kafka_see_nothing_of_each_other(
    both: tuple[Installation, Installation], kafka: str
) -> None:
    first, second = both
    foreign = await topics_of(kafka)

    # Each creates its own topics, and does not take the other's for them
    code, said, _ = await first.millpond("kafka", "init")
    assert (code, set(said.removeprefix("created ").replace(",", " ").split())) == (
        0,
        first.topics(),
    )
    code, _, missing = await second.millpond("kafka", "check")
    assert (code, len(missing.splitlines())) == (1, len(keys.TOPICS))
    assert f"{second.prefix}mqtt.clients does not exist" in missing
    assert (await second.millpond("kafka", "init"))[0] == 0
    await asyncio.gather(first.start(), second.start())
    for each in both:
        assert await each.millpond("kafka", "check") == (0, "all topics match the settings\n", "")

    # Each delivers and stores what its own clients publish
    consumer = await first.connect("consumer")
    await consumer.subscribe("queue/jobs", 1)
    for each, payload in ((first, b"of a"), (second, b"of b")):
        publisher = await each.connect(f"publisher-{payload.decode()[-1]}")
        publisher.publish("queue/jobs", payload, 1)
        publisher.publish("kept/note", payload, 1)
    got = await consumer.next(PUBLISH)
    assert delivered(got)[:2] == ("queue/jobs", b"of a")
    assert await consumer.silent()
    await until(second.applied_all, "the second installation to have applied all")
    assert await second.redis.zcard(keys.message_index("queue/jobs")) == 1
    for each, clients in ((first, {"consumer", "publisher-a"}), (second, {"publisher-b"})):
        assert await each.clients() == clients
        (message_id,) = await each.redis.zrange(keys.message_index("kept/note"), 0, -1)
        code, explained, complaint = await each.millpond("explain", str(message_id), "--json")
        assert code == 0, complaint
        # Millpond's own names have no prefix
        assert {event["kafka_topic"] for event in json.loads(explained)["events"]} == {
            keys.MESSAGES_TOPIC
        }
    assert await topics_of(kafka) == foreign | first.topics() | second.topics()

    # A replay reads the topics of its own installation alone
    for each in both:
        await until(each.applied_all, "all records to be applied")
        done: Any = await asyncio.to_thread(
            replay, each.config, other_database(each.database), "--diff", each.database
        )
        assert done.returncode == 0, done.stdout + done.stderr
        async with Redis.from_url(other_database(each.database)) as target:
            await target.flushdb()

    # A third one with the topics of the first, or with its consumer groups, learns whose they are
    code, _, complaint = await first.millpond("kafka", "check", MILLPOND_APP="third")
    assert (code, len(complaint.splitlines())) == (1, 1)
    assert f"another installation reads {first.prefix}mqtt." in complaint
    assert f"in the consumer group {first.app}." in complaint
    assert "a [kafka] topic_prefix of its own" in complaint
    code, _, complaint = await first.millpond(
        "kafka", "check", MILLPOND_KAFKA_TOPIC_PREFIX=second.prefix
    )
    assert (code, len(complaint.splitlines())) == (1, 2)
    assert f"in the consumer group {first.app}." in complaint
    assert "an app of its own" in complaint
    assert f"in the consumer group {second.app}." in complaint
