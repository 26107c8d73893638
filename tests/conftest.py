"""Real servers that tests share: each is started once, when a test first asks for it. See `tests/support/servers.py`.

| fixture | scope | gives |
|---|---|---|
| `kafka` | session | bootstrap servers, `HOST:PORT`, of a real Kafka without topics |
| `redis_server` | session | the URL of a real Redis, `redis://HOST:PORT` |
| `redis_cluster` | session | the (host, port) of three real Redis Cluster nodes |
| `app_name` | test | a name for `app` that no other test has |
| `own_kafka`, `own_redis` | test | a `Server` of the test's own, started, to stop, kill, pause and restart |
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import servers
from tests.support.redis_servers import cluster_processes
from tests.support.servers import Server

_app_numbers = count(1)

# Machines are shared: how long an example takes says nothing.
settings.register_profile("shared machines", deadline=None)
settings.load_profile("shared machines")


def _running(server: Server) -> Iterator[Server]:
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of the Kafka that all tests share."""
    for server in _running(servers.kafka_server(tmp_path_factory.mktemp("kafka"))):
        yield server.address


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the Redis that all tests share."""
    for server in _running(servers.redis_server(tmp_path_factory.mktemp("redis"))):
        yield server.address


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, int]]]:
    """Addresses of three nodes that share the slots."""
    with cluster_processes(tmp_path_factory.mktemp("cluster")) as nodes:
        yield [("127.0.0.1", node.port) for node in nodes]


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[Server]:
    """A Kafka that this test may hurt."""
    yield from _running(servers.kafka_server(tmp_path / "kafka"))


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Server]:
    """A Redis that this test may hurt."""
    yield from _running(servers.redis_server(tmp_path / "redis"))


@pytest.fixture
def app_name() -> str:
    """Consumer groups and private keys of one test are nobody else's."""
    return f"test-{next(_app_numbers)}"
