"""Carries out on the embedded broker what `mqtt.deliveries` asks for."""

from __future__ import annotations

import logging
import time
from typing import Any, Final, NoReturn

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from agents.dead_letters import headers_of
from pipeline.brokers.embedded.broker import EmbeddedBroker
from pipeline.brokers.embedded.handler import Handler, Payload
from pipeline.brokers.embedded.recorder import Recorder
from pipeline.log import persist
from pipeline.producer import Producer
from pipeline.settings import Settings
from schemas import codec, keys
from schemas.commands import Command, Deliver, Subscribe, Unsubscribe
from schemas.errors import DecodeError
from schemas.events import MessagePublished

logger = logging.getLogger(__name__)

RECORDS_MAX: Final = 500  # of one turn: then Kafka is told how far we are


class Commander:
    """One per bridge. A command is committed when what came of it is in Kafka."""

    def __init__(
        self, settings: Settings, broker: EmbeddedBroker, recorder: Recorder, producer: Producer
    ) -> None:
        """`run` connects."""
        self._broker, self._recorder, self._producer = broker, recorder, producer
        self._consumer = AIOKafkaConsumer(
            keys.DELIVERIES_TOPIC,
            group_id=keys.bridge_group_id(settings.app),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            **settings.kafka.client_options(),
        )

    async def run(self) -> NoReturn:
        """Until cancelled."""
        await persist(self._consumer.start)
        try:
            while True:
                fetched = await self._consumer.getmany(timeout_ms=1_000, max_records=RECORDS_MAX)
                for records in fetched.values():
                    for record in records:
                        await self._carry_out(record)
                if fetched:
                    await self._recorder.drain()
                    await self._commit()
        finally:
            await self._consumer.stop()

    async def _commit(self) -> None:
        """What is not committed comes again, and changes nothing then."""
        try:
            await self._consumer.commit()
        except KafkaError as error:
            logger.warning("commands carried out are not committed yet: %r", error)

    async def _carry_out(self, record: Any) -> None:
        try:
            command = codec.decode_command(record.value)
        except DecodeError as error:
            # Only agents write here: it is a newer one's, or somebody else's.
            headers = headers_of(
                record.topic, record.partition, record.offset, "bridge", str(error)
            )
            await self._producer.send(
                keys.DEAD_LETTERS_TOPIC, record.key, record.value, None, headers
            )
            return
        await self._do(command, record.timestamp)

    async def _do(self, command: Command, log_ms: int) -> None:
        broker = self._broker
        session, handler = broker.session_of(command.client_id)
        if session is None:
            return  # it has gone, and so has what was wanted for it
        now_ms = time.time_ns() // 1_000_000
        if now_ms > log_ms + command.valid_for_s * 1000:
            logger.info("%s: a command came too late", command.client_id)
            return
        match command:
            case Subscribe(topic_filters=filters):
                for subscription in filters:
                    await broker.subscribe(subscription, session, proxied=True)
            case Unsubscribe(topic_filters=names):
                for topic_filter in names:
                    await broker.unsubscribe(topic_filter, session)
            case Deliver() if isinstance(handler, Handler) and handler.connected:
                event = _message(command, now_ms)
                payload = Payload.of(codec.payload_bytes(event), event)
                broker.hand_over(
                    handler.mqtt_publish(event.topic, payload, event.qos, event.retain)
                )


def _message(command: Deliver, now_ms: int) -> MessagePublished:
    """The message to be handed over, as the broker knows messages."""
    return MessagePublished(
        at=now_ms, node=keys.AGENT_NODE, message_id=command.message_id, topic=command.topic,
        qos=command.qos, retain=command.retain, client_id="", payload=command.payload,
        payload_encoding=command.payload_encoding, published_at=now_ms,
        expires_at=command.expires_at,
    )  # fmt: skip
