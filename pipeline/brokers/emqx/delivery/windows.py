"""Delivery windows: the commands that wait for each client of an EMQX, and the copies that EMQX may hold of them.

No IO, no clock. The sender (`sender.py`) asks for the next step, sends it, and returns the outcomes.

Concepts
--------

A *step* is what one REST request does: a bulk of copies for several clients, or a change of one client's subscriptions.
A *bulk share* is the part of one client in a bulk. A copy's way:

    put → waiting ── next ──→ in a step ── settle ──→ in flight ── acked ──→ gone
             ↑                    │
             └── unsent, unknown ─┘

*In flight* means: EMQX has routed the copy under an id of its own, the *alias*, and the client has not acknowledged it.
*Unclear* means: REST gave no answer, so EMQX may hold the copy or not. The copy waits again, and yet it takes room.
*Early* means: the acknowledgement came before REST's answer. Only the answer tells the alias of a copy.

Rules
-----

1. A client has at most one step under way, and an unsent or unclear copy goes back to the front. So its order holds.
2. A client's copies in flight and unclear copies are together at most `WINDOW`. Reason: EMQX's session queue holds
   1,000 messages, and drops more without a word.
3. A QoS 0 copy needs no room, because it is not acknowledged. It keeps its place in the order, though.
4. After an unclear copy the client gets one copy at a time (`careful`), so that few copies come twice.
5. A copy leaves EMQX when its validity ends (its message expiry). So it leaves the window then, acknowledged or not.

State
-----

`_queues`, for each client that has anything:

| field | meaning |
|---|---|
| `waiting` | copies and changes in their order; the first is the next |
| `busy` | a step of the client is under way |
| `careful` | the outcome of the last bulk was unclear |
| `in_flight` | alias → command |
| `unclear` | ends of validity in ms, the oldest copy first |
| `early` | aliases acknowledged during the current step |
| `ended` | the session ended during the current step |

`_ready`: the clients that may have a next step, in the order of their turns. A client that cannot proceed is removed,
and comes back when something changes for it. `_unchecked`: the clients that `drop_stale` has yet to check in this round.

Transitions
-----------

ON put: append the command to the client's queue.

ON next: take the first client that is ready.
  1. Its first item is a change: that is the step.
  2. Otherwise make a bulk: a fair share of all ready copies for each free slot, within `BULK_MIN` and `BULK_MAX`.

ON settle, for each copy:
  1. unsent, unknown: put it back to the front.
  2. unknown, QoS 1 or 2: it is unclear now.
  3. Accepted: it is in flight, unless its acknowledgement was early.
  4. The session ended meanwhile: none of them takes room.

ON the end of any step: each early acknowledgement that belongs to no accepted copy frees the oldest unclear copy. It may
  be an earlier attempt that REST never answered.

ON acked:
  1. The alias is in flight: the copy is gone.
  2. A step is under way: note the acknowledgement as early.
  3. Otherwise free the oldest unclear copy.

ON session_ended: EMQX has discarded what it held. Return what waits, so that the sender fails it. A step may be under
  way, if the call of the hook overtakes REST's answer. EMQX discards the copies of that step, too.

ON drop_stale: remove stale commands and expired copies, a limited number of items in each call.

A doubt: an acknowledgement of a message that EMQX itself delivered looks like one of an unclear copy. It frees room too
early, by one copy. This needs an unclear copy, and a client that also gets messages from EMQX.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.schemas.commands import Deliver, Subscribe, Unsubscribe
from millpond.schemas.leases import LeaseName

WINDOW: Final = 100  # unacknowledged copies of one client; see rule 2
BULK_MIN: Final = 16  # copies; smaller bulks would cost more requests than they save waiting
BULK_MAX: Final = 100  # copies
BULK_BYTES_MAX: Final = 1024 * 1024  # of payloads; a single copy of any size always goes
EARLY_MAX: Final = 2 * WINDOW  # of one client; more than a step has copies


class DeliveryCopy(NamedTuple):
    """A message for one client."""

    pending: PendingCommand
    command: Deliver

    @property
    def size(self) -> int:
        """The size of the payload in characters, which is about its bytes."""
        return len(self.command.payload)


class SubscriptionChange(NamedTuple):
    """A command that changes a client's subscriptions. It keeps its place among the copies."""

    pending: PendingCommand
    command: Subscribe | Unsubscribe


class Accepted(NamedTuple):
    """EMQX has routed the copy under this id."""

    alias: str


# `no_subscriber`: no subscription matches. `refused`: EMQX would refuse it at every attempt.
# `unsent`: EMQX has not taken it this time. `unknown`: EMQX may have taken it.
CopyOutcome: TypeAlias = Accepted | Literal["no_subscriber", "refused", "unsent", "unknown"]
QueuedItem: TypeAlias = DeliveryCopy | SubscriptionChange
REPEATED: Final = ("unsent", "unknown")


@dataclass(slots=True, eq=False)
class _Queue:
    """The state of one client; see the head of this file."""

    waiting: deque[QueuedItem] = field(default_factory=deque)
    busy: bool = False
    careful: bool = False
    in_flight: dict[str, PendingCommand] = field(default_factory=dict)
    unclear: deque[int] = field(default_factory=deque)
    early: dict[str, None] = field(default_factory=dict)
    ended: bool = False

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.busy or self.in_flight or self.unclear)

    def room(self, now_ms: int) -> int:
        """How many more copies with an acknowledgement may go. Expire copies only if there is no room."""
        free = WINDOW - len(self.in_flight) - len(self.unclear)
        if free > 0:
            return free
        self.expire(now_ms)
        return WINDOW - len(self.in_flight) - len(self.unclear)

    def expire(self, now_ms: int) -> None:
        """Remove copies whose validity has ended: EMQX has discarded them."""
        self.in_flight = {
            alias: pending
            for alias, pending in self.in_flight.items()
            if pending.valid_until_ms >= now_ms
        }
        self.unclear = deque(end for end in self.unclear if end >= now_ms)

    def free_unclear(self) -> None:
        """Remove the oldest unclear copy, if there is one."""
        if self.unclear:
            self.unclear.popleft()

    def ready(self, now_ms: int) -> bool:
        if self.busy or not self.waiting:
            return False
        head = self.waiting[0]
        return isinstance(head, SubscriptionChange) or not head.command.qos or self.room(now_ms) > 0

    def take(self, count_max: int, bytes_max: int, now_ms: int) -> list[DeliveryCopy]:
        """Remove copies from the front, at least one if the client is ready."""
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
            room -= bool(head.command.qos)  # rule 3
            self.waiting.popleft()
        return copies


class BulkShare(NamedTuple):
    """One client's share of a bulk."""

    client_id: str
    copies: list[DeliveryCopy]


Bulk: TypeAlias = list[BulkShare]


class DeliveryWindows:
    """One per process, for the clients whose commands it reads."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._unchecked: list[str] = []
        self._ready: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def put(self, item: QueuedItem) -> None:
        """Append a command to its client's queue."""
        client_id = item.pending.client_id
        self._queues.setdefault(client_id, _Queue()).waiting.append(item)
        self._ready[client_id] = None

    # -- out

    def next(self, slots: int, now_ms: int) -> Bulk | SubscriptionChange | None:
        """The next step, or None if no client is ready. `slots` is the number of requests that may start now."""
        ready = self._first_ready(now_ms)
        if not ready:
            return None
        head = self._queues[ready[0]].waiting[0]
        if isinstance(head, SubscriptionChange):
            self._start_step(ready[0])
            self._queues[ready[0]].waiting.popleft()
            return head
        return self._bulk(ready, slots, now_ms)

    def _first_ready(self, now_ms: int) -> list[str]:
        """The first ready clients, as many as a bulk can hold. Clients that are not ready lose their turn."""
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
        """A bulk with a fair share of the ready copies. Its clients get their next turn at the end."""
        waiting = sum(len(self._queues[client_id].waiting) for client_id in ready)
        # Rounded up, so that the slots together take everything.
        room = min(BULK_MAX, max(BULK_MIN, -(-waiting // max(slots, 1))))
        bytes_left = BULK_BYTES_MAX
        bulk: Bulk = []
        for client_id in ready:
            if room <= 0 or bytes_left <= 0:
                break
            queue = self._queues[client_id]
            # A change cannot share a request with copies. The client keeps its turn.
            if isinstance(queue.waiting[0], SubscriptionChange):
                continue
            if bulk and queue.waiting[0].size > bytes_left:
                break
            copies = queue.take(room, bytes_left, now_ms)
            self._start_step(client_id)
            bulk.append(BulkShare(client_id, copies))
            room -= len(copies)
            bytes_left -= sum(copy.size for copy in copies)
        return bulk

    def _start_step(self, client_id: str) -> None:
        self._queues[client_id].busy = True
        del self._ready[client_id]

    # -- outcomes

    def settle(self, part: BulkShare, outcomes: Sequence[CopyOutcome]) -> None:
        """End a client's step with the outcomes of its copies. Copies to be repeated are its next ones."""
        queue = self._queues[part.client_id]
        again: list[QueuedItem] = []
        for copy, outcome in zip(part.copies, outcomes, strict=True):
            if outcome in REPEATED:
                again.append(copy)
            if not copy.command.qos or queue.ended:
                continue
            if outcome == "unknown":
                queue.unclear.append(copy.pending.valid_until_ms)
            elif isinstance(outcome, Accepted) and outcome.alias in queue.early:
                del queue.early[outcome.alias]
            elif isinstance(outcome, Accepted):
                queue.in_flight[outcome.alias] = copy.pending
        if "unknown" in outcomes:
            queue.careful = True
        elif "unsent" not in outcomes:
            queue.careful = False
        queue.waiting.extendleft(reversed(again))
        self._end_step(part.client_id, queue)

    def settle_change(self, change: SubscriptionChange, *, again: bool) -> None:
        """End a client's step that was a change. `again`: it is to be repeated."""
        client_id = change.pending.client_id
        queue = self._queues[client_id]
        if again:
            queue.waiting.appendleft(change)
        self._end_step(client_id, queue)

    def _end_step(self, client_id: str, queue: _Queue) -> None:
        # Acknowledgements that belong to no copy of this step.
        for _ in queue.early:
            queue.free_unclear()
        queue.early.clear()
        queue.busy = queue.ended = False
        self._ready[client_id] = None
        self._remove_if_idle(client_id, queue)

    def _remove_if_idle(self, client_id: str, queue: _Queue) -> None:
        if queue.idle:
            del self._queues[client_id]
            self._ready.pop(client_id, None)

    def unacknowledged(self, client_id: str) -> list[LeaseName]:
        """The leases of a client's copies in flight."""
        queue = self._queues.get(client_id)
        in_flight = {} if queue is None else queue.in_flight
        return [pending.lease for pending in in_flight.values() if pending.lease is not None]

    def acked(self, client_id: str, alias: str) -> PendingCommand | None:
        """Free the room of an acknowledged copy. Returns its command if it was in flight here.

        Otherwise another process may have sent the copy. A client may have copies of two processes: its partition has moved from one to the other.
        """
        queue = self._queues.get(client_id)
        if queue is None:
            return None
        pending = queue.in_flight.pop(alias, None)
        if pending is None:
            if queue.busy and len(queue.early) < EARLY_MAX:
                queue.early[alias] = None
            else:
                queue.free_unclear()
        self._ready[client_id] = None
        self._remove_if_idle(client_id, queue)
        return pending

    # -- ended sessions and stale commands

    def session_ended(self, client_id: str) -> list[QueuedItem]:
        """Remove everything of a client. Returns the commands that were waiting; the caller fails them."""
        queue = self._queues.get(client_id)
        if queue is None:
            return []
        ended = list(queue.waiting)
        queue.waiting.clear()
        queue.in_flight.clear()
        queue.unclear.clear()
        queue.ended = queue.busy
        self._remove_if_idle(client_id, queue)
        return ended

    def drop_stale(
        self, items_max: int, now_ms: int, stale: Callable[[PendingCommand], bool]
    ) -> None:
        """Remove the waiting commands for which `stale` is true, and copies in flight whose validity has ended.

        A call checks about `items_max` items. The next call continues where this one ended, and starts a new round
        when all clients were checked.
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
            self._remove_if_idle(client_id, queue)
