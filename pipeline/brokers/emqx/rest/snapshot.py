"""Snapshots: everything connected and subscribed at EMQX, as its REST API lists it. They correct missed events.

The events of a snapshot stand between `node.sync.started` and `node.sync.completed` of each running node, in every
partition of `mqtt.clients`. When the sessions agent reads `completed`, it closes what the snapshot did not contain.
A snapshot that fails in the middle is never completed, so the agent closes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Final, NoReturn, TypeVar
from uuid import uuid4

from millpond.pipeline.brokers.emqx.exhook.translation import Translator
from millpond.pipeline.brokers.emqx.rest.backoff import Backoff
from millpond.pipeline.brokers.emqx.rest.client import RestClient, Unanswered
from millpond.pipeline.brokers.emqx.rest.responses import ClientRow, SubscriptionRow
from millpond.pipeline.brokers.emqx.times import milliseconds
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.clock import now_ms
from millpond.schemas import keys
from millpond.schemas.errors import DecodeError, MillpondError
from millpond.schemas.events import (
    ClientConnected,
    Event,
    NodeSyncCompleted,
    NodeSyncStarted,
    SessionSubscribed,
)

logger = logging.getLogger(__name__)

HOOK: Final = "snapshot"  # the hook under which its events are counted
# If rows before a page disappear while it is read, the list misses a row. So a longer list is read until it shows
# nothing new, but at most this often.
READS_MAX: Final = 3
EXPIRY_S_MAX: Final = 0xFFFF_FFFF  # [MQTT5-3.1.2-11.2]: never
PAUSE_S: Final = 1.0  # between two snapshots, at least

Row = TypeVar("Row", ClientRow, SubscriptionRow)


class Snapshots:
    """One in the first process of a bridge."""

    def __init__(
        self,
        rest: RestClient,
        durable_producer: DurableProducer,
        translator: Translator,
        partitions: int,
        interval_s: float,
    ) -> None:
        """`partitions` is the number of partitions of each Kafka topic: node events go to each of them."""
        self._rest, self._durable_producer, self._translator = rest, durable_producer, translator
        self._partitions, self._interval_s = partitions, interval_s
        self._wanted = asyncio.Event()
        self._backoff = Backoff()

    def want(self) -> None:
        """Request a snapshot, because events of the hooks may be missing."""
        self._wanted.set()

    async def run(self) -> NoReturn:
        """Take a snapshot at once, on request, and after each interval, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._wanted.clear()
            try:
                await self.take()
            except MillpondError as error:
                if self._backoff.failed(str(error), loop.time(), random.random()):  # noqa: S311  spreads attempts
                    logger.warning(
                        "a snapshot failed, presence is not corrected; the bridge retries: %s",
                        error,
                    )
                await asyncio.sleep(max(PAUSE_S, self._backoff.wait_s(loop.time())))
                continue
            if self._backoff.succeeded():
                logger.warning("a snapshot succeeded again: presence is corrected")
            await asyncio.sleep(PAUSE_S)
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def take(self) -> None:
        """Take one snapshot.

        Raises:
            RestError: EMQX does not answer, or refuses.
            NotStored: an event cannot be stored.
        """
        nodes = [node.node for node in await self._rest.nodes() if node.running]
        if not nodes:
            raise Unanswered("EMQX lists no running node")
        sync_id = uuid4().hex
        await self._to_all(
            NodeSyncStarted(at=now_ms(), node=node, sync_id=sync_id) for node in nodes
        )
        mountpoints: dict[str, tuple[str, str]] = {}  # client → node, mountpoint
        async for clients in _all_rows(self._rest.clients, lambda row: row.clientid):
            await self._store(self._of_clients(clients, nodes[0], mountpoints))
        async for subscriptions in _all_rows(
            self._rest.subscriptions, lambda row: (row.clientid, row.topic)
        ):
            await self._store(self._of_subscriptions(subscriptions, mountpoints))
        await self._to_all(
            NodeSyncCompleted(at=now_ms(), node=node, sync_id=sync_id) for node in nodes
        )

    def _of_clients(
        self, rows: Sequence[ClientRow], anywhere: str, mountpoints: dict[str, tuple[str, str]]
    ) -> list[Event]:
        """The events of connected clients. Note node and mountpoint of every client with a session.

        A session without a connection appears through its subscriptions. A durable session belongs to no node; its
        events name the node `anywhere`.
        """
        events: list[Event] = []
        for row in rows:
            if row.is_expired:
                continue
            node = row.node or anywhere
            mountpoints[row.clientid] = node, row.mountpoint or ""
            if row.connected:
                at = now_ms()
                connected_at = milliseconds(row.connected_at)
                events.append(
                    ClientConnected(
                        at=at, node=node, client_id=row.clientid, username=row.username,
                        connection_id=f"{node}/{row.ip_address}:{row.port}",
                        connected_at=at if connected_at is None else connected_at,
                        clean_start=row.clean_start,
                        session_expiry_s=min(int(row.expiry_interval), EXPIRY_S_MAX),
                        told_again=True,
                    )
                )  # fmt: skip
        return events

    def _of_subscriptions(
        self, rows: Sequence[SubscriptionRow], mountpoints: dict[str, tuple[str, str]]
    ) -> list[Event]:
        """The events of subscriptions. Skip clients that are not in the list of clients: they have events of their own."""
        events: list[Event] = []
        for row in rows:
            if row.clientid is None or row.clientid not in mountpoints:
                continue
            node, mounted_at = mountpoints[row.clientid]
            try:
                topic_filter, reachable = self._translator.own_filter(
                    row.clientid, mounted_at, row.topic
                )
            except DecodeError as error:
                logger.warning("the snapshot skips a subscription of %r: %s", row.clientid, error)
                continue
            events.append(
                SessionSubscribed(
                    at=now_ms(), node=node, client_id=row.clientid, topic_filter=topic_filter,
                    qos=row.qos, retain_handling=row.rh if row.rh in (0, 1, 2) else 0,
                    broker_delivers=self._translator.broker_delivers, reachable=reachable,
                    told_again=True,
                )
            )  # fmt: skip
        return events

    async def _store(self, events: Sequence[Event]) -> None:
        await _until_stored([
            self._durable_producer.enter(keys.CLIENTS_TOPIC, event, hook=HOOK) for event in events
        ])  # fmt: skip

    async def _to_all(self, events: Iterable[Event]) -> None:
        await _until_stored([
            self._durable_producer.enter(keys.CLIENTS_TOPIC, event, number, hook=HOOK)
            for event in events
            for number in range(self._partitions)
        ])  # fmt: skip


async def _until_stored(stored: Sequence[asyncio.Future[None]]) -> None:
    """Wait for all futures, then raise the first failure. Without the wait, later failures would go unseen."""
    if stored:
        await asyncio.wait(stored)
    for each in stored:
        each.result()


async def _all_rows(
    pages: Callable[[], AsyncIterator[list[Row]]], name: Callable[[Row], object]
) -> AsyncIterator[list[Row]]:
    """Pages with each row once. A list of one page was read at one moment; a longer one is read again."""
    seen: set[object] = set()
    for _ in range(READS_MAX):
        count, read = 0, 0
        async for page in pages():
            new = [row for row in page if name(row) not in seen]
            seen.update(map(name, new))
            count, read = count + len(new), read + 1
            yield new
        if read == 1 or not count:
            return
