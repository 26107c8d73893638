"""The bridge that reads what EMQX's own Kafka data bridge wrote: rule events in, canonical events out."""

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
from millpond.pipeline.kafka.consumer import GroupConsumer
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
AGAIN_S: Final = 1.0  # before what Kafka refused is sent again
REPORT_INTERVAL_S: Final = 10.0  # how often the log says how much went to the dead letters
STOP_TIMEOUT_S: Final = 10.0  # for Kafka to take what is left; what it does not take is read again


class TranslatedRecord(NamedTuple):
    """One record to be, what it comes from, and what to call when Kafka has it."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    source: Any
    on_kept: Callable[[], None]


class KafkaBridge:
    """One per process. Nothing is reordered and nothing waits for anything: the agents need no order."""

    def __init__(
        self, producer: Producer, answers: BridgeRules, mountpoint: Mountpoint | None = None
    ) -> None:
        """The producer is started by who owns it."""
        self._producer, self._answers, self._mountpoint = producer, answers, mountpoint
        self._refused: asyncio.Queue[TranslatedRecord] = (
            asyncio.Queue()
        )  # bounded by what may be unfinished
        self._buried = 0

    async def handle(self, record: Any, done: Callable[[], None]) -> None:
        """Translate one record of EMQX, and produce what it says."""
        try:
            told = [each for each in read(record.value, self._mountpoint) if self._wants(each)]
        except DecodeError as error:
            await self._bury(record, str(error), done)
            return
        if not told:
            done()
            return
        on_kept = _after(len(told), done)
        for event in told:
            key = keys.record_key(event).encode()
            await self._send(
                TranslatedRecord(topic_of(event), key, codec.encode(event), (), record, on_kept)
            )

    def _wants(self, event: Event) -> bool:
        """Whether an agent has a use for it: deliveries and acks are many, and few rules ask for them."""
        if isinstance(event, MessageAcked):
            return self._answers.wants("message.acked", event.topic)
        if isinstance(event, MessageDelivered):
            return self._answers.wants("message.delivered", event.topic)
        return True

    async def _bury(self, record: Any, reason: str, on_kept: Callable[[], None]) -> None:
        """Nobody can read it: its own bytes, and why."""
        self._buried += 1
        headers = headers_of(
            record.topic, record.partition, record.offset, NAME, reason[:REASON_LENGTH_MAX]
        )
        await self._send(
            TranslatedRecord(
                keys.DEAD_LETTERS_TOPIC, record.key, record.value, headers, record, on_kept
            )
        )

    # -- into Kafka

    async def _send(self, letter: TranslatedRecord) -> None:
        try:
            acknowledged = await self._producer.send(
                letter.topic, letter.key, letter.value, None, letter.headers
            )
        except MessageSizeTooLargeError as error:
            await self._give_up(letter, error)
        else:
            acknowledged.add_done_callback(partial(self._answered, letter))

    def _answered(self, letter: TranslatedRecord, acknowledged: asyncio.Future[Any]) -> None:
        if acknowledged.cancelled():
            return
        if acknowledged.exception() is None:
            letter.on_kept()
        else:
            self._refused.put_nowait(letter)

    async def _give_up(self, letter: TranslatedRecord, error: Exception) -> None:
        """It is too large, and would be so at every attempt. As a dead letter it may be small enough; else that is
        only told, and the source still has its bytes.
        """
        if letter.topic != keys.DEAD_LETTERS_TOPIC:
            await self._bury(letter.source, f"for {letter.topic}, but too large", letter.on_kept)
            return
        reason = f"for {letter.topic}, but too large: {error}".encode()
        marks = (*letter.headers, ("not-produced", reason))
        await self._send(letter._replace(key=None, value=b"", headers=marks))

    async def send_again(self) -> NoReturn:
        """What Kafka refused, one by one: it refuses a whole batch for one record of it. Until cancelled."""
        while True:
            letter = await self._refused.get()
            try:
                acknowledged = await self._producer.send(
                    letter.topic, letter.key, letter.value, None, letter.headers
                )
                await acknowledged
            except MessageSizeTooLargeError as error:
                await self._give_up(letter, error)
            except KafkaError as error:
                logger.warning("Kafka refused a record for %s: %r", letter.topic, error)
                self._refused.put_nowait(letter)
                await asyncio.sleep(AGAIN_S)
            else:
                letter.on_kept()

    async def report(self) -> NoReturn:
        """Tell the log of dead letters, many in one line. Until cancelled."""
        told = 0
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            if self._buried > told:
                logger.warning(
                    "%d records could not be read, %d since the start: see %s",
                    self._buried - told, self._buried, keys.DEAD_LETTERS_TOPIC,
                )  # fmt: skip
                told = self._buried


def topic_of(event: Event) -> str:
    """The Kafka topic of an event."""
    if isinstance(event, MessagePublished | MessageAcked | MessageDelivered):
        return keys.MESSAGES_TOPIC
    return keys.CLIENTS_TOPIC


def _after(count: int, call: Callable[[], None]) -> Callable[[], None]:
    """What makes a call when it has been called so often."""
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
        MillpondError: Kafka cannot be reached at the start, or has no such topic; or a rule needs what no bridge can do.
    """
    if settings.bridge.mountpoint is None:
        _refuse_pubsub(rules)
    use_uvloop()
    asyncio.run(_run(settings, rules, topics))


def _refuse_pubsub(rules: Rules) -> None:
    """Without a mountpoint no client can be reached alone, and each subscriber of a log reads on by itself."""
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
        logger.warning("Kafka has not taken everything in time: what is left is read again")


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
    source = GroupConsumer(settings, keys.rule_events_group_id(settings.app), topics, bridge.handle)
    say_ready(f"bridge {NAME}")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(source.run())
        tasks.create_task(bridge.send_again())
        tasks.create_task(bridge.report())
    raise AssertionError("none of them ever returns")


async def _look_up(settings: KafkaSettings, topics: Sequence[str]) -> None:
    """See that the topics are there: a consumer would wait for one that is misspelled, and say nothing."""
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
            f"Kafka has no topic {', '.join(missing)}: EMQX's sink names where it writes"
        )
