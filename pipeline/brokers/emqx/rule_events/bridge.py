"""The bridge `emqx-kafka`: it reads rule events that EMQX's sink wrote to Kafka, and produces canonical events.

A source record is committed when Kafka has acknowledged every event made from it. A record that cannot be read becomes
a dead letter. Records are produced in the order of the source, but a refused one is sent later than its successors: the
agents accept any order here (`docs/how-to/run-with-emqx.md` lists what depends on it).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NoReturn

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from millpond.agents.ports import OutgoingRecord
from millpond.pipeline.brokers.bridge_rules import BridgeRules
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.rule_events.translation import read
from millpond.pipeline.kafka.consumer import GroupConsumer, RecordClaim, after_calls
from millpond.pipeline.kafka.dead_letters import DeadLetters
from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.kafka.persistent_sender import PersistentSender
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.readiness import report_ready
from millpond.pipeline.process.signals import stop_event, until_stopped
from millpond.pipeline.settings import KafkaSettings, Settings
from millpond.pipeline.telemetry.bridge import BridgeHealth, DeadLetterMetrics
from millpond.pipeline.telemetry.http import serving as telemetry
from millpond.schemas import codec, keys
from millpond.schemas.errors import ConfigError, DecodeError
from millpond.schemas.events import Event, MessageAcked, MessageDelivered, MessagePublished
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

NAME: Final = "emqx-kafka"
LOG_INTERVAL_S: Final = 10.0  # between two log lines about dead letters
# For Kafka to acknowledge the rest; the next start reads what it has not
STOP_TIMEOUT_S: Final = 10.0


class KafkaBridge:
    """One per process."""

    def __init__(
        self, producer: Producer, rules: BridgeRules, mountpoint: Mountpoint | None = None
    ) -> None:
        """The caller starts and stops the producer."""
        self._rules, self._mountpoint = rules, mountpoint
        self._sender = PersistentSender(producer)
        self.dead_letters = DeadLetters(self._sender, NAME)

    async def handle(self, record: Any, claim: RecordClaim) -> None:
        """Translate one record of EMQX, and produce its events. Finish it when Kafka has acknowledged all of them."""
        try:
            events = [each for each in read(record.value, self._mountpoint) if self._wants(each)]
        except DecodeError as error:
            await self.dead_letters.send(record, "unreadable", str(error), claim.finish)
            return
        if not events:
            claim.finish()
            return
        on_acknowledged = after_calls(len(events), claim.finish)
        for event in events:
            topic, key = topic_of(event), keys.record_key(event).encode()
            await self._sender.send(
                OutgoingRecord(topic, key, codec.encode(event)),
                on_acknowledged,
                partial(self._give_up, record, topic, on_acknowledged),
            )

    def _wants(self, event: Event) -> bool:
        """True if an agent needs the event. Deliveries and acknowledgements are many, and few rules need them."""
        if isinstance(event, MessageAcked):
            return self._rules.wants("message.acked", event.topic)
        if isinstance(event, MessageDelivered):
            return self._rules.wants("message.delivered", event.topic)
        return True

    async def _give_up(
        self, source: Any, topic: str, done: Callable[[], None], _: Exception
    ) -> None:
        """An event is too large at every attempt. Its source record becomes a dead letter."""
        await self.dead_letters.send(source, "too_large", f"for {topic}, but too large", done)

    async def retry_refused(self) -> NoReturn:
        """Send the records that Kafka refused, until cancelled."""
        await self._sender.run()

    async def log_dead_letters(self) -> NoReturn:
        """Log the number of dead letters, in one line for each interval, until cancelled."""
        logged = 0
        while True:
            await asyncio.sleep(LOG_INTERVAL_S)
            now = self.dead_letters.counts.total()
            if now > logged:
                logger.warning(
                    "%d records became dead letters, %d since the start:"
                    " `millpond dead-letters list --unreadable` shows them",
                    now - logged, now,
                )  # fmt: skip
                logged = now


def topic_of(event: Event) -> str:
    """The Kafka topic of an event."""
    if isinstance(event, MessagePublished | MessageAcked | MessageDelivered):
        return keys.MESSAGES_TOPIC
    return keys.CLIENTS_TOPIC


# -- the process


def run_emqx_kafka(settings: Settings, rules: Rules, topics: Sequence[str]) -> None:
    """Run the bridge until SIGTERM or SIGINT.

    Raises:
        MillpondError: Kafka cannot be reached at the start or lacks a topic, or a pubsub rule needs a mountpoint.
    """
    if settings.bridge.mountpoint is None:
        _refuse_pubsub(rules)
    use_uvloop()
    asyncio.run(_run(settings, rules, topics))


def _refuse_pubsub(rules: Rules) -> None:
    """Refuse pubsub rules. Each subscriber has its own read offset, but without a mountpoint all get each copy.

    Raises:
        ConfigError: there is a pubsub rule.
    """
    for rule in rules.delivery_rules_of("pubsub"):
        reason = f"a pubsub rule ({rule.topic}) needs an EMQX listener with a mountpoint: [bridge] mountpoint"
        raise ConfigError(reason, file=rule.file, line=rule.line)


async def _run(settings: Settings, rules: Rules, topics: Sequence[str]) -> None:
    stop = stop_event()
    producer = Producer(settings.kafka)
    template = settings.bridge.mountpoint
    mountpoint = None if template is None else Mountpoint(template)
    bridge = KafkaBridge(producer, BridgeRules(rules), mountpoint)
    shown = (DeadLetterMetrics(bridge.dead_letters),)
    health = BridgeHealth(stop.is_set, producer, list)
    async with telemetry(settings.telemetry.listen, f"bridge {NAME}", shown, health):
        serving = asyncio.create_task(_serve(settings, topics, producer, bridge))
        try:
            await until_stopped(serving, stop)
        finally:
            serving.cancel()
            await _end(serving, producer)


async def _end(serving: asyncio.Task[NoReturn], producer: Producer) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await asyncio.wait((serving,))
            await producer.stop()
    except TimeoutError:
        logger.warning(
            "Kafka has not acknowledged everything in %g s: the next start reads the rest again",
            STOP_TIMEOUT_S,
        )


async def _serve(
    settings: Settings, topics: Sequence[str], producer: Producer, bridge: KafkaBridge
) -> NoReturn:
    await _look_up(settings.kafka, topics)
    try:
        await producer.start()
    except KafkaError as error:
        raise await unreachable(settings.kafka) from error
    source = GroupConsumer(
        settings, keys.rule_events_group_id(settings.app), topics, bridge.handle, producer.flush
    )
    report_ready(f"bridge {NAME}")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(source.run())
        tasks.create_task(bridge.retry_refused())
        tasks.create_task(bridge.log_dead_letters())
    raise AssertionError("the tasks run until they are cancelled")


async def _look_up(settings: KafkaSettings, topics: Sequence[str]) -> None:
    """Check that the topics exist: a consumer would silently wait for a misspelled one.

    Raises:
        ConfigError: a topic is missing.
    """
    admin = AIOKafkaAdminClient(**settings.client_options())
    try:
        await admin.start()
        missing = sorted(set(topics) - set(await admin.list_topics()))
    except KafkaError as error:
        raise await unreachable(settings) from error
    finally:
        await admin.close()
    if missing:
        raise ConfigError(
            f"Kafka has no topic {', '.join(missing)}: give --topics the topics of EMQX's Kafka sinks"
        )
