"""Retained look-ups: ask EMQX for a topic's retained message after a publish that a retain rule covers.

EMQX's hooks do not report the retain flag. But EMQX retains a message before it calls the hook, at the topic of the
PUBLISH packet, which has the mountpoint of its publisher. So the bridge asks REST a moment later.

One look-up serves all publishes of the topic so far. It produces `message.retained` only for news:

- a message with another id than the last look-up found,
- no message, after a publish with an empty payload: that is how MQTT clears a retained message ([MQTT-3.3.1-10]).
"""

from __future__ import annotations

import asyncio
import logging
import random
from base64 import b64decode
from binascii import Error as Base64Error
from collections import OrderedDict
from typing import Final, NamedTuple, NoReturn

from millpond.pipeline.brokers.emqx.rest.backoff import Backoff
from millpond.pipeline.brokers.emqx.rest.client import NoPath, RestClient
from millpond.pipeline.brokers.emqx.rest.responses import RetainedRow
from millpond.pipeline.brokers.emqx.times import milliseconds
from millpond.pipeline.brokers.spool.durable_producer import DurableProducer
from millpond.pipeline.clock import now_ms
from millpond.schemas import codec, keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import MessagePublished, MessageRetained

logger = logging.getLogger(__name__)

LOOKUP_DELAY_S: Final = 0.1  # by then the other nodes of a cluster know the retained message
LOOKUPS_MAX: Final = 4  # under way at the same time
TOPICS_MAX: Final = 10_000  # that wait for a look-up; later ones are missed and counted
KNOWN_MAX: Final = 100_000  # topics whose last result is known; a forgotten one costs an event
UNKNOWN: Final = "?"  # no message has this id


class _Request(NamedTuple):
    publish: MessagePublished  # the latest one of the topic
    cleared: bool  # one of the publishes since the last look-up had an empty payload


class RetainedLookup:
    """One per process."""

    def __init__(self, rest: RestClient, durable_producer: DurableProducer) -> None:
        self._rest, self._durable_producer = rest, durable_producer
        self._waiting: dict[str, _Request] = {}  # by topic with mountpoint, in order
        self._known: OrderedDict[str, str] = OrderedDict()  # topic → message id; "" for no message
        self._added = asyncio.Event()
        self._backoff = Backoff()
        self.missed = 0

    def ask(self, broker_topic: str, publish: MessagePublished) -> None:
        """Request a look-up of `broker_topic`: the topic of `publish` with the mountpoint in front."""
        before = self._waiting.get(broker_topic)
        if before is None and len(self._waiting) >= TOPICS_MAX:
            if not self.missed:
                logger.error(
                    "%d topics wait for a look-up of their retained message: later ones are missed", TOPICS_MAX
                )  # fmt: skip
            self.missed += 1
            return
        cleared = not publish.payload or (before is not None and before.cleared)
        self._waiting[broker_topic] = _Request(publish, cleared)
        self._added.set()

    async def run(self) -> NoReturn:
        """Look up until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(LOOKUPS_MAX):
                tasks.create_task(self._work())
        raise AssertionError("the tasks run until they are cancelled")

    async def _work(self) -> NoReturn:
        while True:
            await self._added.wait()
            await asyncio.sleep(max(LOOKUP_DELAY_S, self._backoff.wait_s(_time_s())))
            if not self._waiting:
                self._added.clear()
                continue
            broker_topic = next(iter(self._waiting))
            request = self._waiting.pop(broker_topic)
            try:
                await self._found(broker_topic, request, await self._rest.retained(broker_topic))
            except NoPath as error:
                logger.error("the retained message of %r is not stored: %s", broker_topic, error)  # noqa: TRY400  no traceback
                continue
            except MillpondError as error:
                self._retry(broker_topic, request, error)
                continue
            if self._backoff.succeeded():
                logger.warning("EMQX answers look-ups of retained messages again")

    def _retry(self, broker_topic: str, request: _Request, error: MillpondError) -> None:
        newer = self._waiting.get(broker_topic)
        if newer is None:
            self._waiting[broker_topic] = request
        else:
            self._waiting[broker_topic] = newer._replace(cleared=newer.cleared or request.cleared)
        self._added.set()
        if self._backoff.failed(str(error), _time_s(), random.random()):  # noqa: S311  spreads attempts
            logger.warning("a look-up of a retained message failed, the bridge retries: %s", error)

    async def _found(self, broker_topic: str, request: _Request, found: RetainedRow | None) -> None:
        message_id = "" if found is None else found.msgid
        known = self._known.get(broker_topic, UNKNOWN)
        if message_id == known or (found is None and not request.cleared):
            return
        event = _cleared(request.publish) if found is None else _retained(request.publish, found)
        if event is None:
            logger.error(
                "a retained message is not stored: its payload exceeds 1 MiB, which EMQX's REST API does not return"
            )  # fmt: skip
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
