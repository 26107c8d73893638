"""No log has a secret or a payload. Processes with secrets meet many faults, and the test reads every log line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from redis import Redis

from millpond.pipeline.kafka import topics
from millpond.pipeline.settings import load
from millpond.schemas import keys
from tests.support import given
from tests.support.embedded_bridge import MESSAGE_BYTES_MAX, Bridge
from tests.support.mqtt import Will, packet, text
from tests.support.servers import Server
from tests.support.workers import Worker, until
from tests.system.worker.test_kafka_security import (
    PASSWORD,
    USER,
    SecureKafka,
    configured,
    secure_kafka,
)

__all__ = ["secure_kafka"]  # a fixture

REDIS_PASSWORD = "flour-for-redis"
PAYLOAD = "a-private-payload"
RULES = (
    given.store(),
    given.queue("queue/#"),
    given.command("HSET text ${payload} x", topic="command/#"),
    given.command("INCR ${payload}", topic="command/#"),
)
PUBLISHES = 300
LINES_MAX = 60  # in the logs of all processes: a line for each notable moment, none for a message


class System:
    """A bridge and three workers, with every secret in a file."""

    def __init__(self, kafka: SecureKafka, redis: Server, directory: Path) -> None:
        self.kafka, self.directory = kafka, directory
        self.address = redis.address.removeprefix("redis://")
        self.redis: Redis = Redis.from_url(redis.address, decode_responses=True)
        self.redis.config_set("requirepass", REDIS_PASSWORD)
        self.redis.auth(REDIS_PASSWORD)
        self.config = configured(kafka, directory)
        (directory / "redis-password").write_text(REDIS_PASSWORD)
        self.config.write_text(
            f'{self.config.read_text()}\n[pool.pool1]\nserver = "{self.address}"\n'
            f'password_file = "{directory / "redis-password"}"\n' + "".join(RULES)
        )
        self.workers: list[Worker] = []

    async def start(self) -> None:
        await topics.create(load(self.config, {})[0].kafka)
        self.bridge = Bridge(self.kafka.address, self.directory / "bridge", *RULES)
        for agent in ("sessions", "messages", "queue"):
            worker = Worker(self.config, self.directory / f"{agent}.log", agent)
            self.workers.append(worker)
        for worker in self.workers:
            await worker.until_ready()
        self.bridge.until_ready()

    async def publish(self) -> None:
        """Publish messages that are stored, messages that are refused, and malformed packets."""
        client = await self.bridge.connect("pub", will=Will("plain", PAYLOAD.encode(), 1))
        for number in range(1, PUBLISHES + 1):
            client.publish("plain", PAYLOAD.encode(), 1, number)
        for number, topic in enumerate(("command/a", "queue/a", "in-the-way"), PUBLISHES + 1):
            client.publish(topic, PAYLOAD.encode(), 1, number)
        await client.acknowledged(PUBLISHES + 3)
        client.publish("$SYS/a", PAYLOAD.encode(), 1, 1)
        await client.closed()
        client = await self.bridge.connect("large")
        client.publish("large", (PAYLOAD * MESSAGE_BYTES_MAX).encode()[:MESSAGE_BYTES_MAX], 1, 2)
        await client.closed()
        broken = await self.bridge.open()
        broken.send(packet(1, 0, text(PAYLOAD) + bytes((4, 0xC2, 0, 0)) + text(PAYLOAD) * 3))
        await broken.closed()

    async def produce_unreadable_records(self) -> None:
        bad = (PAYLOAD, f'{{"type": "{PAYLOAD}"}}', f'{{"type":"tick","at":"{PAYLOAD}"}}')
        async with AIOKafkaProducer(bootstrap_servers=self.kafka.plain) as producer:
            for topic in (keys.MESSAGES_TOPIC, keys.DELIVERIES_TOPIC):
                for value in bad:
                    await producer.send_and_wait(topic, value.encode(), b"plain")

    async def end(self) -> None:
        processes: list[Worker | Bridge] = [*self.workers, self.bridge]
        for each in processes:
            each.process.send_signal(signal.SIGTERM)
        for each in processes:
            await each.ended()

    def kill(self) -> None:
        processes: list[Worker | Bridge] = [*self.workers, self.bridge]
        for each in processes:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
        self.bridge.let_go()
        self.redis.close()

    def lines(self) -> list[str]:
        logs = [*self.directory.glob("*.log"), self.bridge.log]
        return [line for log in logs for line in log.read_text().splitlines()]


@pytest.mark.parametrize("form", ["json", "console"])
async def test_no_log_has_a_secret_or_a_payload(
    secure_kafka: SecureKafka, own_redis: Server, tmp_path: Path, form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Given processes with secrets, and foreign keys in Redis that make commands fail
    files = {"PASSWORD_FILE": tmp_path / "password", "CA_FILE": secure_kafka.ca_file}
    for name, value in {
        "SECURITY_PROTOCOL": "SASL_SSL", "USERNAME": USER, "PARTITIONS": "2",
        **{name: str(path) for name, path in files.items()},
    }.items():  # fmt: skip
        monkeypatch.setenv(f"MILLPOND_KAFKA_{name}", value)
    monkeypatch.setenv("MILLPOND_LOG_FORMAT", form)
    monkeypatch.setenv("MILLPOND_APP", f"log-{form}")
    system = System(secure_kafka, own_redis, tmp_path)
    system.redis.set("text", "no hash")
    system.redis.set(PAYLOAD, "no number")
    system.redis.set(keys.message_index("in-the-way"), "no zset")
    try:
        await system.start()
        # When many messages are published, and some of them fail
        await system.publish()
        await system.produce_unreadable_records()

        async def stored() -> bool:
            return int(system.redis.zcard(keys.message_index("plain"))) >= PUBLISHES

        await until(stored, "the messages to be stored")
        # and connections break
        system.redis.client_kill_filter(_type="normal", skipme=True)

        async def noticed() -> bool:
            return all(
                "loading the state from the store again" in each.log.read_text()
                for each in system.workers
            )

        await until(noticed, "the workers to log that their store was down")
        await system.end()
        # Then no log has a secret or the payload
        lines = system.lines()
        for secret in (PASSWORD, REDIS_PASSWORD, PAYLOAD):
            assert [line for line in lines if secret in line] == []
        # and the logs are short, but not empty
        assert 5 < len(lines) < LINES_MAX, "\n".join(lines)
        if form == "json":
            objects = [json.loads(line) for line in lines]
            assert {each["process"] for each in objects} == {
                "bridge embedded", "worker sessions", "worker messages", "worker queue",
            }  # fmt: skip
    finally:
        system.kill()
