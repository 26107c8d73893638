"""Servers with redundancy fail one after the other, under load. Nothing acknowledged is lost, and the system recovers."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster

from millpond.pipeline.stack.ports import HOST
from millpond.schemas import keys
from tests.failover.servers import kafka_brokers
from tests.failover.system import running, survive
from tests.support.redis_servers import replicated_cluster, replicated_redis
from tests.support.servers import Server, redis_server

REST_S = 4.0  # under load, between two failures: replicas catch up, clients come back


async def payloads(client: Any, topic: str) -> Counter[str]:
    """What a topic's index refers to. Every body must be there."""
    found: Counter[str] = Counter()
    for message_id in await client.zrange(keys.message_index(topic), 0, -1):
        payload = await client.hget(keys.message_body(message_id.decode()), "payload")
        if payload is None:
            # An acknowledgement may have come in between.
            assert await client.zscore(keys.message_index(topic), message_id) is None, message_id
        else:
            found[payload.decode()] += 1
    return found


async def test_redis_primaries_are_killed_and_hang_under_sentinels(
    own_kafka: Server, tmp_path: Path
) -> None:
    with replicated_redis(tmp_path, sentinels=3, down_after_ms=1_000, appendonly="yes") as redis:
        addresses = ", ".join(f"{HOST}:{each.port}" for each in redis.sentinels)
        pool = f'type = "sentinel"\nserver = "{addresses}"\nsentinel = "mymaster"'

        async def stored(topic: str) -> Counter[str]:
            async with Redis(port=redis.primary.port) as client:
                return await payloads(client, topic)

        async def fail() -> None:
            for how in ("hangs", "is killed", "hangs", "is killed"):
                await asyncio.sleep(REST_S)
                await redis.until_in_sync()
                failed = redis.primary
                if how == "hangs":
                    await asyncio.to_thread(failed.pause)
                else:
                    await asyncio.to_thread(failed.kill)
                await redis.until_promoted(failed)
                await asyncio.sleep(1)
                if how == "hangs":
                    failed.resume()
                else:
                    await asyncio.to_thread(failed.start)

        async with running(tmp_path, [own_kafka.address], pool) as system:
            await survive(system, fail, stored)


async def test_the_shards_of_a_redis_cluster_fail_over_with_lost_writes(
    own_kafka: Server, tmp_path: Path
) -> None:
    with replicated_cluster(tmp_path) as shards:
        nodes = [node for shard in shards for node in (shard.primary, shard.replica)]
        addresses = ", ".join(f"{HOST}:{node.port}" for node in nodes)
        pool = f'type = "cluster"\nserver = "{addresses}"'

        async def stored(topic: str) -> Counter[str]:
            (node, *_) = [each.replica for each in shards]
            async with RedisCluster(startup_nodes=[ClusterNode(HOST, node.port)]) as client:
                return await payloads(client, topic)

        async def fail() -> None:
            for shard in shards:
                await asyncio.sleep(REST_S)
                await asyncio.to_thread(shard.cut)
                await asyncio.sleep(1)
                await asyncio.to_thread(shard.fail_over)
                await asyncio.to_thread(shard.rejoin)

        async with running(tmp_path, [own_kafka.address], pool) as system:
            await survive(system, fail, stored)


async def test_kafka_brokers_are_killed_in_turn(tmp_path: Path) -> None:
    redis = redis_server(tmp_path / "redis").start()

    async def stored(topic: str) -> Counter[str]:
        async with Redis.from_url(redis.address) as client:
            return await payloads(client, topic)

    try:
        with kafka_brokers(tmp_path) as brokers:

            async def fail() -> None:
                for broker in brokers:
                    await asyncio.sleep(REST_S)
                    await asyncio.to_thread(broker.kill)
                    await asyncio.sleep(REST_S)
                    await asyncio.to_thread(broker.start)

            pool = f'server = "{redis.address.removeprefix("redis://")}"'
            addresses = [broker.address for broker in brokers]
            async with running(tmp_path, addresses, pool, replication_factor=3) as system:
                await survive(system, fail, stored, messages=300)
    finally:
        redis.kill()
