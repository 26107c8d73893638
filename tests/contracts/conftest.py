"""Servers that the store contracts share: started once, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contracts.store_worlds import ClusterWorld, MemoryWorld, RedisWorld, World
from tests.support.redis_servers import RedisProcess, cluster_processes, redis_process


@pytest.fixture(scope="session")
def single_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One server."""
    with redis_process(tmp_path_factory.mktemp("redis")) as process:
        yield process


@pytest.fixture(scope="session")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisProcess]]:
    """A cluster of three."""
    with cluster_processes(tmp_path_factory.mktemp("cluster")) as processes:
        yield processes


@pytest.fixture(params=["memory", "redis", "cluster"])
def world(request: pytest.FixtureRequest) -> World:
    """Every kind of store in turn, empty."""
    found: World
    match request.param:
        case "memory":
            return MemoryWorld()
        case "redis":
            found = RedisWorld(request.getfixturevalue("single_redis"))
        case _:
            found = ClusterWorld(request.getfixturevalue("three_nodes"))
    found.clear()
    return found
