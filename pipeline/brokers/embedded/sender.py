"""Writes what a session has to get to its client's connection, one copy after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from amqtt.adapters import WriterAdapter

from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.embedded.event_producer import EventProducer
from millpond.pipeline.brokers.embedded.outgoing import (
    Expired,
    Ordered,
    Outgoing,
    OutgoingChange,
    OutgoingCopy,
    Release,
    Step,
)
from millpond.pipeline.brokers.embedded.wire import pubrel_packet
from millpond.pipeline.clock import now_ms


class ConnectionSender:
    """One per connection. No more than the socket takes, and one copy, is ever written ahead."""

    def __init__(
        self,
        client_id: str,
        outgoing: Outgoing,
        deliveries: Deliveries,
        event_producer: EventProducer,
        change: Callable[[OutgoingChange], Awaitable[None]],
    ) -> None:
        """`change` carries out what concerns subscriptions."""
        self._client_id, self._outgoing = client_id, outgoing
        self._deliveries, self._event_producer, self._change = deliveries, event_producer, change
        self._in_hand: Ordered | None = None  # what had its turn, and is not written

    async def run(
        self, writer: WriterAdapter, write_lock: asyncio.Lock, is_open: Callable[[], bool]
    ) -> None:
        """Until the connection ends or this is cancelled: what has not had its turn by then is in `outgoing` still.

        Raises:
            OSError: the client is gone.
        """
        self._writer, self._write_lock, self._is_open = writer, write_lock, is_open
        more = asyncio.Event()
        self._outgoing.wake = more.set
        self._outgoing.resume()
        try:
            while is_open():
                more.clear()
                step = self._outgoing.next(now_ms())
                if step is None:
                    await more.wait()
                else:
                    await self._do(step)
        finally:
            if self._in_hand is not None:
                self._outgoing.put_back(self._in_hand)

    async def _do(self, step: Step) -> None:
        match step:
            case Release(packet_id):
                await self._write(lambda: self._writer.write(pubrel_packet(packet_id)))
            case Expired(pending):
                self._deliveries.expired(pending)
            case OutgoingChange():
                self._in_hand = step
                if not self._deliveries.drop_if_over(step.pending):
                    await self._change(step)
                self._in_hand = None
            case OutgoingCopy() if step.packet_id:
                await self._write(partial(self._write_again, step))
            case OutgoingCopy():
                self._in_hand = step
                if self._still_good(step):
                    await self._event_producer.delivered(step.message, self._client_id, step.qos)
                    await self._write(partial(self._write_first, step))

    async def _write(self, write: Callable[[], None]) -> None:
        """The answers of amqtt are written to the same connection. When it has the lock, it may be over."""
        async with self._write_lock:
            if self._is_open():
                write()
                await self._writer.drain()

    def _write_again(self, copy: OutgoingCopy) -> None:
        if self._outgoing.is_open(copy):
            self._writer.write(copy.packet())

    def _write_first(self, copy: OutgoingCopy) -> None:
        """Once written it counts as sent: its acknowledgement may come before `drain` returns."""
        if not self._still_good(copy):
            return
        self._outgoing.launch(copy)
        try:
            self._writer.write(copy.packet())
        except OSError:
            self._outgoing.recall(copy)
            raise
        self._in_hand = None
        self._outgoing.newest_sent.sent(copy.message.topic, copy.message.message_id, now_ms())
        if copy.pending is not None:
            self._deliveries.sent(copy.pending, copy.qos)

    def _still_good(self, copy: OutgoingCopy) -> bool:
        valid = copy.pending is None or not self._deliveries.drop_if_over(copy.pending)
        if valid and copy.retain and self._is_covered(copy):
            valid = False
            if copy.pending is not None:
                self._deliveries.fail(copy.pending, "stale")
        if not valid:
            self._in_hand = None
        return valid

    def _is_covered(self, copy: OutgoingCopy) -> bool:
        """True if a retained message is not newer than what the client got of its topic since it subscribed."""
        message = copy.message
        return self._outgoing.newest_sent.covers(message.topic, message.message_id)
