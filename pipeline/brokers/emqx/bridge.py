"""All parts of one process of the EMQX bridge, and the order in which they start and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

from millpond.pipeline.brokers.commands.consumer import CommandConsumer
from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.reports import Reports
from millpond.pipeline.brokers.emqx.delivery.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.delivery.peers import PeerProcesses
from millpond.pipeline.brokers.emqx.delivery.sender import BulkSender
from millpond.pipeline.brokers.emqx.exhook.calls import Calls
from millpond.pipeline.brokers.emqx.exhook.server import HookServer
from millpond.pipeline.brokers.emqx.exhook.translation import Translator
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.rest.client import RestClient
from millpond.pipeline.brokers.emqx.rest.retained import RetainedLookup
from millpond.pipeline.brokers.emqx.rest.snapshot import Snapshots
from millpond.pipeline.brokers.spool.directory import Spool
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.readiness import say_ready
from millpond.pipeline.process.signals import asked_to_end, until_asked
from millpond.pipeline.settings import Settings
from millpond.pipeline.telemetry.bridge import (
    BridgeHealth,
    CommandMetrics,
    HookMetrics,
    SpoolMetrics,
)
from millpond.pipeline.telemetry.http import serving as telemetry
from millpond.pipeline.telemetry.tracers import bridge_tracing
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from millpond.schemas.events import DeliveriesSent, DeliveryFailed, MessageAcked, MessagePublished
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

FINISH_TIMEOUT_S: Final = 2.0  # for requests under way; those cut off are carried out again
STOP_GRACE_S: Final = 2.0  # for the calls in hand, when the process is to end
STOP_TIMEOUT_S: Final = 10.0  # less than `millpond down` gives it


def run_emqx(settings: Settings, rules: Rules) -> None:
    """Run one process of the bridge until SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting is missing or wrong, a rule cannot be kept, or the address is in use.
    """
    use_uvloop()
    asyncio.run(_run_emqx(settings, rules))


async def _run_emqx(settings: Settings, rules: Rules) -> None:
    stop = asked_to_end()
    bridge = EmqxBridge(settings, rules)
    health = BridgeHealth(stop.is_set, None, bridge.complaints)
    async with telemetry(settings.telemetry.listen, "bridge emqx", bridge.shown, health):
        await bridge.start()
        say_ready("bridge emqx")
        running = asyncio.create_task(bridge.run())
        try:
            await until_asked(running, stop)
            await bridge.finish()
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await bridge.stop(STOP_TIMEOUT_S)


class _Reporting:
    """Reports go the way of all events: while Kafka is away, to the spool."""

    def __init__(self, durable_producer: DurableProducer, node: str) -> None:
        self._durable_producer, self.node = durable_producer, node

    async def enter(
        self, event: DeliveriesSent | DeliveryFailed | MessageAcked, partition: int | None = None
    ) -> asyncio.Future[Any]:
        return self._durable_producer.enter(keys.MESSAGES_TOPIC, event, partition, hook="reports")


class _Listener:
    """What the hooks hear, to whom it concerns."""

    def __init__(self, peers: PeerProcesses, lookups: RetainedLookup) -> None:
        self.acked = peers.acked
        self.session_ended = peers.session_ended
        self.provider_loaded = peers.gap
        self.retainable: Callable[[str, MessagePublished], None] = lookups.ask


class EmqxBridge:
    """One process. Several share `exhook_listen` and the spool directory; the first of them takes the snapshots."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        """Takes its place in the spool directory; nothing else is opened before `start`.

        Raises:
            ConfigError: a setting is missing or wrong, or a rule cannot be kept.
        """
        bridge = settings.bridge
        mountpoint = None if bridge.mountpoint is None else Mountpoint(bridge.mountpoint)
        if mountpoint is None and rules.run_by_delivery("pubsub"):
            raise ConfigError(
                "a pubsub rule needs [bridge] mountpoint: without it EMQX can deliver to one client"
                " alone only what it has routed itself, and never what was stored"
            )
        self._rest = RestClient(bridge)
        copy_topic = CopyTopic(self._rest.secret())
        self._producer = Producer(settings.kafka.client_options(), settings.kafka.message_bytes_max)
        self._spool = Spool(Path(bridge.spool_directory), bridge.spool_bytes_max)
        self._spool.open()
        self._durable_producer = DurableProducer(self._producer, self._spool)
        self._reports = Reports(_Reporting(self._durable_producer, keys.AGENT_NODE))
        deliveries = Deliveries(keys.AGENT_NODE, self._reports)
        self._sender = BulkSender(self._rest, deliveries, copy_topic, mountpoint)
        self._snapshots = Snapshots(
            self._rest, self._durable_producer, Translator(mountpoint), settings.kafka.partitions,
            bridge.sync_interval_s,
        ) if self._spool.number == 0 else None  # fmt: skip
        self._peers = PeerProcesses(
            self._spool.directory, self._spool.number, self._sender,
            None if self._snapshots is None else self._snapshots.want,
        )  # fmt: skip
        self._lookups = RetainedLookup(self._rest, self._durable_producer)
        listener = _Listener(self._peers, self._lookups)
        self._tracing = bridge_tracing(settings.telemetry, "emqx")
        calls = Calls(
            rules, mountpoint, copy_topic, self._durable_producer, listener, settings.kafka.partitions,
            self._tracing,
        )  # fmt: skip
        hooks = HookMetrics(calls.refusals.counts)
        self._server = HookServer(bridge, calls, self._durable_producer, hooks.observe)
        self._command_consumer = CommandConsumer(
            settings, self._sender, deliveries, self._producer, self._tracing
        )
        self.shown = (
            hooks,
            SpoolMetrics(self._durable_producer),
            CommandMetrics(self._command_consumer, deliveries),
        )

    def complaints(self) -> list[str]:
        """Why publishes are refused."""
        return (
            [] if self._durable_producer.complaint is None else [self._durable_producer.complaint]
        )

    async def start(self) -> int:
        """Listen for hooks; the port. Kafka may be away.

        Raises:
            ConfigError: a file cannot be read, or the address is in use.
        """
        await self._rest.start()
        return await self._server.start()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for part in (
                self._durable_producer, self._server, self._reports, self._sender, self._peers, self._lookups,
            ):  # fmt: skip
                tasks.create_task(part.run())
            if self._snapshots is not None:
                tasks.create_task(self._snapshots.run())
            await self._durable_producer.connected.wait()
            tasks.create_task(self._command_consumer.run())
        raise AssertionError("none of them ever returns")

    async def finish(self) -> None:
        """While `run` still runs: begin no more commands, and know what became of those begun."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_TIMEOUT_S):
                await self._sender.finish()

    async def stop(self, timeout_s: float) -> None:
        """When `run` was cancelled: answer what is in hand, and keep what was told."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._server.stop(STOP_GRACE_S)
                await self._reports.flush()
                await self._durable_producer.close()
                await self._producer.stop()
        await self._rest.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
