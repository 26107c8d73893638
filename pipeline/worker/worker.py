"""A worker: one Faust app with one agent, the only place besides the transport that knows Faust."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import faust
from faust.types import TP, StreamT
from faust.types.tuples import Message
from yarl import URL

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.driver.observer import NullObserver, Observer
from millpond.agents.ports import Log, Store
from millpond.agents.registry import MACHINES
from millpond.pipeline.kafka.log import KafkaLog
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.readiness import say_ready
from millpond.pipeline.process.signals import on_signal
from millpond.pipeline.rebuild.rebuild import check_not_rebuilding
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.command_check import check_commands
from millpond.pipeline.stores.registry import open_store
from millpond.pipeline.telemetry.http import KAFKA_PATIENCE_S, serving
from millpond.pipeline.telemetry.tracers import worker_tracing
from millpond.pipeline.telemetry.worker import WorkerTelemetry
from millpond.pipeline.worker.control_channel import ControlChannel
from millpond.pipeline.worker.faust_transport import Consumer, Transport
from millpond.pipeline.worker.partitions import Partitions
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError, StoreDown
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)


class App(faust.App):
    """Faust's, without the directories for tables that it makes wherever it is started: we have no tables."""

    logger = logging.getLogger("faust.app")  # or it would say in our name what each part of it does

    def _create_directories(self) -> None:
        """Write nothing."""


class RunSchema(faust.Schema[Any, Any]):
    """Hands a run of records over as it is: the driver decodes what its agent owns, and only that."""

    def loads_key(self, app: Any, message: Message, **_: Any) -> None:
        """A run has many keys, and so none."""

    def loads_value(self, app: Any, message: Message, **_: Any) -> Any:
        """The list of records."""
        return message.value


class Worker:
    """One process of one agent: wires Kafka, store and machine together, and ends them in order."""

    def __init__(self, agent: AgentName, settings: Settings, rules: Rules) -> None:
        """Nothing is opened before `run`."""
        self.agent, self.settings, self.rules = agent, settings, rules
        self._stopping = asyncio.Event()
        # Who has not been heard of for a session is gone for Kafka: no use in saying good-bye any longer.
        self._patience = threading.Timer(settings.worker.session_timeout_s, self._give_up)
        self._patience.daemon = True
        self._failure: BaseException | None = None
        kafka = settings.kafka
        self._producer = Producer(kafka.client_options(), kafka.message_bytes_max)
        self._log = KafkaLog(
            self._producer,
            kafka.client_options(),
            keys.group_id(settings.app, agent),
            settings.worker.batch_records_max,
        )
        self._tracing = worker_tracing(settings.telemetry, agent)
        self._telemetry = WorkerTelemetry(agent, lambda: self._partitions, self._ends)
        self._measured = settings.telemetry.listen is not None  # or nobody can ask
        self._partitions = Partitions(
            self._new_driver,
            self._log,
            settings.worker.release_timeout_s,
            self._ready,
            self._fail,
        )

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises:
            MillpondError: what made it impossible to go on; nothing beyond it was committed.
        """
        on_signal(self._stop)
        listen, name = self.settings.telemetry.listen, f"worker {self.agent}"
        async with serving(listen, name, [self._telemetry], self):
            await self._run()

    async def _run(self) -> None:
        await check_commands(self.rules.pool(self.agent), self.rules)
        with suppress(StoreDown):  # its partitions wait for it
            await check_not_rebuilding(self.agent, self.settings, self.rules)
        await self._producer.start()
        await self._log.start()
        await self._check_partitions()
        app = self._app()
        listening = asyncio.ensure_future(self._control())
        sampling = asyncio.ensure_future(self._telemetry.run()) if self._measured else None
        try:
            await app.start()
            await self._until_stopping(app, listening)
        finally:
            self._stop()
            listening.cancel()
            if sampling is not None:
                sampling.cancel()
            await app.stop()
            await self._log.stop()
            await self._producer.stop()
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
            self._patience.cancel()
        if isinstance(self._failure, MillpondError):
            raise self._failure
        if self._failure is not None:
            raise MillpondError(f"worker {self.agent} failed: {self._failure!r}") from self._failure

    async def not_alive(self) -> list[str]:
        if self._failure is not None:
            return [f"it stops: {self._failure}"]
        return ["it was asked to stop"] if self._stopping.is_set() else []

    async def not_ready(self) -> list[str]:
        kafka = await self._producer.complaint(KAFKA_PATIENCE_S)
        return [*([kafka] if kafka else []), *self._telemetry.complaints()]

    async def _ends(self, numbers: Sequence[int]) -> Mapping[int, int]:
        return await self._log.ends(keys.SOURCE_TOPIC[self.agent], numbers)

    async def _until_stopping(self, app: faust.App, listening: asyncio.Future[None]) -> None:
        """Until a signal, a partition that cannot go on, or a part that crashed."""
        ends: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(end) for end in (self._stopping.wait(), app.wait())
        ]
        await asyncio.wait([*ends, listening], return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if app.crashed:
            self._failure = self._failure or app.crash_reason
        if listening.done():
            self._failure = self._failure or listening.exception()

    async def _check_partitions(self) -> None:
        """Which partition a client or topic is in is worked out from the settings, too."""
        partition = Partition(self.settings.app, self.agent, 0)
        count, configured = (
            (await self._log.bounds(partition)).partition_count,
            self.settings.kafka.partitions,
        )
        if count != configured:
            raise ConfigError(
                f"[kafka] partitions is {configured}, but {partition.topic} has {count}: set partitions = {count}"
            )

    async def _control(self) -> None:
        """The sessions agent also hears what applications ask for."""
        if self.agent != "sessions":
            await asyncio.get_running_loop().create_future()  # nobody has anything to say
        channel = ControlChannel(
            self.rules.pool(self.agent),
            self._producer,
            self.settings.kafka.partitions,
            self._partitions.owned,
        )
        await channel.run()

    def _stop(self) -> None:
        if not self._stopping.is_set():
            logger.info("worker %s stops", self.agent)
            self._stopping.set()
            self._patience.start()

    def _give_up(self) -> None:
        """In a thread of its own: Faust and aiokafka wait for a Kafka that is away, some of it for ever."""
        logger.error(
            "worker %s: no clean end within %.0f s%s; leaving: the next owner goes on from what the store holds",
            self.agent,
            self.settings.worker.session_timeout_s,
            f" after {self._failure!r}" if self._failure else "",
        )
        logging.shutdown()
        os._exit(1)

    def _app(self) -> faust.App:
        worker, kafka = self.settings.worker, self.settings.kafka
        brokers = [URL(f"kafka://{server}") for server in kafka.bootstrap_servers]
        app = App(
            keys.group_id(self.settings.app, self.agent),
            broker=brokers,
            broker_credentials=_credentials(kafka.client_options()),
            broker_session_timeout=worker.session_timeout_s,
            broker_heartbeat_interval=worker.session_timeout_s / 4,
            broker_commit_interval=worker.commit_interval_s,
            broker_max_poll_records=worker.batch_records_max,
            consumer_auto_offset_reset="earliest",
            stream_buffer_maxsize=16,
            table_standby_replicas=0,
            topic_disable_leader=True,
            topic_allow_declare=False,
            web_enabled=False,
            autodiscover=False,
        )
        app.transport = self._transport(app, brokers)
        topic = app.topic(keys.SOURCE_TOPIC[self.agent], schema=RunSchema(), acks=False)
        app.agent(topic, name=self.agent)(self._fold)
        app.on_partitions_assigned.connect(self._assigned, weak=False)
        return app

    def _transport(self, app: faust.App, brokers: list[URL]) -> Transport:
        """Our transport, with a consumer that knows whom to ask: Faust makes it from a class."""
        worker = self.settings.worker

        class WorkerConsumer(Consumer):
            run_records_max = worker.batch_records_max
            run_bytes_max = worker.batch_bytes_max
            release = staticmethod(self._release)
            fetched = None if self._tracing is None else staticmethod(self._tracing.fetched)
            committable = staticmethod(self._committable)

        class WorkerTransport(Transport):
            Consumer = WorkerConsumer

        return WorkerTransport(brokers, app)

    async def _fold(self, runs: StreamT[Any]) -> None:
        """The agent: every run to its partition's task."""
        async for event in runs.events():
            await self._partitions.put(event.message.partition, event.value)

    def _new_driver(self, number: int) -> PartitionDriver[Any]:
        partition = Partition(self.settings.app, self.agent, number)
        store: Store[Any] = open_store(self.rules.pool(self.agent), partition)
        observer: Observer = NullObserver()
        if self._measured:
            store, observer = self._telemetry.watch(number, store)
        machine = MACHINES[self.agent]()
        log: Log = self._log
        if self._tracing is not None:
            observer, log = self._tracing.observer(observer, number), self._tracing.log(log)
        return PartitionDriver(partition, machine, store, log, self.rules, logger.warning, observer)

    async def _assigned(self, _: Any, /, *assigned: Any, **__: Any) -> None:
        self._partitions.assign({tp.partition for tp in assigned[0]})

    async def _release(self, revoked: set[TP]) -> dict[TP, int]:
        return self._by_partition(await self._partitions.release({tp.partition for tp in revoked}))

    def _committable(self) -> dict[TP, int]:
        return self._by_partition(self._partitions.committable())

    def _by_partition(self, offsets: dict[int, int]) -> dict[TP, int]:
        topic = keys.SOURCE_TOPIC[self.agent]
        return {TP(topic, number): offset for number, offset in offsets.items()}

    def _ready(self) -> None:
        say_ready(f"worker {self.agent}")

    def _fail(self, error: BaseException) -> None:
        """A partition cannot go on: the process stops, and commits nothing beyond."""
        logger.error("worker %s stops: %s", self.agent, error)
        self._failure = self._failure or error
        self._stop()


def _credentials(options: dict[str, Any]) -> Any:
    """Faust's form of the connection options that every other client takes as they are."""
    if options["security_protocol"] == "PLAINTEXT":
        return None
    context = options.get("ssl_context")
    if options["security_protocol"] == "SSL":
        return faust.SSLCredentials(context)
    return faust.SASLCredentials(
        username=options["sasl_plain_username"],
        password=options["sasl_plain_password"],
        mechanism=options["sasl_mechanism"],
        ssl_context=context,
    )


def run(agent: AgentName, settings: Settings, rules: Rules) -> None:
    """Run a worker until SIGTERM or SIGINT.

    Raises:
        MillpondError: it could not go on; the message says why.
    """
    # What lives here is a batch, thousands of objects without cycles, or for ever: collecting after every 700
    # allocations, as Python does, costs a fifth of the time and finds nothing.
    gc.set_threshold(50_000, 20, 50)
    # As policy, not for one loop: Faust's consumer has a loop of its own, in its own thread.
    use_uvloop()
    asyncio.run(_run(agent, settings, rules))


async def _run(agent: AgentName, settings: Settings, rules: Rules) -> None:
    await Worker(agent, settings, rules).run()
