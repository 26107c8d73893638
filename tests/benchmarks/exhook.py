"""Hook calls of an EMQX: how many a bridge process answers, and how long a publish waits for its answer.

The caller is a process of its own on the same machine, which takes about as much of it as the bridge does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import grpc
import psutil
import uvloop

from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.stack.ports import HOST, free_port
from tests.benchmarks import scene
from tests.benchmarks.events import PAYLOAD
from tests.benchmarks.latency import Latency
from tests.benchmarks.neighbours import undisturbed
from tests.benchmarks.table import Row, least_row, most_row, progress, thousands
from tests.support.emqx.trace import a_client, a_message, path
from tests.support.exhook_server import unary

CONNECTIONS: Final = 8  # EMQX's pool_size
CLIENTS: Final = 128  # of which each waits for its answer
TOPICS: Final = 1_000
CALLS: Final = 60_000
WARM_UP_CALLS: Final = 10_000
RATE: Final = 1_000  # publishes a second
WARM_UP_S: Final = 5.0
READY_S: Final = 60.0


CALLS_LEAST: Final = 3_000  # per second
P99_MS_MOST: Final = 20


class Answered(NamedTuple):
    """Hook calls per second, and the cores that the bridge process used meanwhile."""

    rate: float
    cores: float


def rate() -> Answered:
    """Every client publishes and acknowledges in turn, as fast as it is answered."""
    with _server() as (address, process):
        _apart(_call, address, WARM_UP_CALLS)
        before = sum(process.cpu_times()[:2])
        seconds = _apart(_call, address, CALLS)
        used = sum(process.cpu_times()[:2]) - before
        return Answered(CALLS / seconds, used / seconds)


def latency(seconds: float) -> Latency:
    """Publishes, each at its own moment, whatever became of those before."""
    with _server() as (address, _):
        ms: list[float] = _apart(_publish, address, int(RATE * (WARM_UP_S + seconds)))
    counted = ms[int(RATE * WARM_UP_S) :]
    percentiles = quantiles(counted, n=100)
    return Latency(percentiles[49], percentiles[98], len(counted))


def rate_rows(rounds: int) -> list[Row]:
    """Calls per second."""
    found = [undisturbed(rate, _tell_rate)[0] for _ in range(rounds)]
    cores = median(each.cores for each in found)
    what = f"ExHook: calls a second, the bridge on {cores:.2f} cores"
    return [least_row(what, [each.rate for each in found], CALLS_LEAST)]


def latency_rows(seconds: float) -> list[Row]:
    """From OnMessagePublish to its answer, when Kafka has the event."""
    found, _ = undisturbed(partial(latency, seconds), _tell_latency)
    what, of = f"ExHook: publish to answer, {RATE}/s", f"of {found.messages:,} publishes"
    return [
        most_row(f"{what}, p50", of, found.p50, 10, "ms"),
        most_row(f"{what}, p99", of, found.p99, P99_MS_MOST, "ms"),
    ]


def _tell_rate(found: Answered, others: float) -> None:
    figures = f"{thousands(found.rate)}, the bridge on {found.cores:.2f} cores"
    progress(f"hooks: {figures}; others used {others:.1f} cores")


def _tell_latency(found: Latency, others: float) -> None:
    figures = f"p50 {found.p50:.1f} ms, p99 {found.p99:.1f} ms"
    progress(f"hooks: {figures}; others used {others:.1f} cores")


@contextlib.contextmanager
def _server() -> Iterator[tuple[str, psutil.Process]]:
    with TemporaryDirectory() as name, scene.kafka(Path(name) / "kafka") as settings:
        address = f"{HOST}:{free_port()}"
        module = "tests.benchmarks.hook_server"
        bootstrap, partitions = settings.bootstrap_servers[0], str(settings.partitions)
        root = str(Path(__file__).parents[2])
        process = scene.Process(
            "hooks", [sys.executable, "-m", module, bootstrap, partitions, address],
            {"BENCH_DIRECTORY": name, "PYTHONPATH": root},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + READY_S
            while not process.ready_file.exists():
                process.check()
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.05)
            yield address, psutil.Process(process.pid)
            process.check()
        finally:
            process.kill()


def _apart(work: Callable[..., Any], address: str, count: int) -> Any:
    """What a process of its own finds."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_run, work, address, count).result()


def _run(work: Callable[..., Any], address: str, count: int) -> Any:
    return uvloop.run(work(address, count))


@contextlib.asynccontextmanager
async def _connections(address: str) -> Any:
    channels = [
        grpc.aio.insecure_channel(address, options=[("connection", number)])
        for number in range(CONNECTIONS)
    ]
    yield channels
    for channel in channels:
        await channel.close()


def _requests(number: int) -> tuple[bytes, bytes]:
    """A publish, and its acknowledgement."""
    publisher, subscriber = f"pub-{number % CLIENTS}", f"sub-{number % CLIENTS}"
    headers = {"username": "u", "peerhost": "192.0.2.7", "protocol": "mqtt"}
    message = a_message(
        f"queue/device-{number % TOPICS:07d}/state", f"{number:032X}", from_client_id=publisher,
        payload=PAYLOAD.encode(), headers=headers, timestamp=int(time.time() * 1_000),
    )  # fmt: skip
    acked = pb.MessageAckedRequest(clientinfo=a_client(subscriber), message=message)
    published = pb.MessagePublishRequest(message=message)
    return published.SerializeToString(), acked.SerializeToString()


async def _call(address: str, calls: int) -> float:
    """The seconds that so many calls take."""
    numbers = iter(range(calls // 2))
    requests = [_requests(number) for number in range(calls // 2)]

    async def client(channel: grpc.aio.Channel) -> None:
        publish = unary(channel, path("v2", "OnMessagePublish"))
        acked = unary(channel, path("v2", "OnMessageAcked"))
        for number in numbers:
            published, acknowledged = requests[number]
            await publish(published)
            await acked(acknowledged)

    async with _connections(address) as channels:
        started = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for _, channel in zip(range(CLIENTS), itertools.cycle(channels), strict=False):
                tasks.create_task(client(channel))
        return time.monotonic() - started


async def _publish(address: str, publishes: int) -> list[float]:
    """Milliseconds of each, in order."""
    loop = asyncio.get_running_loop()
    ms = [0.0] * publishes

    async def one(publish: Callable[..., Any], number: int, due: float) -> None:
        await publish(_requests(number)[0])
        ms[number] = (loop.time() - due) * 1_000

    async with _connections(address) as channels, asyncio.TaskGroup() as tasks:
        methods = [unary(channel, path("v2", "OnMessagePublish")) for channel in channels]
        started = loop.time() + 0.5
        for number in range(publishes):
            due = started + number / RATE
            await asyncio.sleep(due - loop.time())
            tasks.create_task(one(methods[number % CONNECTIONS], number, due))
    return ms
