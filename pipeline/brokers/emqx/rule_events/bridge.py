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
from typing import Any, Final, NamedTuple, NoReturn

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from millpond.agents.driver.dead_letters import REASON_LENGTH_MAX, headers_of
from millpond.pipeline.brokers.bridge_rules import BridgeRules
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.rule_events.translation import read
from millpond.pipeline.kafka.consumer import GroupConsumer, RecordClaim
from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.readiness import say_ready
from millpond.pipeline.process.signals import asked_to_end, until_asked
from millpond.pipeline.settings import KafkaSettings, Settings
from millpond.schemas import codec, keys
from millpond.schemas.errors import ConfigError, DecodeError
from millpond.schemas.events import Event, MessageAcked, MessageDelivered, MessagePublished
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

NAME: Final = "emqx-kafka"
RETRY_S: Final = 1.0  # before a record that Kafka refused is sent again
LOG_INTERVAL_S: Final = 10.0  # between two log lines about dead letters
# For Kafka to acknowledge the rest; the next start reads what it has not
STOP_TIMEOUT_S: Final = 10.0


class TranslatedRecord(NamedTuple):
    """A record to produce, its source record, and what to call when Kafka has acknowledged it."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    source: Any
    on_acknowledged: Callable[[], None]


class KafkaBridge:
    """One per process."""

    def __init__(
        self, producer: Producer, rules: BridgeRules, mountpoint: Mountpoint | None = None
    ) -> None:
        """The caller starts and stops the producer."""
        self._producer, self._rules, self._mountpoint = producer, rules, mountpoint
        # Its size is bounded by the group consumer's limit of unfinished records.
        self._refused: asyncio.Queue[TranslatedRecord] = asyncio.Queue()
        self._dead_letters = 0

    async def handle(self, record: Any, claim: RecordClaim) -> None:
        """Translate one record of EMQX, and produce its events. Finish it when Kafka has acknowledged all of them."""
        try:
            events = [each for each in read(record.value, self._mountpoint) if self._wants(each)]
        except DecodeError as error:
            await self._send_dead_letter(record, str(error), claim.finish)
            return
        if not events:
            claim.finish()
            return
        on_acknowledged = _after(len(events), claim.finish)
        for event in events:
            key, value = keys.record_key(event).encode(), codec.encode(event)
            await self._send(
                TranslatedRecord(topic_of(event), key, value, (), record, on_acknowledged)
            )

    def _wants(self, event: Event) -> bool:
        """True if an agent needs the event. Deliveries and acknowledgements are many, and few rules need them."""
        if isinstance(event, MessageAcked):
            return self._rules.wants("message.acked", event.topic)
        if isinstance(event, MessageDelivered):
            return self._rules.wants("message.delivered", event.topic)
        return True

    async def _send_dead_letter(
        self, record: Any, reason: str, on_acknowledged: Callable[[], None]
    ) -> None:
        """Copy a source record that cannot be read or stored to the dead letters, with the reason."""
        self._dead_letters += 1
        headers = headers_of(
            record.topic, record.partition, record.offset, NAME, reason[:REASON_LENGTH_MAX]
        )
        await self._send(
            TranslatedRecord(
                keys.DEAD_LETTERS_TOPIC, record.key, record.value, headers, record, on_acknowledged
            )
        )

    # -- producing

    async def _send(self, record: TranslatedRecord) -> None:
        try:
            acknowledged = await self._producer.send(
                record.topic, record.key, record.value, None, record.headers
            )
        except MessageSizeTooLargeError as error:
            await self._give_up(record, error)
        else:
            acknowledged.add_done_callback(partial(self._answered, record))

    def _answered(self, record: TranslatedRecord, acknowledged: asyncio.Future[Any]) -> None:
        if acknowledged.cancelled():
            return
        if acknowledged.exception() is None:
            record.on_acknowledged()
        else:
            self._refused.put_nowait(record)

    async def _give_up(self, record: TranslatedRecord, error: Exception) -> None:
        """Replace a record that is too large at every attempt.

        The source record may be small enough for a dead letter. If not, the dead letter has no value; the source topic
        still holds the bytes.
        """
        reason = f"for {record.topic}, but too large"
        if record.topic != keys.DEAD_LETTERS_TOPIC:
            await self._send_dead_letter(record.source, reason, record.on_acknowledged)
            return
        marks = (*record.headers, ("not-produced", f"{reason}: {error}".encode()))
        await self._send(record._replace(key=None, value=b"", headers=marks))

    async def retry_refused(self) -> NoReturn:
        """Send the records that Kafka refused, one at a time, until cancelled.

        Kafka refuses a whole batch because of one of its records, so most of them succeed alone.
        """
        while True:
            record = await self._refused.get()
            try:
                acknowledged = await self._producer.send(
                    record.topic, record.key, record.value, None, record.headers
                )
                await acknowledged
            except MessageSizeTooLargeError as error:
                await self._give_up(record, error)
            except KafkaError as error:
                logger.warning(
                    "Kafka refused a record for %s, sending again in %g s: %r", record.topic, RETRY_S, error
                )  # fmt: skip
                self._refused.put_nowait(record)
                await asyncio.sleep(RETRY_S)
            else:
                record.on_acknowledged()

    async def log_dead_letters(self) -> NoReturn:
        """Log the number of dead letters, in one line for each interval, until cancelled."""
        logged = 0
        while True:
            await asyncio.sleep(LOG_INTERVAL_S)
            if self._dead_letters > logged:
                logger.warning(
                    "%d records became dead letters, %d since the start: see %s",
                    self._dead_letters - logged, self._dead_letters, keys.DEAD_LETTERS_TOPIC,
                )  # fmt: skip
                logged = self._dead_letters


def topic_of(event: Event) -> str:
    """The Kafka topic of an event."""
    if isinstance(event, MessagePublished | MessageAcked | MessageDelivered):
        return keys.MESSAGES_TOPIC
    return keys.CLIENTS_TOPIC


def _after(count: int, call: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `call` when it was called `count` times."""
    left = count

    def one() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            call()

    return one


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
    for rule in rules.run_by_delivery("pubsub"):
        reason = f"a pubsub rule ({rule.topic}) needs an EMQX listener with a mountpoint: [bridge] mountpoint"
        raise ConfigError(reason, file=rule.file, line=rule.line)


async def _run(settings: Settings, rules: Rules, topics: Sequence[str]) -> None:
    stop = asked_to_end()
    producer = Producer(settings.kafka.client_options(), settings.kafka.message_bytes_max)
    serving = asyncio.create_task(_serve(settings, rules, topics, producer))
    try:
        await until_asked(serving, stop)
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
    settings: Settings, rules: Rules, topics: Sequence[str], producer: Producer
) -> NoReturn:
    await _look_up(settings.kafka, topics)
    try:
        await producer.start()
    except KafkaError as error:
        raise await unreachable(settings.kafka) from error
    template = settings.bridge.mountpoint
    mountpoint = None if template is None else Mountpoint(template)
    bridge = KafkaBridge(producer, BridgeRules(rules), mountpoint)
    source = GroupConsumer(
        settings, keys.rule_events_group_id(settings.app), topics, bridge.handle, producer.flush
    )
    say_ready(f"bridge {NAME}")
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
