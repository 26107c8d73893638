"""Asks EMQX what it retains, after a publish that a retain rule covers: its hooks do not tell.

EMQX retains a message before it calls the hook, under the topic that it was published to: with the mountpoint of its
publisher. One look answers for all publishes of a topic so far. Only news is written: another message than was found
there last, or none after a publish with an empty payload, which is how MQTT clears it ([MQTT-3.3.1-10]).
"""

from __future__ import annotations

import asyncio
import logging
import random
from base64 import b64decode
from binascii import Error as Base64Error
from collections import OrderedDict
from typing import Final, NamedTuple, NoReturn

from millpond.pipeline.brokers.emqx.ports import Keeping
from millpond.pipeline.brokers.emqx.rest.backoff import Backoff
from millpond.pipeline.brokers.emqx.rest.client import RestClient
from millpond.pipeline.brokers.emqx.rest.responses import RetainedRow, milliseconds
from millpond.pipeline.clock import now_ms
from millpond.schemas import codec, keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import MessagePublished, MessageRetained

logger = logging.getLogger(__name__)

LOOK_AFTER_S: Final = 0.1  # a cluster's other nodes know of it by then
LOOKS_MAX: Final = 4  # under way at once
TOPICS_MAX: Final = (
    10_000  # that wait for a look; past that a publish is not looked after, and counted
)
KNOWN_MAX: Final = 100_000  # topics whose last answer is remembered
UNKNOWN: Final = "?"  # no message has this id


class _Asked(NamedTuple):
    publish: MessagePublished
    cleared: bool  # one of the publishes since the last look had an empty payload


class RetainedLookup:
    """One per process."""

    def __init__(self, rest: RestClient, durable_producer: Keeping) -> None:
        """`run` looks."""
        self._rest, self._durable_producer = rest, durable_producer
        self._waiting: dict[str, _Asked] = {}  # in order
        self._known: OrderedDict[str, str] = OrderedDict()  # topic → message id; "" for none
        self._added = asyncio.Event()
        self._backoff = Backoff()
        self.missed = 0

    def ask(self, broker_topic: str, publish: MessagePublished) -> None:
        """Look soon: `publish` came in on `broker_topic`, which is its topic with the mountpoint in front."""
        before = self._waiting.get(broker_topic)
        if before is None and len(self._waiting) >= TOPICS_MAX:
            if not self.missed:
                logger.error(
                    "more retained messages to look for than %d: some are missed", TOPICS_MAX
                )
            self.missed += 1
            return
        cleared = not publish.payload or (before is not None and before.cleared)
        self._waiting[broker_topic] = _Asked(publish, cleared)
        self._added.set()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(LOOKS_MAX):
                tasks.create_task(self._look_on())
        raise AssertionError("none of them ever returns")

    async def _look_on(self) -> NoReturn:
        while True:
            await self._added.wait()
            await asyncio.sleep(max(LOOK_AFTER_S, self._backoff.wait_s(_time_s())))
            if not self._waiting:
                self._added.clear()
                continue
            broker_topic = next(iter(self._waiting))
            asked = self._waiting.pop(broker_topic)
            try:
                await self._found(broker_topic, asked, await self._rest.retained(broker_topic))
            except MillpondError as error:
                self._again(broker_topic, asked, error)
                continue
            if self._backoff.over():
                logger.warning("EMQX tells again what it retains")

    def _again(self, broker_topic: str, asked: _Asked, error: MillpondError) -> None:
        newer = self._waiting.get(broker_topic)
        if newer is None:
            self._waiting[broker_topic] = asked
        else:
            self._waiting[broker_topic] = newer._replace(cleared=newer.cleared or asked.cleared)
        self._added.set()
        if self._backoff.failed(str(error), _time_s(), random.random()):  # noqa: S311  spreads attempts
            logger.warning("retained messages are not known: %s", error)

    async def _found(self, broker_topic: str, asked: _Asked, found: RetainedRow | None) -> None:
        message_id = "" if found is None else found.msgid
        known = self._known.get(broker_topic, UNKNOWN)
        if message_id == known or (found is None and not asked.cleared):
            return
        event = _cleared(asked.publish) if found is None else _retained(asked.publish, found)
        if event is None:
            logger.error("a retained message of more than 1 MiB: EMQX does not tell its payload")
            return
        await self._durable_producer.enter(keys.MESSAGES_TOPIC, event, hook="retained")
        self._known[broker_topic] = message_id
        self._known.move_to_end(broker_topic)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)


def _cleared(publish: MessagePublished) -> MessageRetained:
    return MessageRetained(
        at=now_ms(), node=publish.node, message_id=publish.message_id, topic=publish.topic,
        qos=publish.qos, retain=True, client_id=publish.client_id, username=publish.username,
        payload="", published_at=publish.published_at,
    )  # fmt: skip


def _retained(publish: MessagePublished, found: RetainedRow) -> MessageRetained | None:
    if found.payload is None:
        return None
    try:
        payload, encoding = codec.payload_text(b64decode(found.payload, validate=True))
    except Base64Error:
        return None
    same = found.msgid == publish.message_id
    at = milliseconds(found.publish_at)
    return MessageRetained(
        at=now_ms(), node=publish.node, message_id=found.msgid, topic=publish.topic,
        qos=found.qos, retain=True, client_id=found.from_clientid,
        username=found.from_username or None, payload=payload, payload_encoding=encoding,
        published_at=publish.published_at if same or at is None else at,
        expires_at=publish.expires_at if same else None,
        user_properties=publish.user_properties if same else {},
    )  # fmt: skip


def _time_s() -> float:
    return asyncio.get_running_loop().time()
