"""A worker process: one Faust app that runs one agent.

Parts, in the order of the data:

1. The consumer (`faust_transport`) fetches runs of records from the agent's source topic.
2. `_take_runs`, the only Faust agent here, passes each run to `Partitions`.
3. `Partitions` has one task for each owned partition. Its driver folds the run into the store.
4. The consumer commits the drivers' committable offsets.

Beside these run the control channel (sessions agent only), and telemetry if it listens.

ON start: check the store and the partition count, connect, start Faust. Kafka assigns partitions. The check waits for a
store that is down, as the partitions do later; it refuses only what does not change by itself.
ON a partition's failure, a crash of Faust, a failure of the control channel: note the failure, and stop.
ON SIGTERM, SIGINT: stop.
ON stop: the consumer releases the partitions and commits. Then the Kafka clients disconnect.
ON stop that takes `session_timeout_s`: exit with code 1, without any cleaning. Kafka has given the partitions away by
then, or soon does. The next owner continues from the store.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Mapping, Sequence
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
from millpond.pipeline.process.readiness import report_ready
from millpond.pipeline.process.signals import on_signal
from millpond.pipeline.rebuild.rebuild import check_not_rebuilding
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.cluster_check import cluster_weaknesses
from millpond.pipeline.stores.redis.command_check import check_commands
from millpond.pipeline.stores.registry import open_store
from millpond.pipeline.stores.retries import until_up
from millpond.pipeline.telemetry.http import KAFKA_TIMEOUT_S, serving
from millpond.pipeline.telemetry.tracers import worker_tracing
from millpond.pipeline.telemetry.worker import WorkerTelemetry
from millpond.pipeline.worker.control_channel import ControlChannel
from millpond.pipeline.worker.faust_transport import Consumer, Transport
from millpond.pipeline.worker.partitions import Partitions
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)


class App(faust.App):
    """A Faust app that creates no directories. Faust keeps tables in them; Millpond has none."""

    # mode names a logger after the module of a class. This name is among the libraries that log from WARNING on.
    logger = logging.getLogger("faust.app")

    def _create_directories(self) -> None:
        """Do nothing: the process may run where it must not write."""


class RunSchema(faust.Schema[Any, Any]):
    """Hands runs over unchanged. The driver decodes the records that its agent owns, and no others."""

    def loads_key(self, app: Any, message: Message, **_: Any) -> None:
        """Return None: each record of a run has a key of its own."""

    def loads_value(self, app: Any, message: Message, **_: Any) -> Any:
        """Return the run."""
        return message.value


class Worker:
    """One process of one agent: connects Kafka, store and machine, and stops them in order."""

    def __init__(self, agent: AgentName, settings: Settings, rules: Rules) -> None:
        """Open nothing yet; `run` connects."""
        self.agent, self.settings, self.rules = agent, settings, rules
        self._stopping = asyncio.Event()
        # Without heartbeats Kafka gives the partitions away after this time. A clean stop has no use any more then.
        self._stop_deadline = threading.Timer(settings.worker.session_timeout_s, self._exit_now)
        self._stop_deadline.daemon = True
        self._failure: BaseException | None = None
        kafka = settings.kafka
        self._producer = Producer(kafka)
        self._telemetry = WorkerTelemetry(agent, lambda: self._partitions, self._log_ends)
        self._log = KafkaLog(
            self._producer,
            kafka,
            keys.group_id(settings.app, agent),
            settings.worker.batch_records_max,
            self._telemetry.counts.dead_letter,
        )
        self._tracing = worker_tracing(settings.telemetry, agent)
        # Without a listener nothing reads the numbers.
        self._measured = settings.telemetry.listen is not None
        self._partitions = Partitions(
            self._new_driver,
            settings.worker.release_timeout_s,
            self._ready,
            self._fail,
        )

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT.

        Raises:
            MillpondError: The worker cannot start or continue. The record that failed is not committed.
        """
        on_signal(self._stop)
        listen, name = self.settings.telemetry.listen, f"worker {self.agent}"
        async with serving(listen, name, [self._telemetry], self):
            await self._run()

    async def _run(self) -> None:
        if not await self._store_is_checked():
            self._stop_deadline.cancel()
            return
        await self._producer.start()
        await self._log.start()
        await self._check_partitions()
        app = self._app()
        control = asyncio.ensure_future(self._run_control_channel())
        sampling = asyncio.ensure_future(self._telemetry.run()) if self._measured else None
        try:
            await app.start()
            await self._until_stopping(app, control)
        finally:
            self._stop()
            control.cancel()
            if sampling is not None:
                sampling.cancel()
            await app.stop()
            await self._log.stop()
            await self._producer.stop()
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
            self._stop_deadline.cancel()
        if isinstance(self._failure, MillpondError):
            raise self._failure
        if self._failure is not None:
            raise MillpondError(f"worker {self.agent} failed: {self._failure!r}") from self._failure

    async def not_alive(self) -> list[str]:
        if self._failure is not None:
            return [f"the worker is stopping after a failure: {self._failure}"]
        return ["the worker was asked to stop"] if self._stopping.is_set() else []

    async def not_ready(self) -> list[str]:
        kafka = await self._producer.why_unreachable(KAFKA_TIMEOUT_S)
        return [*([kafka] if kafka else []), *self._telemetry.not_ready_reasons()]

    async def _log_ends(self, numbers: Sequence[int]) -> Mapping[int, int]:
        return await self._log.ends(keys.SOURCE_TOPIC[self.agent], numbers)

    async def _until_stopping(self, app: faust.App, control: asyncio.Future[None]) -> None:
        """Wait for a signal, the failure of a partition, a crash of Faust or a failure of the control channel."""
        ends: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(end) for end in (self._stopping.wait(), app.wait())
        ]
        await asyncio.wait([*ends, control], return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if app.crashed:
            self._failure = self._failure or app.crash_reason
        if control.done():
            self._failure = self._failure or control.exception()

    async def _store_is_checked(self) -> bool:
        """Check the store, and wait for one that is down. False if the worker was asked to stop meanwhile."""
        name = f"worker {self.agent}"
        checking = asyncio.ensure_future(until_up(self._check_store, name))
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((checking, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if checking.done():
            checking.result()
            return True
        checking.cancel()
        await asyncio.wait((checking,))
        return False

    async def _check_store(self) -> None:
        """Check what does not change by itself: the rules' user commands, and an unfinished rebuild."""
        pool = self.rules.pool(self.agent)
        await check_commands(pool, self.rules)
        for weakness in await cluster_weaknesses(pool):
            logger.warning("pool %s: %s", pool.name, weakness)
        await check_not_rebuilding(self.agent, self.settings, self.rules)

    async def _check_partitions(self) -> None:
        """Compare the partition count with the settings: the control channel and tools compute partitions from them.

        Raises:
            ConfigError: The counts differ.
        """
        partition = Partition(self.settings.app, self.agent, 0)
        count, configured = (
            (await self._log.bounds(partition)).partition_count,
            self.settings.kafka.partitions,
        )
        if count != configured:
            raise ConfigError(
                f"[kafka] partitions is {configured}, but {partition.topic} has {count}: set partitions = {count}"
            )

    async def _run_control_channel(self) -> None:
        """Read the control channel until cancelled. Agents other than sessions have none, and only wait."""
        if self.agent != "sessions":
            await asyncio.get_running_loop().create_future()
        channel = ControlChannel(
            self.rules.pool(self.agent),
            self._producer,
            self.settings.kafka.partitions,
            self._partitions.owned,
            self._telemetry.counts.dead_letter,
        )
        await channel.run()

    def _stop(self) -> None:
        if not self._stopping.is_set():
            logger.info("worker %s is stopping", self.agent)
            self._stopping.set()
            self._stop_deadline.start()

    def _exit_now(self) -> None:
        """End the process at once. Runs in the timer's thread.

        Faust and aiokafka wait for Kafka when they stop, in some places without limit. No task could end that.
        """
        logger.error(
            "worker %s: no clean end within %.0f s%s; exiting: the next owner continues from the store",
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
        topic = app.topic(self._topic_in_kafka, schema=RunSchema(), acks=False)
        app.agent(topic, name=self.agent)(self._take_runs)
        app.on_partitions_assigned.connect(self._assigned, weak=False)
        return app

    @property
    def _topic_in_kafka(self) -> str:
        return self.settings.kafka.topic_name(keys.SOURCE_TOPIC[self.agent])

    def _transport(self, app: faust.App, brokers: list[URL]) -> Transport:
        """Return the transport. Its consumer is a class made here, because Faust creates the consumer itself."""
        worker = self.settings.worker

        class WorkerConsumer(Consumer):
            run_records_max = worker.batch_records_max
            run_bytes_max = worker.batch_bytes_max
            release = staticmethod(self._release)
            on_fetched = None if self._tracing is None else staticmethod(self._tracing.fetched)
            committable = staticmethod(self._committable)

        class WorkerTransport(Transport):
            Consumer = WorkerConsumer

        return WorkerTransport(brokers, app)

    async def _take_runs(self, runs: StreamT[Any]) -> None:
        """Pass each run to its partition's task: the body of the Faust agent."""
        async for event in runs.events():
            await self._partitions.put(event.message.partition, event.value)

    def _new_driver(self, number: int) -> PartitionDriver[Any]:
        partition = Partition(self.settings.app, self.agent, number)
        store: Store[Any] = open_store(self.rules.pool(self.agent), partition)
        observer: Observer = NullObserver()
        if self._measured:
            store, observer = self._telemetry.watch(number, store)
        machine = MACHINES[self.agent]()
        log: Log = self._log.of_partition()
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
        topic = self._topic_in_kafka
        return {TP(topic, number): offset for number, offset in offsets.items()}

    def _ready(self) -> None:
        report_ready(f"worker {self.agent}")

    def _fail(self, error: BaseException) -> None:
        """Note the first failure, and stop. The record that failed is not committed."""
        logger.error("worker %s stops: %s", self.agent, error)
        self._failure = self._failure or error
        self._stop()


def _credentials(options: dict[str, Any]) -> Any:
    """Return Faust's form of the connection options of aiokafka."""
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
        MillpondError: The worker cannot start or continue. The message says why.
    """
    # A batch is thousands of objects without cycles; all other objects live as long as the process. Python collects
    # after every 700 allocations by default. That costs a fifth of the time, and finds nothing.
    gc.set_threshold(50_000, 20, 50)
    # A policy, not one loop: Faust's consumer thread creates a loop of its own.
    use_uvloop()
    asyncio.run(_run(agent, settings, rules))


async def _run(agent: AgentName, settings: Settings, rules: Rules) -> None:
    await Worker(agent, settings, rules).run()
