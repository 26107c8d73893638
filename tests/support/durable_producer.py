"""A durable producer under test: in this process, or in a process of its own that a test can kill.

As a program: `python -m tests.support.durable_producer BOOTSTRAP DIRECTORY CLIENT FIRST` enters events with numbers from
FIRST on, as fast as they are stored. It prints the number of each stored event.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path

from millpond.pipeline.brokers.spool.directory import Spool
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import codec, keys
from millpond.schemas.events import MessagePublished
from tests.support.embedded_bridge import MESSAGE_BYTES_MAX, Log

HOOK = "message.publish"
SPOOL_BYTES_MAX = 256 * 1024 * 1024
TOPICS = 5
AT_ONCE = 200  # unstored events of a flood
STOP_S = 5.0


def an_event(topic: str, number: int, size: int = 0) -> MessagePublished:
    payload = f"{number}" + "." * size
    return MessagePublished(
        at=1, node="n", message_id=f"{topic}-{number}", topic=topic, qos=1, retain=False,
        client_id="c", payload=payload, published_at=1,
    )  # fmt: skip


def enter(
    durable_producer: DurableProducer, topic: str, number: int, size: int = 0
) -> asyncio.Future[None]:
    return durable_producer.enter(keys.MESSAGES_TOPIC, an_event(topic, number, size), hook=HOOK)


class Running:
    """A durable producer that runs."""

    def __init__(self, bootstrap: str, directory: Path, bytes_max: int, patience_s: float) -> None:
        self.producer = Producer(
            KafkaSettings(bootstrap_servers=(bootstrap,), message_bytes_max=MESSAGE_BYTES_MAX)
        )
        self.spool = Spool(directory, bytes_max)
        self.spool.open()
        self.durable_producer = DurableProducer(self.producer, self.spool, patience_s)
        self.task = asyncio.create_task(self.durable_producer.run())

    async def end(self, grace_s: float | None = None) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.durable_producer.close(grace_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self.producer.stop()


@contextlib.asynccontextmanager
async def running(
    bootstrap: str, directory: Path, bytes_max: int = SPOOL_BYTES_MAX, patience_s: float = 0.5
) -> AsyncIterator[Running]:
    """A durable producer that runs until the end of the block. Then its events are in Kafka or in the spool."""
    running = Running(bootstrap, directory, bytes_max, patience_s)
    try:
        yield running
    finally:
        await running.end()


def numbers(log: Log, topic: str) -> list[int]:
    """The numbers of the events of a topic, in Kafka's order."""
    return [int(codec.payload_bytes(event).rstrip(b".")) for event in log.published(topic)]


def first_times(found: Iterable[int]) -> list[int]:
    """Without repeats."""
    return list(dict.fromkeys(found))


def topic_of(client: str, number: int) -> str:
    return f"{client}/{number % TOPICS}"


class Process:
    """A process that enters events until it is killed."""

    def __init__(self, bootstrap: str, directory: Path, client: str, first: int) -> None:
        self.answered: list[int] = []
        self._log = (directory.parent / "producer.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.durable_producer", bootstrap, str(directory), client, str(first)],
            stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._reading = asyncio.create_task(asyncio.to_thread(self._read))

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                if line.endswith(b"\n"):
                    self.answered.append(int(line))

    async def kill(self) -> list[int]:
        """kill -9. Returns the numbers of the stored events."""
        self.process.kill()
        await self._reading
        self.process.wait()
        self._log.close()
        return self.answered


async def flood(bootstrap: str, directory: Path, client: str, first: int) -> None:
    async with running(bootstrap, directory) as durable_producer:
        free = asyncio.Semaphore(AT_ONCE)

        def answered(number: int, future: asyncio.Future[None]) -> None:
            free.release()
            if future.exception() is None:
                print(number, flush=True)

        number = first
        while True:
            await free.acquire()
            future = enter(durable_producer.durable_producer, topic_of(client, number), number)
            future.add_done_callback(partial(answered, number))
            number += 1


if __name__ == "__main__":
    bootstrap, directory, client, first = sys.argv[1:]
    asyncio.run(flood(bootstrap, Path(directory), client, int(first)))
