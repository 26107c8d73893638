"""The EMQX double with real bridge processes, workers, Kafka and Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from redis.asyncio import Redis

from millpond.pipeline.stack.ports import HOST, free_port
from millpond.schemas import keys
from tests.support.embedded_bridge import make_topics
from tests.support.emqx.broker import MOUNTPOINT, Client, Emqx
from tests.support.emqx.hooks import GrpcHooks
from tests.support.emqx.rest import EmqxRest
from tests.support.workers import PARTITIONS, WAIT_S, Worker, until


class BridgeProcess:
    """One process of the bridge."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log, self._ready = log, log.with_suffix(".ready")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "millpond", "bridge", "emqx", "--config", str(config)],
                stdout=output, stderr=output, env={**os.environ, "MILLPOND_READY_FILE": str(self._ready)},
            )  # fmt: skip

    async def until_ready(self) -> None:
        async def ready() -> bool:
            assert self.process.poll() is None, f"the bridge ended:\n{self.said()}"
            return self._ready.exists()

        await until(ready, "a ready bridge")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, WAIT_S)


class EmqxWorld:
    """One application. `stop` ends its processes."""

    def __init__(
        self,
        app: str,
        bootstrap: str,
        redis_url: str,
        directory: Path,
        spool: Path,
        *rules: str,
        mounted: bool = True,
    ) -> None:
        self.bootstrap, self.directory = bootstrap, directory
        self.redis: Redis = Redis.from_url(redis_url, decode_responses=True)
        self.exhook_port = free_port()
        self.hooks = GrpcHooks(self.exhook_port)
        self.emqx = Emqx(self.hooks)
        self.rest = EmqxRest(self.emqx)
        self.workers: list[Worker] = []
        self.bridges: list[BridgeProcess] = []
        (directory / "api-key").write_text(self.rest.key)
        host, _, database = redis_url.removeprefix("redis://").partition("/")
        self.config = directory / "millpond.toml"
        self.config.write_text(
            f'app = "{app}"\n[kafka]\nbootstrap_servers = ["{bootstrap}"]\npartitions = {PARTITIONS}\n'
            "[worker]\nsession_timeout_s = 6\n"
            f'[bridge]\nkind = "emqx"\nexhook_listen = "{HOST}:{self.exhook_port}"\n'
            f'rest_url = "{self.rest.url}"\napi_key_file = "{directory / "api-key"}"\n'
            + (f'mountpoint = "{MOUNTPOINT}"\n' if mounted else "")
            + f'spool_directory = "{spool}"\n'
            f'[pool.pool1]\nserver = "{host}"\ndatabase = {database or 0}\n' + "".join(rules)
        )

    async def start(self, *agents: str, bridges: int = 1) -> None:
        await make_topics(self.bootstrap)
        await self.redis.flushall()
        await self.rest.start()
        for agent in agents:
            worker = Worker(self.config, self.directory / f"{agent}.log", agent)
            self.workers.append(worker)
        for _ in range(bridges):
            await self.bridge()
        for worker in self.workers:
            await worker.until_ready()
        await self.hooks.load()

    async def bridge(self) -> BridgeProcess:
        """Start one more bridge process."""
        started = BridgeProcess(self.config, self.directory / f"bridge-{time.monotonic_ns()}.log")
        self.bridges.append(started)
        await started.until_ready()
        return started

    async def stop(self) -> None:
        self.emqx.stop()
        for bridge in self.bridges:
            await bridge.end(signal.SIGKILL)
        for worker in self.workers:
            worker.process.kill()
            await worker.ended()
        await self.hooks.close()
        await self.rest.stop()
        await self.redis.aclose()

    # -- what is stored

    async def until_stored(self, topic: str, count: int) -> None:
        async def stored() -> bool:
            return int(await self.redis.zcard(keys.message_index(topic))) == count

        await until(stored, f"{count} stored of {topic!r}")

    async def until_online(self, client_id: str) -> None:
        async def online() -> bool:
            return await self.redis.hget(keys.presence(client_id), "state") == "1"

        await until(online, f"{client_id!r} to be online")

    def check_logs(self) -> None:
        """Check that no bridge process has logged a traceback."""
        for bridge in self.bridges:
            before, found, after = bridge.said().partition("Traceback")
            assert not found, before[-1_000:] + found + after[:3_000]


@contextlib.asynccontextmanager
async def a_world(
    app: str, bootstrap: str, redis_url: str, directory: Path, *rules: str,
    agents: tuple[str, ...], bridges: int = 1, mounted: bool = True,
) -> AsyncIterator[EmqxWorld]:  # fmt: skip
    """A started world. Its spool directory has a short path, because the sockets in it need one."""
    with tempfile.TemporaryDirectory(prefix="mp") as spool:
        world = EmqxWorld(
            app, bootstrap, redis_url, directory, Path(spool), *rules, mounted=mounted
        )
        try:
            await world.start(*agents, bridges=bridges)
            yield world
            world.check_logs()
        finally:
            await world.stop()


def numbered(start: int, stop: int) -> list[bytes]:
    return [str(number).encode() for number in range(start, stop)]


async def publish(client: Client, topic: str, *payloads: bytes) -> None:
    for payload in payloads:
        await client.publish(topic, payload)
