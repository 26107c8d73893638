"""What one MQTT session has yet to get: its order, its window and its packet ids. No IO, no clock.

A copy's way: `put` → `next` when there is room → `launch`, as it is written → acknowledged → `entered`, when Kafka is
told. At QoS 2 the packet id lives on until PUBCOMP. A connection that ends leaves the launched copies in the session:
`resume` has them sent again first ([MQTT-4.4.0-1]).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.embedded.newest_sent import NewestSent
from millpond.pipeline.brokers.embedded.wire import publish_packet
from millpond.schemas.codec import payload_bytes
from millpond.schemas.commands import Command, Deliver, Subscribe, Unsubscribe
from millpond.schemas.leases import LeaseName

# Un-acked copies of one client, of each lane. A client that is a millisecond away is served at over 100,000 a second
# with that; more would only be sent again after a broken connection.
DELIVERY_WINDOW: Final = 128
# Their bytes: what one client costs that acknowledges nothing. One copy of any size always has room.
IN_FLIGHT_BYTES_MAX: Final = 16 * 1024 * 1024
COPY_OVERHEAD_BYTES: Final = 2_048  # what it costs to keep one, beside its payload
# What is kept for a session without a connection; the oldest go.
AWAY_MAX: Final = 1_000
AWAY_BYTES_MAX: Final = 32 * 1024 * 1024
PACKET_ID_MAX: Final = 0xFFFF
BURNT_IDS_MAX: Final = 1_000  # see `Outgoing._drop`


class OutgoingMessage(NamedTuple):
    """What events say of a message that goes to a client."""

    message_id: str
    topic: str
    from_client_id: str | None


@dataclass(slots=True, eq=False)
class OutgoingCopy:
    """One message for one client. A routed one has no ticket."""

    message: OutgoingMessage
    payload: bytes
    qos: int
    retain: bool
    pending: PendingCommand | None = None
    repeated: bool = False  # DUP
    packet_id: int = 0
    holds: int = 0  # what must still come before its room is free

    @property
    def size(self) -> int:
        """Bytes that it takes to keep it."""
        return len(self.payload) + COPY_OVERHEAD_BYTES

    def packet(self) -> bytes:
        """Its PUBLISH."""
        return publish_packet(
            self.message.topic, self.payload, self.qos, self.packet_id,
            retain=self.retain, repeated=self.repeated and self.qos > 0,  # [MQTT-3.3.1-2]
        )  # fmt: skip


class OutgoingChange(NamedTuple):
    """A command that changes a client's subscriptions, in its turn."""

    pending: PendingCommand
    command: Subscribe | Unsubscribe


def ordered(command: Command, pending: PendingCommand) -> Ordered:
    """A command as it waits for its turn."""
    if not isinstance(command, Deliver):
        return OutgoingChange(pending, command)
    message = OutgoingMessage(command.message_id, command.topic, None)
    return OutgoingCopy(
        message, payload_bytes(command), command.qos, command.retain, pending,
        repeated=command.attempt > 1,
    )  # fmt: skip


class Release(NamedTuple):
    """A PUBREL to be sent."""

    packet_id: int


class Expired(NamedTuple):
    """A launched copy that expired before the client came back: it is gone, and is to be reported."""

    pending: PendingCommand


Ordered: TypeAlias = OutgoingCopy | OutgoingChange
Step: TypeAlias = OutgoingCopy | OutgoingChange | Release | Expired


class Lane:
    """Copies that keep their order among themselves, and the room that they have."""

    def __init__(self) -> None:
        """Empty."""
        self.waiting: deque[Ordered] = deque()
        self.waiting_bytes = 0
        self._in_flight = self._in_flight_bytes = 0

    def put(self, item: Ordered, *, first: bool = False) -> None:
        """Let it wait for its turn."""
        self.waiting_bytes += _size(item)
        if first:
            self.waiting.appendleft(item)
        else:
            self.waiting.append(item)

    def ready(self) -> bool:
        """Whether the next one can go."""
        if not self.waiting:
            return False
        head = self.waiting[0]
        return isinstance(head, OutgoingChange) or not head.qos or self._has_room()

    def _has_room(self) -> bool:
        return not self._in_flight or (
            self._in_flight < DELIVERY_WINDOW and self._in_flight_bytes < IN_FLIGHT_BYTES_MAX
        )

    def take(self) -> Ordered:
        """The next one."""
        item = self.waiting.popleft()
        self.waiting_bytes -= _size(item)
        return item

    def occupy(self, copy: OutgoingCopy) -> None:
        """A copy needs room."""
        self._in_flight += 1
        self._in_flight_bytes += copy.size

    def free(self, copy: OutgoingCopy) -> None:
        """It needs it no more."""
        self._in_flight -= 1
        self._in_flight_bytes -= copy.size


class Outgoing:
    """One session's. Commands do not wait for routed messages, nor the other way round."""

    def __init__(self) -> None:
        """Of a new session."""
        self.ordered, self.routed = Lane(), Lane()
        self.newest_sent = NewestSent()
        self._sent: dict[int, OutgoingCopy] = {}  # launched, not acknowledged; in order
        self._released: dict[int, OutgoingCopy] = {}  # QoS 2: between PUBREC and PUBCOMP; in order
        self._again: deque[OutgoingCopy] = deque()
        self._releases: dict[int, None] = {}  # PUBRELs to be sent
        self._burnt: dict[int, None] = {}
        self._last_id = 0
        self._routed_turn = False
        self.wake: Callable[[], None] = _nobody  # called when `next` may have more to say

    def put(self, item: Ordered) -> None:
        """Let it wait for its turn."""
        self._lane(item).put(item)
        self.wake()

    def put_back(self, item: Ordered) -> None:
        """The turn of what `next` gave has not come after all."""
        self._lane(item).put(item, first=True)

    def _lane(self, item: Ordered) -> Lane:
        return self.routed if item.pending is None else self.ordered

    # -- out

    def next(self, now_ms: int) -> Step | None:
        """What to do next, if there is anything that can be done; what was launched before comes first."""
        if self._releases:
            packet_id = next(iter(self._releases))
            del self._releases[packet_id]
            return Release(packet_id)
        while self._again:
            copy = self._again.popleft()
            if not self.is_open(copy):
                continue  # acknowledged meanwhile
            if copy.pending is None or now_ms <= copy.pending.valid_until_ms:
                return copy
            self._drop(copy)
            return Expired(copy.pending)
        lanes = (self.routed, self.ordered) if self._routed_turn else (self.ordered, self.routed)
        for lane in lanes:
            if lane.ready():
                self._routed_turn = lane is self.ordered
                return lane.take()
        return None

    def launch(self, copy: OutgoingCopy) -> None:
        """It is about to be written for the first time: from here on it has its packet id."""
        if not copy.qos:
            return
        copy.packet_id, copy.holds = self._free_id(), copy.qos
        self._sent[copy.packet_id] = copy
        self._lane(copy).occupy(copy)

    def recall(self, copy: OutgoingCopy) -> None:
        """It was launched, but could not be written."""
        if copy.qos:
            del self._sent[copy.packet_id]
            self._lane(copy).free(copy)
            copy.packet_id = 0

    def is_open(self, copy: OutgoingCopy) -> bool:
        """Whether a launched copy is not acknowledged."""
        return self._sent.get(copy.packet_id) is copy

    def unacknowledged(self) -> list[LeaseName]:
        """The leases of the launched copies that are not acknowledged."""
        return [
            copy.pending.lease
            for copy in self._sent.values()
            if copy.pending is not None and copy.pending.lease is not None
        ]

    def _free_id(self) -> int:
        """[MQTT-2.3.1-4]: of all ids, few are taken."""
        while True:
            self._last_id = self._last_id % PACKET_ID_MAX + 1
            if not any(
                self._last_id in taken for taken in (self._sent, self._released, self._burnt)
            ):
                return self._last_id

    # -- acknowledgements

    def puback(self, packet_id: int) -> OutgoingCopy | None:
        """The copy that this acknowledges; its room is free when it is `entered`."""
        copy = self._sent.get(packet_id)
        return self._sent.pop(packet_id) if copy is not None and copy.qos == 1 else None

    def pubrec(self, packet_id: int) -> OutgoingCopy | None:
        """The same at QoS 2; PUBREL answers in any case, or the client would hold on to the id ([MQTT-4.3.3-1])."""
        copy = self._sent.get(packet_id)
        if copy is not None and copy.qos == 1:
            return None
        self._burnt.pop(packet_id, None)
        self._releases[packet_id] = None
        self.wake()
        if copy is not None:
            self._released[packet_id] = self._sent.pop(packet_id)
        return copy

    def pubcomp(self, packet_id: int) -> None:
        """The end of a packet id at QoS 2."""
        copy = self._released.pop(packet_id, None)
        if copy is not None:
            self._let_go(copy)

    def entered(self, copy: OutgoingCopy) -> None:
        """The acknowledgement is on its way to Kafka: only as many as there is room for are not."""
        self._let_go(copy)

    def _let_go(self, copy: OutgoingCopy) -> None:
        copy.holds -= 1
        if not copy.holds:
            self._lane(copy).free(copy)
            self.wake()

    # -- connections come and go

    def resume(self) -> None:
        """A new connection: what was launched over the last one is sent again ([MQTT-4.4.0-1])."""
        self._releases = dict.fromkeys(self._released)
        self._again = deque(self._sent.values())
        for copy in self._again:
            copy.repeated = True

    def withdraw(self) -> list[Ordered]:
        """The connection ended: the commands whose turn has not come; routed messages are kept, within bounds."""
        withdrawn = list(self.ordered.waiting)
        self.ordered.waiting.clear()
        self.ordered.waiting_bytes = 0
        self._trim()
        return withdrawn

    def keep(self, copy: OutgoingCopy) -> None:
        """Let a routed message wait for the next connection."""
        self.routed.put(copy)
        self._trim()
        self.wake()

    def _trim(self) -> None:
        routed = self.routed
        while len(routed.waiting) > AWAY_MAX or routed.waiting_bytes > AWAY_BYTES_MAX:
            routed.take()

    def drop_stale(self, stale: Callable[[PendingCommand], bool]) -> None:
        """Ask of each command that waits, in order, whether it still is to; those that are not are gone."""
        waiting = self.ordered.waiting
        for _ in range(len(waiting)):
            item = self.ordered.take()
            if item.pending is None or not stale(item.pending):
                self.ordered.put(item)
        self.wake()  # what needs no room may be the first now

    def _drop(self, copy: OutgoingCopy) -> None:
        """Forget a copy that the client may have got. At QoS 2 it may hold on to the packet id, and would take the
        id's next message for this one ([MQTT-4.3.3-2]).
        """
        del self._sent[copy.packet_id]
        self._lane(copy).free(copy)
        if copy.qos == 2:
            if len(self._burnt) >= BURNT_IDS_MAX:
                del self._burnt[next(iter(self._burnt))]
            self._burnt[copy.packet_id] = None


def _nobody() -> None:
    """No connection waits for it."""


def _size(item: Ordered) -> int:
    return item.size if isinstance(item, OutgoingCopy) else COPY_OVERHEAD_BYTES
