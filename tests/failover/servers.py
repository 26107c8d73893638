"""Three Kafka brokers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from millpond.pipeline.settings import KafkaSettings
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.stack.servers import kafka_answers
from tests.support.servers import KAFKA_HEAP_MIB, Server

BROKERS = 3
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
