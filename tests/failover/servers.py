"""Servers with redundancy: three Kafka brokers, a Redis with its replica and Sentinels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.stack.servers import kafka_answers
from tests.support.redis_servers import RedisProcess, redis_process, until
from tests.support.servers import KAFKA_HEAP_MIB, Server

BROKERS = 3
SENTINELS = 3
CLUSTER_ID = "millpond-test-failover"


def _broker(directory: Path, number: int, ports: list[int], controllers: list[int]) -> Server:
    voters = ",".join(f"{at}@{HOST}:{port}" for at, port in enumerate(controllers, start=1))
    overrides = {
        "node.id": str(number + 1),
        "controller.quorum.voters": voters,
        "offsets.topic.replication.factor": str(BROKERS),
        "default.replication.factor": str(BROKERS),
        # A broker that was killed is noticed sooner, so that the tests take less time.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
    }
    server = KafkaServer(
        directory, ports[number], controllers[number], overrides, KAFKA_HEAP_MIB, CLUSTER_ID
    )
    address = f"{HOST}:{ports[number]}"
    asked = KafkaSettings(bootstrap_servers=(address,))
    return Server(address, directory, server.prepare, lambda: kafka_answers(asked))


@contextmanager
def kafka_brokers(directory: Path) -> Iterator[list[Server]]:
    """Run three brokers during the block."""
    ports = [free_port() for _ in range(BROKERS)]
    controllers = [free_port() for _ in range(BROKERS)]
    brokers = [
        _broker(directory / f"kafka-{number}", number, ports, controllers)
        for number in range(BROKERS)
    ]
    try:
        # Together: a broker answers when most of the controllers run.
        with ThreadPoolExecutor() as threads:
            list(threads.map(Server.start, brokers))
        yield brokers
    finally:
        for broker in brokers:
            broker.kill()


class Replicated:
    """A Redis primary, its replica, and Sentinels that promote the replica."""

    def __init__(self, nodes: list[RedisProcess], sentinels: list[RedisProcess]) -> None:
        self.nodes, self.sentinels = nodes, sentinels

    @property
    def primary(self) -> RedisProcess:
        """The node that the Sentinels name."""
        _, port = self.sentinels[0].client.sentinel_get_master_addr_by_name("mymaster")
        (node,) = [node for node in self.nodes if node.port == int(port)]
        return node

    async def until_promoted(self, failed: RedisProcess) -> None:
        """Wait until another node is the primary."""

        def promoted() -> bool:
            return self.primary is not failed and self.primary.client.role()[0] == b"master"

        await asyncio.to_thread(until, promoted, "another primary")

    async def until_in_sync(self) -> None:
        """Wait until the primary has a replica again."""

        def in_sync() -> bool:
            return bool(self.primary.client.info("replication")["connected_slaves"])

        await asyncio.to_thread(until, in_sync, "a replica")


@contextmanager
def replicated_redis(directory: Path) -> Iterator[Replicated]:
    """Run a primary, a replica and three Sentinels during the block."""
    with ExitStack() as stack:

        def a_process(name: str, **how: object) -> RedisProcess:
            return stack.enter_context(redis_process(directory / name, **how))

        first = a_process("first", repl_diskless_sync_delay=0, appendonly="yes")
        second = a_process(
            "second", replicaof=f"{HOST} {first.port}", repl_diskless_sync_delay=0,
            appendonly="yes",
        )  # fmt: skip
        config = (
            f"sentinel monitor mymaster {HOST} {first.port} 2\n"
            "sentinel down-after-milliseconds mymaster 1000\n"
            "sentinel failover-timeout mymaster 5000\n"
        )
        sentinels = [
            a_process(f"sentinel-{number}", sentinel=config) for number in range(SENTINELS)
        ]
        for sentinel in sentinels:
            until(lambda s=sentinel: _knows_all(s), "the Sentinels know each other")  # type: ignore[misc]
        yield Replicated([first, second], sentinels)


def _knows_all(sentinel: RedisProcess) -> bool:
    state = sentinel.client.sentinel_master("mymaster")
    return bool(state["num-other-sentinels"] == SENTINELS - 1 and state["num-slaves"] == 1)
