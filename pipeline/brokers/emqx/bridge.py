"""The process of the EMQX bridge: its parts, and the order in which they start and stop.

Start: REST client and ExHook server first, so that EMQX gets answers even while Kafka is away. Commands are consumed
only when Kafka answers.

Stop: `finish` starts no more requests and waits for the running ones. Then `run` is cancelled. Then `stop` answers the
calls under way, produces the remaining reports, and commits to the spool what Kafka has not taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any, Final, NoReturn

from millpond.pipeline.brokers.commands.active_members import report_interval_s
from millpond.pipeline.brokers.commands.consumer import CommandConsumer
from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.reports import ReportedEvent, Reports
from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.delivery.peers import PeerProcesses
from millpond.pipeline.brokers.emqx.delivery.sender import BulkSender
from millpond.pipeline.brokers.emqx.exhook.calls import CallListener, Calls
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
from millpond.pipeline.process.readiness import report_ready
from millpond.pipeline.process.signals import stop_event, until_stopped
from millpond.pipeline.settings import Settings
from millpond.pipeline.telemetry.bridge import (
    BridgeHealth,
    CommandMetrics,
    DeadLetterMetrics,
    HookMetrics,
    SpoolMetrics,
)
from millpond.pipeline.telemetry.http import serving as telemetry
from millpond.pipeline.telemetry.tracers import bridge_tracing
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

# For running requests; the next process repeats those that are cut off
FINISH_TIMEOUT_S: Final = 2.0
FLUSH_TIMEOUT_S: Final = 1.0  # for the last reports; entering them takes ms
STOP_GRACE_S: Final = 2.0  # for running calls
STOP_TIMEOUT_S: Final = 10.0  # for all of `stop`; `millpond down` waits longer before it kills


def run_emqx(settings: Settings, rules: Rules) -> None:
    """Run one process of the bridge until SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting is missing or wrong, a rule needs a mountpoint, or the address is in use.
    """
    use_uvloop()
    asyncio.run(_run_emqx(settings, rules))


async def _run_emqx(settings: Settings, rules: Rules) -> None:
    stop = stop_event()
    bridge = EmqxBridge(settings, rules)
    health = BridgeHealth(stop.is_set, None, bridge.complaints)
    async with telemetry(settings.telemetry.listen, "bridge emqx", bridge.shown, health):
        await bridge.start()
        report_ready("bridge emqx")
        running = asyncio.create_task(bridge.run())
        try:
            await until_stopped(running, stop)
            await bridge.finish()
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await bridge.stop(STOP_TIMEOUT_S)


class _SpooledReports:
    """The `EventSink` of the EMQX bridge: reports go through the durable producer, like all events."""

    def __init__(self, durable_producer: DurableProducer, node: str) -> None:
        self._durable_producer, self.node = durable_producer, node

    async def enter(
        self, event: ReportedEvent, partition: int | None = None
    ) -> asyncio.Future[Any]:
        return self._durable_producer.enter(keys.MESSAGES_TOPIC, event, partition, hook="reports")

    async def enter_alone(self, event: ReportedEvent, partition: int | None = None) -> None:
        # The durable producer sends what Kafka refused alone by itself. Its own refusal is about this event.
        await self._durable_producer.enter(keys.MESSAGES_TOPIC, event, partition, hook="reports")


class EmqxBridge:
    """One process. Several share `exhook_listen` and the spool directory; the first of them takes the snapshots."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        """Lock a number in the spool directory, and connect the parts. `start` opens everything else.

        Raises:
            ConfigError: a setting is missing or wrong, or a rule needs a mountpoint.
        """
        bridge = settings.bridge
        mountpoint = None if bridge.mountpoint is None else Mountpoint(bridge.mountpoint)
        if mountpoint is None and rules.delivery_rules_of("pubsub"):
            raise ConfigError(
                "a pubsub rule needs [bridge] mountpoint: without it Millpond cannot deliver a stored"
                " message to one client alone"
            )
        self._rest = RestClient(bridge)
        copy_topic = CopyTopic(self._rest.secret())
        self._producer = Producer(settings.kafka)
        self._spool = Spool(Path(bridge.spool_directory), bridge.spool_bytes_max)
        self._spool.open()
        self._durable_producer = DurableProducer(self._producer, self._spool)
        self._reports = Reports(_SpooledReports(self._durable_producer, keys.AGENT_NODE))
        deliveries = Deliveries(keys.AGENT_NODE, self._reports)
        self._active_members, self._active_interval_s = (
            deliveries.active_members, report_interval_s(rules),
        )  # fmt: skip
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
        listener = CallListener(
            provider_loaded=self._peers.gap, acked=self._peers.acked,
            session_ended=self._peers.session_ended, retainable=self._lookups.ask,
        )  # fmt: skip
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
            DeadLetterMetrics(self._command_consumer.dead_letters),
        )

    def complaints(self) -> list[str]:
        """Why publishes are refused now; empty if they are stored."""
        return (
            [] if self._durable_producer.complaint is None else [self._durable_producer.complaint]
        )

    async def start(self) -> int:
        """Listen for hook calls. Returns the port. Kafka need not answer yet.

        Raises:
            ConfigError: a file cannot be read, or the address is in use.
        """
        await self._rest.start()
        return await self._server.start()

    async def run(self) -> NoReturn:
        """Run all parts until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for part in (
                self._durable_producer, self._server, self._reports, self._sender, self._peers, self._lookups,
            ):  # fmt: skip
                tasks.create_task(part.run())
            tasks.create_task(
                self._active_members.run(self._active_interval_s, self._sender.unacknowledged)
            )
            if self._snapshots is not None:
                tasks.create_task(self._snapshots.run())
            await self._durable_producer.connected.wait()
            tasks.create_task(self._command_consumer.run())
        raise AssertionError("the tasks run until they are cancelled")

    async def finish(self) -> None:
        """Start no more requests, and wait for the running ones. Call it while `run` still runs."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_TIMEOUT_S):
                await self._sender.finish()

    async def stop(self, timeout_s: float) -> None:
        """Answer the running calls, and store the remaining events. Call it after `run` was cancelled."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._server.stop(STOP_GRACE_S)
                # What the spool refuses is carried out again by the next start: its command is not committed.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FLUSH_TIMEOUT_S):
                        await self._reports.flush()
                await self._durable_producer.close()
                await self._producer.stop()
        await self._rest.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
