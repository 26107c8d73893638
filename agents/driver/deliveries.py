"""Outputs with a message, as Kafka records: deliveries to a client, and dead letters of messages.

The record that published a message in this batch has its payload. For any other message, the body is read from the
store after the transaction that leased it, many bodies at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from millpond.agents.driver.dead_letters import headers_of
from millpond.agents.effects import DeadLetterMessage, DeliverMessage
from millpond.agents.ports import OutgoingRecord, Record
from millpond.agents.reads import Read, ReadBody
from millpond.schemas import codec, keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S, Command, Deliver
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import DeliveryFailed, MessagePublished, PayloadEncoding
from millpond.schemas.keys import Partition
from millpond.schemas.leases import lease_name

# Bodies read at once: some MiB, unless messages are large.
BODIES_READ_MAX: Final = 100

MessageOutput: TypeAlias = DeliverMessage | DeadLetterMessage


class DeliverableMessage(NamedTuple):
    """The parts of a message that a client gets. `expires_at` is the message's own expiry in ms, or None."""

    qos: int
    payload: str
    payload_encoding: PayloadEncoding
    expires_at: int | None


class DeliveryRecords:
    """Makes the Kafka records of one partition's outputs with a message."""

    def __init__(
        self, partition: Partition, read: Callable[[Sequence[Read]], Awaitable[list[Any]]]
    ) -> None:
        """`read` is the store's."""
        self._partition, self._read = partition, read

    async def records(
        self, outputs: Sequence[MessageOutput], sources: Mapping[int, Record | None]
    ) -> AsyncIterator[OutgoingRecord]:
        """Yield the records in order.

        A leased message whose body is gone becomes a `delivery.failed` in the agent's own partition: it ends the lease.
        Without a lease nothing is produced.
        """
        for chunk in _chunks(outputs):
            found = [published(output, sources.get(output.offset)) for output in chunk]
            missing = [
                output for output, message in zip(chunk, found, strict=True)
                if message is None and (isinstance(output, DeadLetterMessage) or output.stored)
            ]  # fmt: skip
            reads = [ReadBody(output.message_id) for output in missing]
            bodies = iter(await self._read(reads)) if reads else iter(())
            stored = {
                id(output): stored_message(body)
                for output, body in zip(missing, bodies, strict=True)
            }
            for output, message in zip(chunk, found, strict=True):
                record = self._record(output, message or stored.get(id(output)))
                if record is not None:
                    yield record

    def _record(
        self, output: MessageOutput, message: DeliverableMessage | None
    ) -> OutgoingRecord | None:
        if isinstance(output, DeadLetterMessage):
            return self._dead_letter(output, message)
        if message is not None:
            return to_bridge(self._deliver(output, message))
        return self._failed(output) if output.lease else None

    def _deliver(self, output: DeliverMessage, message: DeliverableMessage) -> Deliver:
        ends = [at for at in (output.expires_at, message.expires_at) if at is not None]
        return Deliver(
            client_id=output.client_id,
            lease=lease_name(self._partition, output.lease) if output.lease else "",
            epoch=output.epoch, valid_for_s=COMMAND_VALID_FOR_S, attempt=output.attempt,
            message_id=output.message_id, topic=output.topic,
            qos=min(output.qos, message.qos),  # [MQTT-3.8.4-6]
            retain=False,  # [MQTT-3.3.1-9]
            payload=message.payload, payload_encoding=message.payload_encoding,
            expires_at=min(ends, default=None), valid_until=output.valid_until,
        )  # fmt: skip

    def _failed(self, output: DeliverMessage) -> OutgoingRecord:
        event = DeliveryFailed(
            at=0, node=keys.AGENT_NODE, agent=self._partition.agent,
            lease=lease_name(self._partition, output.lease), client_id=output.client_id,
            message_id=output.message_id, reason="gone",
        )  # fmt: skip
        key = keys.record_key(event).encode()
        return OutgoingRecord(
            self._partition.topic, key, codec.encode(event), (), self._partition.number
        )

    def _dead_letter(
        self, output: DeadLetterMessage, message: DeliverableMessage | None
    ) -> OutgoingRecord:
        """Return the dead letter of a message: key is the topic, value the payload as it was published."""
        topic, number, agent = self._partition.topic, self._partition.number, self._partition.agent
        headers = (
            *headers_of(topic, number, output.offset, agent, output.reason),
            ("message-id", output.message_id.encode()),
            ("deliveries", b"%d" % output.deliveries),
        )
        payload = None if message is None else codec.payload_bytes(message)
        return OutgoingRecord(keys.DEAD_LETTERS_TOPIC, output.topic.encode(), payload, headers)


def _chunks(outputs: Sequence[MessageOutput]) -> Iterator[Sequence[MessageOutput]]:
    for first in range(0, len(outputs), BODIES_READ_MAX):
        yield outputs[first : first + BODIES_READ_MAX]


def published(output: MessageOutput, source: Record | None) -> DeliverableMessage | None:
    """Return the message if the output's source record is its publish, else None."""
    if source is None or source.key != output.topic.encode():
        return None
    try:
        event = codec.decode(source.value)
    except DecodeError:
        return None
    if not isinstance(event, MessagePublished) or event.message_id != output.message_id:
        return None
    return DeliverableMessage(event.qos, event.payload, event.payload_encoding, event.expires_at)


def stored_message(body: Mapping[str, bytes]) -> DeliverableMessage | None:
    """Return the message in a stored body; None if the body is gone, or the key is not Millpond's."""
    try:
        qos, expiry = int(body["qos"]), body.get("expires_at")
        expires_at = None if expiry is None else int(expiry)
    except (KeyError, ValueError):
        return None
    if qos not in (0, 1, 2):
        return None
    return DeliverableMessage(qos, *codec.payload_text(body.get("payload", b"")), expires_at)


def to_bridge(command: Command) -> OutgoingRecord:
    """Return the Kafka record of a command. Its key is the client id: the commands of a client stay in order."""
    return OutgoingRecord(keys.DELIVERIES_TOPIC, command.client_id.encode(), codec.encode(command))
