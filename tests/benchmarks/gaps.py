"""What an event costs while a client holds a message and acknowledges those behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from millpond.schemas import keys
from millpond.schemas.events import (
    AgentName,
    DeliveriesSent,
    Event,
    MessageAcked,
    MessagePublished,
    Sent,
    SubscriberJoined,
)
from millpond.schemas.keys import Partition
from millpond.schemas.leases import lease_name
from tests.benchmarks import scene
from tests.benchmarks.events import FIRST_MS, PAYLOAD, fill
from tests.benchmarks.progress import until_applied
from tests.benchmarks.pubsubs import NODE, PATIENT, processor_s
from tests.support import given

APP: Final = "bench-gap"
TOPIC: Final = "bench/device/news"
CLIENT: Final = "reader"
AT_ONCE: Final = 100  # messages between their publishes, the report and the acknowledgements
RULES: Final = given.queue("queue/#", max_inflight=1_000) + given.pubsub(
    "pubsub/#", max_inflight=1_000
)


class Reading:
    """The log of one client that reads one topic, in partition 0."""

    def __init__(self, agent: AgentName) -> None:
        self._partition, self._topic = Partition(APP, agent, 0), f"{agent}/{TOPIC}"
        self._published = self._leased = 0

    def joined(self) -> Event:
        return SubscriberJoined(
            at=FIRST_MS, node=NODE, client_id=CLIENT, topic_filter=self._topic, qos=1, session=1,
            source_offset=1, subscribed_at=FIRST_MS,
        )  # fmt: skip

    def read(self, messages: int, *, acknowledge: bool = True) -> Iterator[tuple[int, Event]]:
        """Publish messages, report them as sent, and acknowledge them. Which leases they get is known beforehand."""
        for first in range(0, messages, AT_ONCE):
            ids = [self._next_id() for _ in range(min(AT_ONCE, messages - first))]
            for message_id in ids:
                yield 0, MessagePublished(
                    at=FIRST_MS, node=NODE, message_id=message_id, topic=self._topic, qos=1,
                    retain=False, client_id="device", payload=PAYLOAD, published_at=FIRST_MS,
                )  # fmt: skip
            sent = tuple(Sent(self._next_lease(), CLIENT, message_id) for message_id in ids)
            yield 0, DeliveriesSent(at=FIRST_MS, node=NODE, agent=self._partition.agent, sent=sent)
            for message_id in ids if acknowledge else ():
                yield 0, MessageAcked(
                    at=FIRST_MS, node=NODE, message_id=message_id, topic=self._topic,
                    client_id=CLIENT, qos=1,
                )  # fmt: skip

    def _next_id(self) -> str:
        self._published += 1
        return f"{self._published:032x}"

    def _next_lease(self) -> str:
        self._leased += 1
        return lease_name(self._partition, self._leased)


def cost(agent: AgentName, gap: int, messages: int) -> float:
    """Return what an event costs in µs of the worker's and Redis' processor time, behind so many messages that are done
    ahead of a held one. Without a gap nothing is held.
    """
    with (
        TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
        scene.redis(Path(name) / "redis") as redis,
    ):
        reading = Reading(agent)
        before: list[tuple[int, Event]] = [(0, reading.joined())]
        before += reading.read(1 if gap else 0, acknowledge=False)
        before += reading.read(gap)
        measured = list(reading.read(messages))
        address = settings.bootstrap_servers[0]
        asyncio.run(fill(address, keys.MESSAGES_TOPIC, before))
        scene.configure(Path(name), APP, settings, scene.address(redis), more=PATIENT, rules=RULES)
        process = scene.millpond("worker", "worker", agent, directory=Path(name))
        try:
            until_applied(process, redis, APP, agent, len(before))
            with process.paused():
                asyncio.run(fill(address, keys.MESSAGES_TOPIC, measured))
            spent = processor_s(process, redis)
            _, last = until_applied(process, redis, APP, agent, len(before) + len(measured))
            spent = processor_s(process, redis) - spent
        finally:
            process.kill()
    return spent / (last - len(before)) * 1e6
