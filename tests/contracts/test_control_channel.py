"""The control channel against servers that hang, are replaced, or forbid the channel: it is never deaf without a sign."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.worker import control_channel
from millpond.pipeline.worker.control_channel import ControlChannel
from millpond.schemas.rules.pool import Pool
from tests.support.redis_servers import (
    RedisProcess,
    cluster_processes,
    redis_process,
    replicated_redis,
)

HOST = "127.0.0.1"
CHANNEL = "mqtt_channel"
ORDER = json.dumps({"type": "subscribe", "topic": "t", "clientid": "c"})
WAIT_S = 20.0


class Sent:
    """Stands for the producer: records what was produced."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    async def send(self, *record: Any) -> asyncio.Future[None]:
        self.records.append(record)
        acknowledged = asyncio.get_running_loop().create_future()
        acknowledged.set_result(None)
        return acknowledged


@pytest.fixture(autouse=True)
def _short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_channel, "SILENCE_MAX_S", 0.3)


@asynccontextmanager
async def listening(pool: Pool) -> AsyncIterator[Sent]:
    sent = Sent()
    channel = ControlChannel(pool, cast(Producer, sent), 1, lambda: {0}, lambda _: None)
    task = asyncio.create_task(channel.run())
    try:
        yield sent
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def heard_at(server: RedisProcess, sent: Sent) -> None:
    """Publish an order at a server until it is heard."""
    before = len(sent.records)
    async with asyncio.timeout(WAIT_S):
        while len(sent.records) == before:
            server.client.publish(CHANNEL, ORDER)
            await asyncio.sleep(0.05)


class DeafProxy:
    """A proxy that keeps its clients' connections when it has lost its server."""

    def __init__(self, port: int) -> None:
        self._upstream, self.lost = port, False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.lost:
            writer.close()
            return
        server = await asyncio.open_connection(HOST, self._upstream)
        await asyncio.gather(self._copy(reader, server[1]), self._copy(server[0], writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if not self.lost:
                writer.write(data)


async def test_a_connection_behind_a_proxy_that_lost_its_server_is_given_up(
    single_redis: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    proxy = DeafProxy(single_redis.port)
    server = await asyncio.start_server(proxy.serve, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    async with listening(Pool(name="p", servers=((HOST, port),))) as sent:
        await heard_at(single_redis, sent)
        proxy.lost = True
        async with asyncio.timeout(WAIT_S):
            while "does not answer" not in caplog.text:
                await asyncio.sleep(0.05)
        proxy.lost = False
        await heard_at(single_redis, sent)
    server.close()
    assert caplog.text.count("listening again") == 1


async def test_a_primary_that_hangs_is_left_for_the_one_that_the_sentinels_promote(
    tmp_path: Path,
) -> None:
    with replicated_redis(tmp_path) as redis:
        (first, second), (sentinel,) = redis.nodes, redis.sentinels
        servers = ((HOST, 1), (HOST, sentinel.port))
        pool = Pool(name="p", type="sentinel", servers=servers, sentinel="mymaster")
        async with listening(pool) as sent:
            await heard_at(first, sent)
            first.pause()
            await heard_at(second, sent)
            first.resume()


async def test_a_cluster_is_heard_while_the_node_that_is_named_first_is_down(
    tmp_path: Path,
) -> None:
    with cluster_processes(tmp_path) as nodes:
        servers = tuple((HOST, node.port) for node in nodes)
        async with listening(Pool(name="p", type="cluster", servers=servers)) as sent:
            await heard_at(nodes[1], sent)
            nodes[0].kill()
            await heard_at(nodes[1], sent)


async def test_a_user_who_may_not_use_the_channel_is_named_once_with_what_to_grant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with redis_process(tmp_path) as server:
        server.client.acl_setuser(
            "worker", enabled=True, passwords="+secret", keys=["*"], commands=["+@all"],
            reset_channels=True,
        )  # fmt: skip
        pool = Pool(name="p", servers=((HOST, server.port),), username="worker", password="secret")
        async with listening(pool) as sent:
            await asyncio.sleep(2)
            warnings = [each for each in caplog.messages if CHANNEL in each]
            assert len(warnings) == 1
            assert f"ACL SETUSER worker +subscribe +ping &{CHANNEL}" in warnings[0]
            connections = server.client.info("stats")["total_connections_received"]
            assert connections < 12
            server.client.execute_command("ACL", "SETUSER", "worker", f"&{CHANNEL}")
            await heard_at(server, sent)
        assert caplog.messages[-1].endswith("listening again")
