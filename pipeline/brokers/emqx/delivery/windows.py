"""What each client of an EMQX has yet to get, and how much of it may be under way. No IO, no clock.

A copy's way: `put` → `next`, in a bulk, when there is room → `settle`, when REST has answered → un-acked in EMQX's
session → `acked`. Rule 1: of one client there is at most one bulk, or one change, under way, and what is to be tried
again goes back in front: so its order holds. Rule 2: never more than `WINDOW` copies of a client are in EMQX without an
acknowledgement; whether a copy is there that REST gave no answer about nobody knows, so it counts, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.schemas.commands import Deliver, Subscribe, Unsubscribe

# Un-acked copies of one client. EMQX's session queue holds 1,000 and drops without a word what is more.
WINDOW: Final = 100
BULK_MIN: Final = 16  # copies: fewer would cost more in requests than they save in waiting
BULK_MAX: Final = 100
BULK_BYTES_MAX: Final = 1024 * 1024  # of payloads; one copy of any size always goes
EARLY_MAX: Final = 2 * WINDOW  # acknowledgements of one client that came before REST's answer


class DeliveryCopy(NamedTuple):
    """One message for one client."""

    pending: PendingCommand
    command: Deliver

    @property
    def size(self) -> int:
        """Bytes of its payload, about."""
        return len(self.command.payload)


class SubscriptionChange(NamedTuple):
    """A command that changes a client's subscriptions, in its turn."""

    pending: PendingCommand
    command: Subscribe | Unsubscribe


class Accepted(NamedTuple):
    """EMQX routed it under this id."""

    alias: str


# `nobody`: no subscriber matches. `refused`: it would be so again. `unsent`: EMQX has not taken it, this time.
# `unknown`: it may have.
CopyOutcome: TypeAlias = Accepted | Literal["nobody", "refused", "unsent", "unknown"]
QueuedItem: TypeAlias = DeliveryCopy | SubscriptionChange
AGAIN: Final = ("unsent", "unknown")


@dataclass(slots=True, eq=False)
class _Queue:
    """One client's. `in_flight` are un-acked copies by alias, `unclear` those that may be in EMQX; with their end in ms."""

    waiting: deque[QueuedItem] = field(default_factory=deque)
    busy: bool = False
    careful: bool = False  # one copy at a time: the last bulk has no answer
    in_flight: dict[str, int] = field(default_factory=dict)
    unclear: deque[int] = field(default_factory=deque)
    early: dict[str, None] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.busy or self.in_flight or self.unclear)

    def room(self, now_ms: int) -> int:
        """How many more copies may go. One that was valid until now has expired in EMQX, too."""
        free = WINDOW - len(self.in_flight) - len(self.unclear)
        if free > 0:
            return free
        self.expire(now_ms)
        return WINDOW - len(self.in_flight) - len(self.unclear)

    def expire(self, now_ms: int) -> None:
        """What was valid until now is no longer in EMQX."""
        self.in_flight = {alias: end for alias, end in self.in_flight.items() if end >= now_ms}
        self.unclear = deque(end for end in self.unclear if end >= now_ms)

    def let_go_unclear(self) -> None:
        """Forget the oldest copy that may be in EMQX."""
        if self.unclear:
            self.unclear.popleft()

    def ready(self, now_ms: int) -> bool:
        if self.busy or not self.waiting:
            return False
        head = self.waiting[0]
        return isinstance(head, SubscriptionChange) or not head.command.qos or self.room(now_ms) > 0

    def take(self, count_max: int, bytes_max: int, now_ms: int) -> list[DeliveryCopy]:
        """Copies from the front, at least one if the client is ready."""
        copies: list[DeliveryCopy] = []
        room, size = self.room(now_ms), 0
        count_max = 1 if self.careful else count_max
        while self.waiting and len(copies) < count_max:
            head = self.waiting[0]
            if isinstance(head, SubscriptionChange) or (head.command.qos and not room):
                break
            if copies and size + head.size > bytes_max:
                break
            copies.append(head)
            size += head.size
            room -= bool(head.command.qos)
            self.waiting.popleft()
        return copies


class BulkShare(NamedTuple):
    """One client's share of a bulk."""

    client_id: str
    copies: list[DeliveryCopy]


Bulk: TypeAlias = list[BulkShare]


class DeliveryWindows:
    """One per process: the clients whose commands it reads."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._queues: dict[str, _Queue] = {}
        self._unchecked: list[str] = []
        self._ready: dict[str, None] = {}  # clients that may be ready, in the order of their turns

    def __len__(self) -> int:
        return len(self._queues)

    def put(self, item: QueuedItem) -> None:
        """Let a command wait for its turn."""
        client_id = item.pending.client_id
        self._queues.setdefault(client_id, _Queue()).waiting.append(item)
        self._ready[client_id] = None

    # -- out

    def next(self, slots: int, now_ms: int) -> Bulk | SubscriptionChange | None:
        """What to do next, if there is anything that can be done now, while `slots` more could be done beside it."""
        ready = self._first_ready(now_ms)
        if not ready:
            return None
        head = self._queues[ready[0]].waiting[0]
        if isinstance(head, SubscriptionChange):
            self._begin(ready[0])
            self._queues[ready[0]].waiting.popleft()
            return head
        return self._bulk(ready, slots, now_ms)

    def _first_ready(self, now_ms: int) -> list[str]:
        """As many as a bulk can hold. Whoever is not ready is asked again when something has come of it."""
        ready: list[str] = []
        waiting: list[str] = []
        for client_id in self._ready:
            if not self._queues[client_id].ready(now_ms):
                waiting.append(client_id)
                continue
            ready.append(client_id)
            if len(ready) >= BULK_MAX:
                break
        for client_id in waiting:
            del self._ready[client_id]
        return ready

    def _bulk(self, ready: Sequence[str], slots: int, now_ms: int) -> Bulk:
        """A fair share of all that is ready; every client in it goes to the end of the turns."""
        waiting = sum(len(self._queues[client_id].waiting) for client_id in ready)
        room = min(BULK_MAX, max(BULK_MIN, -(-waiting // max(slots, 1))))
        bytes_left = BULK_BYTES_MAX
        bulk: Bulk = []
        for client_id in ready:
            if room <= 0 or bytes_left <= 0:
                break
            queue = self._queues[client_id]
            if isinstance(queue.waiting[0], SubscriptionChange):
                continue  # its turn is the next step's
            if bulk and queue.waiting[0].size > bytes_left:
                break
            copies = queue.take(room, bytes_left, now_ms)
            self._begin(client_id)
            bulk.append(BulkShare(client_id, copies))
            room -= len(copies)
            bytes_left -= sum(copy.size for copy in copies)
        return bulk

    def _begin(self, client_id: str) -> None:
        self._queues[client_id].busy = True
        del self._ready[client_id]

    # -- what came of it

    def settle(self, part: BulkShare, outcomes: Sequence[CopyOutcome]) -> None:
        """REST has answered, or will not. What is to be tried again is the next in turn."""
        queue = self._queues[part.client_id]
        again: list[QueuedItem] = []
        for copy, outcome in zip(part.copies, outcomes, strict=True):
            end = copy.pending.valid_until_ms
            if outcome in AGAIN:
                again.append(copy)
            if not copy.command.qos:
                continue
            if outcome == "unknown":
                queue.unclear.append(end)
            elif isinstance(outcome, Accepted) and outcome.alias in queue.early:
                del queue.early[outcome.alias]
            elif isinstance(outcome, Accepted):
                queue.in_flight[outcome.alias] = end
        for _ in queue.early:
            queue.let_go_unclear()
        if "unknown" in outcomes:
            queue.careful = True
        elif "unsent" not in outcomes:
            queue.careful = False
        queue.waiting.extendleft(reversed(again))
        self._end(part.client_id, queue)

    def changed(self, change: SubscriptionChange, *, again: bool) -> None:
        """A change was carried out, or given up, or is to be tried `again`."""
        client_id = change.pending.client_id
        queue = self._queues[client_id]
        if again:
            queue.waiting.appendleft(change)
        self._end(client_id, queue)

    def _end(self, client_id: str, queue: _Queue) -> None:
        queue.busy = False
        queue.early.clear()
        self._ready[client_id] = None
        self._forget(client_id, queue)

    def _forget(self, client_id: str, queue: _Queue) -> None:
        if queue.idle:
            del self._queues[client_id]
            self._ready.pop(client_id, None)

    def acked(self, client_id: str, alias: str) -> bool:
        """A client acknowledged a copy; whether that is one of the copies here, or may be.

        One that nothing is known of may have gone without an answer, or its answer is still to come.
        """
        queue = self._queues.get(client_id)
        if queue is None:
            return False
        if queue.in_flight.pop(alias, None) is None:
            if queue.busy and len(queue.early) < EARLY_MAX:
                queue.early[alias] = None
            else:
                queue.let_go_unclear()
        self._ready[client_id] = None
        self._forget(client_id, queue)
        return True

    # -- ends

    def session_ended(self, client_id: str) -> list[QueuedItem]:
        """What EMQX held for a client is gone; so are the commands that wait: they are returned, to fail."""
        queue = self._queues.get(client_id)
        if queue is None:
            return []
        ended = list(queue.waiting)
        queue.waiting.clear()
        queue.in_flight.clear()
        queue.unclear.clear()
        self._forget(client_id, queue)
        return ended

    def drop_stale(
        self, items_max: int, now_ms: int, stale: Callable[[PendingCommand], bool]
    ) -> None:
        """Ask of each command that waits, in order, whether it still is to; those that are not are gone. What was valid
        until now is no longer in flight. Not of all at once: the next call goes on where this one ended.
        """
        left = items_max
        while left > 0:
            if not self._unchecked:
                self._unchecked = list(reversed(self._queues))
                if not self._unchecked or left < items_max:
                    return
            client_id = self._unchecked.pop()
            queue = self._queues.get(client_id)
            if queue is None:
                continue
            left -= 1 + len(queue.waiting) + len(queue.in_flight)
            queue.waiting = deque(item for item in queue.waiting if not stale(item.pending))
            queue.expire(now_ms)
            self._ready[client_id] = None
            self._forget(client_id, queue)
