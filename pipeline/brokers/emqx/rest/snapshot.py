"""Tells everything that is connected and subscribed, as EMQX's REST API lists it: what the hooks missed is right then."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Final, NoReturn, TypeVar
from uuid import uuid4

from millpond.pipeline.brokers.emqx.exhook.translation import Translator
from millpond.pipeline.brokers.emqx.ports import Keeping
from millpond.pipeline.brokers.emqx.rest.backoff import Backoff
from millpond.pipeline.brokers.emqx.rest.client import RestClient, Unanswered
from millpond.pipeline.brokers.emqx.rest.responses import ClientRow, SubscriptionRow, milliseconds
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

HOOK: Final = "snapshot"  # what its events are counted as
# A list of several pages may miss a row, where others went meanwhile. It is read until it shows nothing new.
READS_MAX: Final = 3
EXPIRY_S_MAX: Final = 0xFFFF_FFFF
REST_S: Final = 1.0  # between two snapshots, whoever asks for them

Row = TypeVar("Row", ClientRow, SubscriptionRow)


class Snapshots:
    """One in the first process of a bridge."""

    def __init__(
        self,
        rest: RestClient,
        durable_producer: Keeping,
        translator: Translator,
        partitions: int,
        interval_s: float,
    ) -> None:
        """`partitions` is how many each topic has: node events go to every one."""
        self._rest, self._durable_producer, self._translator = rest, durable_producer, translator
        self._partitions, self._interval_s = partitions, interval_s
        self._wanted = asyncio.Event()
        self._backoff = Backoff()

    def want(self) -> None:
        """There was a gap in what the hooks told: take one soon."""
        self._wanted.set()

    async def run(self) -> NoReturn:
        """Until cancelled: one at once, one whenever it is wanted, and one every interval."""
        loop = asyncio.get_running_loop()
        while True:
            self._wanted.clear()
            try:
                await self.take()
            except MillpondError as error:
                if self._backoff.failed(str(error), loop.time(), random.random()):  # noqa: S311  spreads attempts
                    logger.warning("a snapshot is not complete: %s", error)
                await asyncio.sleep(max(REST_S, self._backoff.wait_s(loop.time())))
                continue
            if self._backoff.over():
                logger.warning("EMQX tells again who is there")
            await asyncio.sleep(REST_S)
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def take(self) -> None:
        """Everything that is there, between `node.sync.started` and `.completed` of each running node. One that fails
        is never completed: nothing is closed by it.

        Raises:
            RestError: EMQX does not tell.
            NotKept: an event cannot be kept.
        """
        nodes = [node.node for node in await self._rest.nodes() if node.running]
        if not nodes:
            raise Unanswered("EMQX tells of no node that runs")
        sync_id = uuid4().hex
        await self._to_all(
            NodeSyncStarted(at=now_ms(), node=node, sync_id=sync_id) for node in nodes
        )
        mountpoints: dict[str, tuple[str, str]] = {}  # client → node, mountpoint
        async for clients in _whole(self._rest.clients, lambda row: row.clientid):
            await self._keep(self._of_clients(clients, nodes[0], mountpoints))
        async for subscriptions in _whole(
            self._rest.subscriptions, lambda row: (row.clientid, row.topic)
        ):
            await self._keep(self._of_subscriptions(subscriptions, mountpoints))
        await self._to_all(
            NodeSyncCompleted(at=now_ms(), node=node, sync_id=sync_id) for node in nodes
        )

    def _of_clients(
        self, rows: Sequence[ClientRow], anywhere: str, mountpoints: dict[str, tuple[str, str]]
    ) -> list[Event]:
        """Those connected. A session that waits for its client shows by its subscriptions; one that is kept on no
        node, being durable, is told of as if it were on `anywhere`.
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
        """Of a client that was not there a moment ago its own events tell."""
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
                logger.warning("a subscription of %r is passed over: %s", row.clientid, error)
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

    async def _keep(self, events: Sequence[Event]) -> None:
        kept = [
            self._durable_producer.enter(keys.CLIENTS_TOPIC, event, hook=HOOK) for event in events
        ]
        await _all(kept)

    async def _to_all(self, events: Iterable[Event]) -> None:
        kept = [
            self._durable_producer.enter(keys.CLIENTS_TOPIC, event, number, hook=HOOK)
            for event in events
            for number in range(self._partitions)
        ]
        await _all(kept)


async def _all(kept: Sequence[asyncio.Future[None]]) -> None:
    """Raises the first failure when all are done: none is left behind unheard."""
    if kept:
        await asyncio.wait(kept)
    for each in kept:
        each.result()


async def _whole(
    pages: Callable[[], AsyncIterator[list[Row]]], name: Callable[[Row], object]
) -> AsyncIterator[list[Row]]:
    """Pages with every row once. A list of one page was read at one moment; a longer one is read again."""
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
