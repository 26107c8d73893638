"""A complete system under test: a real bridge, real workers, and MQTT clients that record all messages."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from aiokafka import AIOKafkaProducer
from redis import Redis

from millpond.pipeline.stack.ports import free_port
from millpond.schemas import keys
from millpond.schemas.events import Event
from tests.support import given
from tests.support.embedded_bridge import Bridge, make_topics
from tests.support.mqtt import (
    PUBACK,
    PUBLISH,
    SUBACK,
    UNSUBACK,
    Client,
    Packet,
    a_publish,
    delivered,
    packet,
    text,
)
from tests.support.replays import check_replay
from tests.support.workers import PARTITIONS, WAIT_S, Worker, until

KILLED = -signal.SIGKILL
PUBLISH_WINDOW = 100  # unacknowledged messages of one publisher
_numbers = count(1)


class World:
    """One application with empty topics, an empty Redis, a bridge and workers."""

    def __init__(
        self, app: str, bootstrap: str, redis_url: str, directory: Path, *rules: str
    ) -> None:
        self.app, self.bootstrap, self.directory, self._rules = app, bootstrap, directory, rules
        self.redis: Redis = Redis.from_url(redis_url, decode_responses=True)
        self.workers: list[Worker] = []
        self.port = free_port()
        self.bridge: Bridge
        self._bridges = 0
        host, _, database = redis_url.removeprefix("redis://").partition("/")
        (directory / "millpond.toml").write_text(
            f'app = "{app}"\n[kafka]\nbootstrap_servers = ["{bootstrap}"]\npartitions = {PARTITIONS}\n'
            "[worker]\nsession_timeout_s = 6\n"
            f'[pool.pool1]\nserver = "{host}"\ndatabase = {database or 0}\n' + "".join(rules)
        )

    async def start(self, *agents: str) -> World:
        """Start the bridge and one worker of each of these agents."""
        await make_topics(self.bootstrap)
        self.redis.flushall()
        self._start_bridge()
        await asyncio.gather(*(self.worker(agent) for agent in agents))
        await asyncio.to_thread(self.bridge.until_ready)
        return self

    def _start_bridge(self) -> None:
        self._bridges += 1
        directory = self.directory / f"bridge-{self._bridges}"
        self.bridge = Bridge(
            self.bootstrap, directory, *self._rules, port=self.port, app=self.app
        )  # fmt: skip

    async def worker(self, agent: str) -> Worker:
        """Start one more worker, and wait until it is ready."""
        log = self.directory / f"{agent}-{len(self.workers)}.log"
        worker = Worker(self.directory / "millpond.toml", log, agent)
        self.workers.append(worker)
        await worker.until_ready()
        return worker

    def workers_of(self, agent: str) -> list[Worker]:
        """The running workers of an agent."""
        return [
            each for each in self.workers
            if each.log.name.startswith(f"{agent}-") and each.process.poll() is None
        ]  # fmt: skip

    async def kill_worker(self, agent: str) -> None:
        """Kill the first worker of an agent with SIGKILL."""
        worker = self.workers_of(agent)[0]
        worker.signal(signal.SIGKILL)
        await worker.ended()

    async def kill_bridge(self) -> None:
        """Kill the bridge with SIGKILL, and start another one on the same port."""
        self.bridge.kill()
        self._start_bridge()
        await asyncio.to_thread(self.bridge.until_ready)

    async def tell(self, *events: Event) -> None:
        """Produce these events, and wait for Kafka's acknowledgements."""
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap) as producer:
            for event in events:
                key, value = given.key_and_value(event)
                await producer.send_and_wait(keys.MESSAGES_TOPIC, key=key, value=value)

    def stored(self, *topics: str) -> int:
        """The number of messages of these topics in Redis."""
        return sum(int(self.redis.zcard(keys.message_index(topic))) for topic in topics)

    async def until_stored(self, number: int, *topics: str) -> None:
        async def so_many() -> bool:
            return self.stored(*topics) == number

        await until(so_many, f"{number} stored messages of {topics}")

    async def until_nothing_is_left(self, *topics: str) -> None:
        """Wait until Redis has no index entry and no body of these topics."""

        async def empty() -> bool:
            return not self.stored(*topics) and not self.bodies(*topics)

        await until(empty, f"no stored message of {topics}")

    def bodies(self, *topics: str) -> list[str]:
        """The payloads of all messages of these topics in Redis."""
        found = []
        for key in self.redis.scan_iter("mqtt:msg:*", count=1_000, _type="HASH"):
            topic, payload = self.redis.hmget(key, ["topic", "payload"])
            if topic in topics:
                found.append(str(payload))
        return found

    def complaints(self) -> list[str]:
        """The logs with a traceback, and of workers that ended without being killed."""
        logs = [*self.directory.glob("*.log"), *self.directory.glob("bridge-*/bridge.log")]
        ended = {each.log for each in self.workers if each.process.poll() not in (None, KILLED)}
        return [
            f"{log}:\n{said[:3_000]}\n…\n{said[-3_000:]}"
            for log in logs
            for said in [log.read_text(errors="replace")]
            if log in ended or "Traceback" in said
        ]

    def stop(self) -> None:
        self.bridge.let_go()
        self.bridge.kill()
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait(WAIT_S)
        self.redis.close()


def running(
    app: str, bootstrap: str, redis_url: str, directory: Path, rules: Sequence[str], *agents: str
) -> Iterator[World]:
    """Run a world. At the end no process may have failed, and a replay must give the same Redis."""
    world = World(app, bootstrap, redis_url, directory, *rules)
    try:
        yield asyncio.run(world.start(*agents))
        assert not world.complaints(), "\n".join(world.complaints())
        asyncio.run(check_replay(directory / "millpond.toml", redis_url))
    finally:
        world.stop()


class Got(NamedTuple):
    """One received copy. `at` numbers the copies of all consumers in this process."""

    at: int
    topic: str
    payload: str
    qos: int
    packet_id: int
    repeated: bool


class Consumer:
    """A client that records each copy, and acknowledges it unless `acks` is False."""

    def __init__(
        self, world: World, client_id: str, *filters: str,
        qos: int = 1, clean: bool = True, acks: bool = True,
    ) -> None:  # fmt: skip
        self.world, self.client_id, self.filters = world, client_id, filters
        self.qos, self.clean, self.acks = qos, clean, acks
        self.got: list[Got] = []
        self.acked: list[str] = []
        self.online = False
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()

    async def come(self, *, subscribe: bool = True) -> Consumer:
        """Connect as soon as the broker listens, and subscribe unless the session was resumed."""
        deadline = time.monotonic() + WAIT_S
        while not await self._connect(subscribe=subscribe):
            assert time.monotonic() < deadline, f"{self.client_id} cannot connect"
            await asyncio.sleep(0.1)
        return self

    async def _connect(self, *, subscribe: bool) -> bool:
        try:
            client = await Client.open(self.world.port)
            await client.connect(self.client_id, clean=self.clean)
        except ConnectionError:
            return False
        self._client, self.online = client, True
        self._task = asyncio.create_task(self._read(client))
        return not subscribe or client.session_present or await self.subscribe()

    async def subscribe(self) -> bool:
        """Subscribe to all filters. True if the broker answered before the connection ended."""
        fields = b"".join(text(each) + bytes((self.qos,)) for each in self.filters)
        return await self._ask(8, fields)

    async def unsubscribe(self, *filters: str) -> None:
        assert await self._ask(10, b"".join(map(text, filters)))

    async def _ask(self, kind: int, fields: bytes) -> bool:
        """Send a request. True if the broker answered before the connection ended."""
        assert self._client is not None
        self._answered.clear()
        self._client.send(packet(kind, 2, b"\0\7" + fields))
        await self._answered.wait()
        return self.online

    async def _read(self, client: Client) -> None:
        try:
            while (came := await _take(client)) is not None:
                if came.kind in (SUBACK, UNSUBACK):
                    self._answered.set()
                elif came.kind == PUBLISH:
                    self._take(client, came)
        finally:
            if client is self._client:
                self.online = False
                self._answered.set()

    def _take(self, client: Client, came: Packet) -> None:
        topic, payload, qos, packet_id = delivered(came)
        repeated = bool(came.flags & 8)
        got = Got(next(_numbers), topic, payload.decode(), qos, packet_id, repeated)
        self.got.append(got)
        if self.acks and qos:
            self._ack(client, got)

    def ack(self, *copies: Got) -> None:
        """Acknowledge copies that arrived on this connection."""
        assert self._client is not None
        for got in copies:
            self._ack(self._client, got)

    def _ack(self, client: Client, got: Got) -> None:
        self.acked.append(got.payload)
        client.answer(PUBACK, got.packet_id)

    def payloads(self, topic: str | None = None) -> list[str]:
        return [got.payload for got in self.got if topic in (None, got.topic)]

    async def until_got(self, number: int) -> list[Got]:
        """Wait for at least `number` copies."""

        async def so_many() -> bool:
            return len(self.got) >= number

        await until(so_many, f"{number} copies for {self.client_id}, which has {len(self.got)}")
        return self.got

    async def leave(self) -> None:
        """Disconnect with a DISCONNECT packet."""
        if self._client is not None and self.online:
            self._client.send(packet(14, 0, b""))
            await self._gone()

    async def vanish(self) -> None:
        """Reset the connection, like a killed client."""
        if self._client is not None:
            self._client.vanish()
            await self._gone()

    async def _gone(self) -> None:
        assert self._task is not None
        await self._task
        assert self._client is not None
        self._client.vanish()


async def _take(client: Client) -> Packet | None:
    """Wait for the next packet. None if the connection has ended."""
    while True:
        with suppress(TimeoutError):
            return await client.take()


class Publisher:
    """A client that publishes at QoS 1. After a broken connection it publishes unacknowledged messages again."""

    def __init__(self, world: World, client_id: str, *, rate_max: float = 1e6) -> None:
        """`rate_max` is in messages a second."""
        self.world, self.client_id, self._pause_s = world, client_id, 1 / rate_max
        self.acknowledged: dict[str, None] = {}  # payloads, in the order of their acknowledgement
        self.sent: Counter[str] = Counter()  # how often each payload

    async def publish(self, messages: Iterable[tuple[str, str]]) -> None:
        """Publish these topics and payloads in order, until all are acknowledged."""
        left = dict(enumerate(messages))
        deadline = time.monotonic() + 4 * WAIT_S
        while left:
            assert time.monotonic() < deadline, f"{len(left)} are not acknowledged"
            try:
                client = await Client.open(self.world.port)
                await client.connect(self.client_id)
            except ConnectionError:
                await asyncio.sleep(0.1)
                continue
            await self._over(client, left)
            client.vanish()

    async def _over(self, client: Client, left: dict[int, tuple[str, str]]) -> None:
        """Publish over one connection, until it ends or all messages were sent."""
        room = asyncio.Semaphore(PUBLISH_WINDOW)
        reading = asyncio.create_task(self._acknowledgements(client, left, room))
        for number, (topic, payload) in list(left.items()):
            await room.acquire()
            if reading.done():
                break
            self.sent[payload] += 1
            client.send(a_publish(topic, payload.encode(), 1, number % 65_535 + 1))
            await asyncio.sleep(self._pause_s)
        await reading

    async def _acknowledgements(
        self, client: Client, left: dict[int, tuple[str, str]], room: asyncio.Semaphore
    ) -> None:
        numbers = {number % 65_535 + 1: number for number in left}
        while left and (came := await _take(client)) is not None:
            assert came.kind == PUBACK, came
            _, payload = left.pop(numbers[came.packet_id])
            self.acknowledged[payload] = None
            room.release()
        # The publishing task may wait for room. It must see that the connection has ended.
        room.release()


async def publish(world: World, topic: str, *payloads: str, qos: int = 1) -> None:
    """Publish these payloads. At QoS 1, wait until all are acknowledged."""
    client = await Client.open(world.port)
    await client.connect(f"publisher-{next(_numbers)}")
    for packet_id, payload in enumerate(payloads, start=1):
        client.publish(topic, payload.encode(), qos, packet_id)
    if qos:
        assert len(await client.acknowledged(len(payloads))) == len(payloads)
    await client.disconnect()


def numbered(first: int, number: int) -> list[str]:
    """Return `number` payloads: the numbers from `first` on."""
    return [str(each) for each in range(first, first + number)]
