"""Carries commands out on an EMQX: copies as bulks of REST publishes, each client's in their order.

At least once: a publish whose answer is lost may have been routed, and is tried again, before anything later of its
client. A command that EMQX cannot be asked for fails as stale when its validity ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
from base64 import b64encode
from collections.abc import Sequence
from typing import Final, NoReturn

from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.emqx.delivery.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.delivery.windows import (
    AGAIN,
    Accepted,
    Bulk,
    CopyOutcome,
    DeliveryCopy,
    DeliveryWindows,
    SubscriptionChange,
)
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.brokers.emqx.rest.backoff import Backoff
from millpond.pipeline.brokers.emqx.rest.client import (
    PublishRequest,
    Refused,
    RestClient,
    RestError,
    Unanswered,
    Unauthorized,
)
from millpond.pipeline.brokers.emqx.rest.responses import (
    NO_MATCHING_SUBSCRIBERS,
    NOT_HANDED_OVER,
    PublishResult,
)
from millpond.pipeline.clock import now_ms
from millpond.schemas.codec import payload_bytes
from millpond.schemas.commands import Command, Deliver, Subscribe

logger = logging.getLogger(__name__)

REQUESTS_MAX: Final = 8  # under way at once, of one process
# How late it may be noticed that a command waits in vain: with 10,000 that wait, half a second. It takes 4 ms.
STALE_CHECK_INTERVAL_S: Final = 0.05
STALE_CHECK_ITEMS_MAX: Final = 1_000
ITS_OWN_FAULT: Final = (400, 413)  # statuses of a message that is refused, rather than of an EMQX


class BulkSender:
    """One per process."""

    def __init__(
        self,
        rest: RestClient,
        deliveries: Deliveries,
        copy_topic: CopyTopic,
        mountpoint: Mountpoint | None,
    ) -> None:
        """Without a `mountpoint` a copy reaches everyone who is subscribed to its topic."""
        self._rest, self._deliveries = rest, deliveries
        self._copy_topic, self._mountpoint = copy_topic, mountpoint
        self._windows, self._backoff = DeliveryWindows(), Backoff()
        self._wake = asyncio.Event()
        self._requests = 0
        self._idle = asyncio.Event()  # no request is under way
        self._idle.set()
        self._finishing = False

    # -- commands

    async def take(self, pending: PendingCommand, command: Command) -> None:
        """A command takes its place among those of its client."""
        if not isinstance(command, Deliver):
            self._windows.put(SubscriptionChange(pending, command))
        elif not self._reaches_alone(pending):
            self._deliveries.fail(pending, "bridge")
            return
        else:
            self._windows.put(DeliveryCopy(pending, command))
        self._wake.set()

    def _reaches_alone(self, pending: PendingCommand) -> bool:
        """Where the broker delivers, a stored message goes to everyone of its topic; a retained one for one subscriber
        must not: the broker hands out its own.
        """
        if self._mountpoint is None:
            return pending.lease is not None
        return self._mountpoint.can_serve(pending.client_id)

    def acked(self, client_id: str, alias: str) -> bool:
        """A client acknowledged a copy: there is room for one more. Whether its commands are carried out here."""
        known = self._windows.acked(client_id, alias)
        self._wake.set()
        return known

    def session_ended(self, client_id: str) -> None:
        """EMQX holds nothing for this client any more."""
        for item in self._windows.session_ended(client_id):
            if isinstance(item, SubscriptionChange):
                item.pending.done()  # its subscriptions are gone with it
            else:
                self._deliveries.fail(item.pending, "no_client")

    async def run(self) -> NoReturn:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drop_stale())
            while True:
                await self._wake.wait()
                self._wake.clear()
                if self._backoff.wait_s(loop.time()) > 0:
                    continue  # dropping stale commands wakes it again
                while (slots := self._slots()) > 0:
                    step = self._windows.next(slots, now_ms())
                    if step is None:
                        break
                    self._requests += 1
                    self._idle.clear()
                    tasks.create_task(self._carry_out(step))
        raise AssertionError("the loop never ends")

    async def finish(self) -> None:
        """Begin nothing more, and wait for what is under way: what EMQX has taken is then known."""
        self._finishing = True
        await self._idle.wait()

    def _slots(self) -> int:
        if self._finishing:
            return 0
        return (1 if self._backoff else REQUESTS_MAX) - self._requests

    async def _drop_stale(self) -> NoReturn:
        """Commands that wait for a slow client, or for EMQX, do not wait for ever."""
        while True:
            await asyncio.sleep(STALE_CHECK_INTERVAL_S)
            self._windows.drop_stale(
                STALE_CHECK_ITEMS_MAX, now_ms(), self._deliveries.fail_if_stale
            )
            self._wake.set()

    async def _carry_out(self, step: Bulk | SubscriptionChange) -> None:
        try:
            if isinstance(step, SubscriptionChange):
                await self._change(step)
            else:
                await self._send(step)
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()
            self._wake.set()

    # -- copies

    async def _send(self, bulk: Bulk) -> None:
        """What is no longer good by now fails in its turn, with what comes after it in its epoch."""
        valid = [
            part._replace(
                copies=[
                    copy for copy in part.copies if not self._deliveries.fail_if_stale(copy.pending)
                ]
            )
            for part in bulk
        ]
        outcomes = iter(await self._publish([copy for part in valid for copy in part.copies]))
        for part in valid:
            came = [self._once(copy, next(outcomes)) for copy in part.copies]
            self._windows.settle(part, came)
            for copy, outcome in zip(part.copies, came, strict=True):
                self._tell(copy, outcome)

    def _once(self, copy: DeliveryCopy, outcome: CopyOutcome) -> CopyOutcome:
        """A QoS 0 publish that is only passed on is not worth a second try: it might come twice."""
        passed_on = copy.pending.lease is None and not copy.command.qos
        return "refused" if outcome == "unknown" and passed_on else outcome

    def _tell(self, copy: DeliveryCopy, outcome: CopyOutcome) -> None:
        pending, command = copy
        if outcome == "nobody":
            self._deliveries.fail(pending, "no_client")
        elif outcome == "refused":
            self._deliveries.fail(pending, "bridge")
        elif outcome not in AGAIN:
            # With an acknowledgement to come, the hook has reported it sent, before EMQX answered.
            if command.qos:
                pending.done()
            else:
                self._deliveries.sent(pending, 0)

    async def _publish(self, copies: Sequence[DeliveryCopy]) -> list[CopyOutcome]:
        """What came of each. Of a bulk with one that EMQX refuses it takes none: the halves are tried by themselves."""
        if not copies:
            return []
        try:
            results = await self._rest.publish([self._message(copy) for copy in copies])
        except Refused as error:
            if error.status not in ITS_OWN_FAULT:
                self._failed(error)
                return ["unsent"] * len(copies)
            if len(copies) > 1:
                middle = len(copies) // 2
                first = await self._publish(copies[:middle])
                if self._backoff:
                    return [*first, *["unsent"] * (len(copies) - middle)]  # type: ignore[list-item]
                return [*first, *await self._publish(copies[middle:])]
            logger.error("a copy for %s is refused: %s", copies[0].pending.client_id, error)  # noqa: TRY400  no traceback
            return ["refused"]
        except Unanswered as error:
            self._failed(error)
            return ["unknown"] * len(copies)
        except RestError as error:
            self._failed(error)
            return ["unsent"] * len(copies)
        outcomes = [_outcome(result) for result in results]
        if "unsent" in outcomes:
            self._failed(Unanswered("EMQX could not hand over some copies; is it starting?"))
        else:
            self._succeeded()
        return outcomes

    def _message(self, copy: DeliveryCopy) -> PublishRequest:
        """Never with the retain flag: EMQX would retain it, where nobody but this client looks."""
        pending, command = copy
        client_id, topic = pending.client_id, command.topic
        if self._mountpoint is not None:
            topic = self._mountpoint.mount(client_id, topic)
        payload = (
            command.payload
            if command.payload_encoding == "base64"
            else b64encode(payload_bytes(command)).decode()
        )
        left_s = (pending.valid_until_ms - now_ms()) // 1000
        return PublishRequest(
            self._copy_topic.topic_for(command.lease, client_id, command.message_id, topic),
            payload, command.qos, {"message_expiry_interval": max(1, left_s)},
        )  # fmt: skip

    # -- changes

    async def _change(self, change: SubscriptionChange) -> None:
        pending = change.pending
        if self._deliveries.fail_if_stale(pending):
            self._windows.changed(change, again=False)
            return
        try:
            await self._carry_out_change(change)
        except Refused as error:
            again = error.status not in ITS_OWN_FAULT
            if again:
                self._failed(error)
            else:
                logger.error("%s: not carried out: %s", pending.client_id, error)  # noqa: TRY400  no traceback
        except RestError as error:
            self._failed(error)
            again = True
        else:
            self._succeeded()
            again = False
        self._windows.changed(change, again=again)
        if not again:
            pending.done()

    async def _carry_out_change(self, change: SubscriptionChange) -> None:
        client_id, command = change.pending.client_id, change.command
        if not isinstance(command, Subscribe):
            await self._rest.unsubscribe(client_id, command.topic_filters)
            return
        granted = await self._rest.subscribe(client_id, command.topic_filters)
        if granted is not None and granted.failed:
            logger.warning(
                "%s: EMQX does not grant %d of %d subscriptions",
                client_id, len(granted.failed), len(command.topic_filters),
            )  # fmt: skip

    # -- an EMQX that does not

    def _failed(self, error: RestError) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._backoff.failed(str(error), now_s, random.random()):  # noqa: S311  spreads attempts
            level = logging.ERROR if isinstance(error, Unauthorized) else logging.WARNING
            logger.log(level, "commands wait: %s", error)

    def _succeeded(self) -> None:
        if self._backoff.over():
            logger.warning("EMQX does what it is asked again: commands go on")


def _outcome(result: PublishResult) -> CopyOutcome:
    if result.id is not None:
        return Accepted(result.id)
    if result.reason_code == NO_MATCHING_SUBSCRIBERS:
        return "nobody"
    return "unsent" if result.reason_code == NOT_HANDED_OVER else "refused"
