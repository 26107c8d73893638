"""The sender of an EMQX bridge: it carries out commands through EMQX's REST API.

Copies go out as bulk publishes. `DeliveryWindows` decides which copies of which clients go next, in each client's
order. Delivery is at least once: if the answer to a publish is lost, EMQX may have routed it. The sender repeats it,
before anything later of its client.

| EMQX's answer | outcome of a copy | what follows |
|---|---|---|
| routed, with an id | `Accepted` | QoS 0: report `sent`. QoS 1 and 2: the hook reported `sent` before EMQX answered |
| no matching subscriber | `no_subscriber` | report `failed(no_client)` |
| 400 or 413, or another reason code | `refused`; a bulk is halved down to one copy before | report `failed(bridge)` |
| another 4xx, a failed hand-over (0x83), no connection | `unsent` | back off, then repeat |
| no answer, 5xx, an unreadable answer | `unknown` | back off, then repeat copy by copy |

A command that waits too long fails as stale.
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
from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.delivery.windows import (
    REPEATED,
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
    REQUEST_FAULTS,
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
from millpond.schemas.leases import LeaseName
from millpond.schemas.topics import filter_error

logger = logging.getLogger(__name__)

REQUESTS_MAX: Final = 8  # of one process at the same time
# A call checks so many items, which takes 4 ms. So with 10,000 waiting commands a stale one is noticed within 0.5 s.
STALE_CHECK_INTERVAL_S: Final = 0.05
STALE_CHECK_ITEMS_MAX: Final = 1_000


class BulkSender:
    """One per process. A `CommandHandler`."""

    def __init__(
        self,
        rest: RestClient,
        deliveries: Deliveries,
        copy_topic: CopyTopic,
        mountpoint: Mountpoint | None,
    ) -> None:
        """Without a `mountpoint` a copy reaches every subscriber of its topic."""
        self._rest, self._deliveries = rest, deliveries
        self._copy_topic, self._mountpoint = copy_topic, mountpoint
        self._windows, self._backoff = DeliveryWindows(), Backoff()
        self._wake = asyncio.Event()
        self._requests = 0  # under way
        self._idle = asyncio.Event()  # set while no request is under way
        self._idle.set()
        self._finishing = False  # start no more requests

    # -- commands

    async def take(self, pending: PendingCommand, command: Command) -> None:
        if not isinstance(command, Deliver):
            self._windows.put(SubscriptionChange(pending, command))
        elif not self._may_deliver(pending):
            self._deliveries.fail(pending, "bridge")
            return
        else:
            self._windows.put(DeliveryCopy(pending, command))
        self._wake.set()

    def filter_refusal(self, topic_filter: str) -> str | None:
        """See `CommandHandler`. EMQX serves every filter that is one, for what Millpond does not deliver."""
        return filter_error(topic_filter)

    def _may_deliver(self, pending: PendingCommand) -> bool:
        """True if the copy reaches its client, and does not disturb other clients.

        Without a mountpoint every subscriber of the topic gets the copy. That is accepted for a stored message (it has
        a lease). It is not for a retained message, which is meant for one new subscriber: EMQX sends its own.
        """
        if self._mountpoint is None:
            return pending.lease is not None
        return self._mountpoint.can_serve(pending.client_id)

    def acked(self, client_id: str, alias: str) -> bool:
        """Free the room of an acknowledged copy. True if no other process can have sent the copy."""
        pending = self._windows.acked(client_id, alias)
        lease = None if pending is None else pending.lease
        self._deliveries.active_members.acked(client_id, lease)
        self._wake.set()
        return pending is not None

    def unacknowledged(self, client_id: str) -> list[LeaseName]:
        """The leases of the copies that EMQX has for a client."""
        return self._windows.unacknowledged(client_id)

    def session_ended(self, client_id: str) -> None:
        """Fail the waiting copies of a client whose session ended, because EMQX holds nothing for it any more."""
        for item in self._windows.session_ended(client_id):
            # The subscriptions ended with the session, so a change of them is done.
            if isinstance(item, SubscriptionChange):
                item.pending.done()
            else:
                self._deliveries.fail(item.pending, "no_client")

    async def run(self) -> NoReturn:
        """Send requests until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drop_stale())
            while True:
                await self._wake.wait()
                self._wake.clear()
                # `_drop_stale` sets the event again in `STALE_CHECK_INTERVAL_S`.
                if self._backoff.wait_s(loop.time()) > 0:
                    continue
                while (slots := self._slots()) > 0:
                    step = self._windows.next(slots, now_ms())
                    if step is None:
                        break
                    self._requests += 1
                    self._idle.clear()
                    tasks.create_task(self._carry_out(step))
        raise AssertionError("the loop never ends")

    async def finish(self) -> None:
        """Start no more requests, and wait for the running ones: their results must be reported."""
        self._finishing = True
        await self.settle()

    async def settle(self) -> None:
        await self._idle.wait()

    def _slots(self) -> int:
        if self._finishing:
            return 0
        return (1 if self._backoff else REQUESTS_MAX) - self._requests

    async def _drop_stale(self) -> NoReturn:
        """Fail commands that have waited too long for a slow client, or for EMQX."""
        while True:
            await asyncio.sleep(STALE_CHECK_INTERVAL_S)
            self._windows.drop_stale(STALE_CHECK_ITEMS_MAX, now_ms(), self._deliveries.drop_if_over)
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
        """Publish the copies of a bulk that are still valid, and report their outcomes."""
        valid = [
            part._replace(
                copies=[
                    copy for copy in part.copies if not self._deliveries.drop_if_over(copy.pending)
                ]
            )
            for part in bulk
        ]
        outcomes = iter(await self._publish([copy for part in valid for copy in part.copies]))
        for part in valid:
            settled = [self._final(copy, next(outcomes)) for copy in part.copies]
            self._windows.settle(part, settled)
            for copy, outcome in zip(part.copies, settled, strict=True):
                self._report(copy, outcome)

    def _final(self, copy: DeliveryCopy, outcome: CopyOutcome) -> CopyOutcome:
        """Give up a QoS 0 copy without a lease if it may have been routed: a repeat could reach the client twice."""
        at_most_once = copy.pending.lease is None and not copy.command.qos
        return "refused" if outcome == "unknown" and at_most_once else outcome

    def _report(self, copy: DeliveryCopy, outcome: CopyOutcome) -> None:
        pending, command = copy
        if outcome == "no_subscriber":
            self._deliveries.fail(pending, "no_client")
        elif outcome == "refused":
            self._deliveries.fail(pending, "bridge")
        elif outcome not in REPEATED:
            # The client will acknowledge QoS 1 and 2. So the hook has reported `sent`, before EMQX answered.
            if command.qos:
                pending.done()
            else:
                self._deliveries.sent(pending, 0)

    async def _publish(self, copies: Sequence[DeliveryCopy]) -> list[CopyOutcome]:
        """Publish copies; the outcome of each.

        EMQX publishes all messages of a bulk or none. If it refuses a bulk, the bad copy is searched by halving.
        """
        if not copies:
            return []
        try:
            results = await self._rest.publish([self._message(copy) for copy in copies])
        except Refused as error:
            if error.status not in REQUEST_FAULTS:
                self._failed(error)
                return ["unsent"] * len(copies)
            if len(copies) > 1:
                middle = len(copies) // 2
                first = await self._publish(copies[:middle])
                if self._backoff:
                    return [*first, *["unsent"] * (len(copies) - middle)]  # type: ignore[list-item]
                return [*first, *await self._publish(copies[middle:])]
            client_id = copies[0].pending.client_id
            logger.error("%s: EMQX refuses a copy, it fails: %s", client_id, error)  # noqa: TRY400  no traceback
            return ["refused"]
        except Unanswered as error:
            self._failed(error)
            return ["unknown"] * len(copies)
        except RestError as error:
            self._failed(error)
            return ["unsent"] * len(copies)
        outcomes = [_outcome(result) for result in results]
        if "unsent" in outcomes:
            self._failed(Unanswered("EMQX could not hand over some copies, perhaps a node starts"))
        else:
            self._succeeded()
        return outcomes

    def _message(self, copy: DeliveryCopy) -> PublishRequest:
        """The publish of a copy. It never has the retain flag: EMQX would retain it at the client's own topic."""
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
        if self._deliveries.drop_if_over(pending):
            self._windows.settle_change(change, again=False)
            return
        try:
            await self._carry_out_change(change)
        except Refused as error:
            again = error.status not in REQUEST_FAULTS
            if again:
                self._failed(error)
            else:
                what = "EMQX refuses a change of subscriptions, it is dropped"
                logger.error("%s: %s: %s", pending.client_id, what, error)  # noqa: TRY400  no traceback
        except RestError as error:
            self._failed(error)
            again = True
        else:
            self._succeeded()
            again = False
        self._windows.settle_change(change, again=again)
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
                "%s: EMQX does not grant %d of %d subscriptions; see its ACL",
                client_id, len(granted.failed), len(command.topic_filters),
            )  # fmt: skip

    # -- failures of EMQX

    def _failed(self, error: RestError) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._backoff.failed(str(error), now_s, random.random()):  # noqa: S311  spreads attempts
            level = logging.ERROR if isinstance(error, Unauthorized) else logging.WARNING
            logger.log(level, "commands wait, the bridge retries until they expire: %s", error)

    def _succeeded(self) -> None:
        if self._backoff.succeeded():
            logger.warning("EMQX accepts requests again: the bridge carries out commands")


def _outcome(result: PublishResult) -> CopyOutcome:
    if result.id is not None:
        return Accepted(result.id)
    if result.reason_code == NO_MATCHING_SUBSCRIBERS:
        return "no_subscriber"
    return "unsent" if result.reason_code == NOT_HANDED_OVER else "refused"
