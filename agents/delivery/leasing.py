"""Leases, for queue and pubsub alike.

Rule 1: every transition of a lease is in this file; members come and go in `membership.py`, and what becomes of a
message is the agent's own. Rule 2: no IO, no clock, no chance.

A copy stays with the member that has it; when its clock runs out, `silence.py` lets others take it over.

ON something to hand out: members with room take turns. ON sent: the lease counts as a delivery, and has until its ack is
due. ON failed, also after sent: the lease returns and counts nothing; the member rests. ON acked: the message is done
with. ON tick: a lease whose clock has run out is silent; one whose member is offline, or that was never sent, returns, or
its message is dead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Final, Generic, TypeAlias, TypeVar

from msgspec import Struct, structs

from millpond.agents.delivery.members import (
    LeftCopy,
    Member,
    Members,
    Reach,
    Round,
    client_of,
    copy_name,
)
from millpond.agents.delivery.window import Lease, Waiting, Window
from millpond.agents.effects import DeliverMessage, Effect, Output, SetIndex
from millpond.agents.topics.due_times import INDEX, MEMBER, WINDOW, DueTimes, due_member
from millpond.agents.topics.plans import DeliveryPlan
from millpond.agents.topics.state_cache import StateCache
from millpond.agents.topics.storage import MessageStorage
from millpond.schemas.commands import COMMAND_VALID_FOR_S
from millpond.schemas.events import DeliveriesSent, DeliveryFailed, MessagePublished, Sent
from millpond.schemas.leases import lease_number

# A lease whose bridge never says what came of it. By then its command is long past its validity: it cannot come twice.
SEND_TIMEOUT_MS: Final = 3_600_000
# Commands of a partition under way to bridges: at 10 ms each, a hundred times what one worker can make in that time.
UNCONFIRMED_MAX: Final = 16_384
# After a command that did not reach its client the member rests: a second, twice that the next time, at most a minute.
REST_MS: Final = 1_000
REST_MS_MAX: Final = 60_000
WORK: Final = "work"  # the index of members whose round goes on, in their order
WAITING: Final = "waiting"  # the index of windows with something to be handed out that nobody took
RESUME: Final = "\0resume"  # no member's name: all windows that wait, after a pause

TOO_LARGE: Final = "the command to deliver it was larger than Kafka takes"

W = TypeVar("W", bound=Window)
Done: TypeAlias = list[Effect | Output]


class Counters(Struct):
    """What travels in the fence: the last lease's number; leases not confirmed, and whether leasing pauses for them;
    windows that wait now, and that ever began to; what the work index holds, the last place given there; behind which
    window a resumption is; how many subscribers' readers are being forgotten; how many dead messages a late
    acknowledgement can take back.
    """

    lease: int = 0
    unconfirmed: int = 0
    paused: bool = False
    waiting: int = 0
    waits: int = 0
    work: int = 0
    place: int = 0
    resuming: bool = False
    forgetting: int = 0
    resume_after: str = ""
    retractable: int = 0


class Leasing(ABC, Generic[W]):
    """The leases and members of one partition."""

    def __init__(self, windows: StateCache[W]) -> None:
        """Empty; the agent's `restore` follows."""
        self._due = DueTimes()
        self._storage = MessageStorage(self._due)
        self._members = Members()
        self._counters = Counters()
        self._windows = windows

    def window(self, offset: int, key: str) -> W:
        """A window that the record at `offset` changes."""
        return self._windows.touch(offset, key)

    # -- what the agent says of its windows ---------------------------------------------------------------

    @abstractmethod
    def topic_of(self, key: str) -> str:
        """The MQTT topic of a window."""

    @abstractmethod
    def reaching(self, key: str) -> list[Reach]:
        """The members that share a window."""

    @abstractmethod
    def something_waits(self, key: str, window: W) -> bool:
        """Whether anything is to be handed out."""

    @abstractmethod
    def acknowledged(self, offset: int, key: str, message_id: str, score: int) -> Done:
        """A message of a window is done with, and no longer leased."""

    @abstractmethod
    def given_up(self, offset: int, key: str, waiting: Waiting, reason: str, now_ms: int) -> Done:
        """A message of a window is a dead letter, and no longer leased."""

    @abstractmethod
    def last_of(self, key: str) -> int:
        """The place in the log (a score) of the newest message of a window."""

    def expired(self, key: str, waiting: Waiting, now_ms: int) -> bool:
        """Whether a message is too old to be handed out. What is behind it waits until a tick has taken it away."""
        end = self.expires_at(key, waiting)
        return end is not None and end <= now_ms

    def too_old(self, key: str, now_ms: int) -> Done:
        """The next message of a window has expired: a tick is to take it away, even if it became too old by new rules."""
        return [self._due.falls_due(due_member(INDEX, self.topic_of(key)), now_ms)]

    def delivery(self, key: str) -> DeliveryPlan | None:
        """How the rules in force have a window delivered."""
        return self._storage.plans.of(self.topic_of(key)).delivery

    # -- handing out --------------------------------------------------------------------------------------

    def served_by_ticks(self, key: str) -> bool:
        """True if a window hands out to members on their round only."""
        return False

    def dispatch(self, offset: int, key: str, now_ms: int) -> Done:
        """Hand out what a window has to those who have room, in turn."""
        done: Done = []
        window, delivery = self.window(offset, key), self.delivery(key)
        reaches = self.reaching(key) if delivery is not None else []
        takers = [] if self.served_by_ticks(key) else reaches
        while takers and delivery is not None and (window.silent or window.next() is not None):
            found = self._in_turn(done, key, takers, delivery, now_ms)
            if found is None:
                break
            reach, waiting = found
            if self.expired(key, waiting, now_ms):
                done += self.too_old(key, now_ms)
                break
            if self.pauses():
                break
            done += self.lease(offset, key, waiting, reach, now_ms)
        done += self.note_waiting(key, window)
        if window.waits:
            for reach in reaches:
                member = self._members.awake().get(reach.name)
                if member is not None and member.round.whole:
                    member.round.whole = False  # it comes by once more
                    self._members.touch(reach.name)
        return done

    def _in_turn(
        self, done: Done, key: str, reaches: Sequence[Reach], delivery: DeliveryPlan, now_ms: int
    ) -> tuple[Reach, Waiting] | None:
        """The first member behind the one served last that can take a message, and the first message that it can take."""
        for reach in self._members.turns(reaches, self._windows[key].turn, delivery.max_inflight):
            waiting = self.first_for(done, key, reach, delivery, now_ms)
            if waiting is not None:
                return reach, waiting
        return None

    def first_for(
        self, done: Done, key: str, reach: Reach, delivery: DeliveryPlan, now_ms: int
    ) -> Waiting | None:
        """The first message of a window that a member with room may get; None if there is none, as far as is known.

        It gets nothing that its client has a copy of over its present connection. A silent lease whose holder has
        acknowledged something since is the holder's again. One that was delivered too often waits for a tick to give it up.
        """
        window, client_id = self._windows[key], client_of(reach.name)
        for waiting in window.candidates():
            if not reach.wants(waiting):
                return None  # what comes behind it is newer still
            lease = window.leases.get(waiting.message_id)
            if lease is None:
                if not self._members.has_copy(client_id, key, waiting.message_id):
                    return waiting
                continue
            alive_until = self._members[lease.member].alive_until(delivery.ack_timeout_ms)
            if alive_until > now_ms:
                window.set_deadline(waiting.message_id, alive_until)
                done += self.deadline(key, window, alive_until)
            elif not self.may_take_over(key, lease, waiting.message_id, client_id):
                continue
            elif lease.deliveries >= delivery.max_deliveries:
                done += self.deadline(key, window, now_ms)
            else:
                return waiting
        return None

    def may_take_over(self, key: str, lease: Lease, message_id: str, client_id: str) -> bool:
        """True if a client has no copy of a leased message over its present connection."""
        held = client_of(lease.member) == client_id
        return not (held or self._members.has_copy(client_id, key, message_id))

    def pauses(self) -> bool:
        """Whether nothing is leased now, because too much is under way."""
        self._counters.paused |= self._counters.unconfirmed >= UNCONFIRMED_MAX
        return self._counters.paused

    def lease(self, offset: int, key: str, waiting: Waiting, reach: Reach, now_ms: int) -> Done:
        """Put a message that a window has into a member's hands."""
        window, member = self._windows[key], self._members[reach.name]
        done: Done = []
        if waiting.message_id in window.leases:
            done += self.leave_copy(key, waiting.message_id)
        else:
            window.take(waiting)
        window.turn = reach.name
        self._counters.lease += 1
        self._counters.unconfirmed += 1
        number = self._counters.lease
        held = Lease(
            number, reach.name, now_ms, now_ms + SEND_TIMEOUT_MS, waiting.score, waiting.deliveries,
            window.with_holder(waiting.holders, member.client_id, None),
        )  # fmt: skip
        window.lease(waiting.message_id, held)
        member.leases[number] = key
        member.unconfirmed += 1
        self._members.touch(reach.name)
        hand_out = DeliverMessage(
            offset, number, member.client_id, member.epoch, waiting.message_id, self.topic_of(key),
            reach.qos, waiting.deliveries + 1, self.expires_at(key, waiting),
            valid_until=valid_until(held),
        )  # fmt: skip
        return [*done, hand_out, *self.deadline(key, window, held.until)]

    def pass_on(self, offset: int, key: str, event: MessagePublished, score: int) -> Done:
        """QoS 0, not stored: to one member of a window with room, once, and nobody waits for an ack."""
        window, delivery = self.window(offset, key), self.delivery(key)
        if delivery is None:
            return []
        waiting, limit = Waiting(score, event.message_id), delivery.max_inflight
        turns = self._members.turns(self.reaching(key), window.turn, limit)
        reach = next((each for each in turns if each.wants(waiting)), None)
        if reach is None or self.pauses():
            return []
        window.turn, member = reach.name, self._members[reach.name]
        hand_out = DeliverMessage(
            offset, 0, member.client_id, member.epoch, event.message_id, event.topic,
            reach.qos, 1, event.expires_at, stored=False,
        )  # fmt: skip
        return [hand_out]

    def expires_at(self, key: str, waiting: Waiting) -> int | None:
        """When (ms) a message is too old to be handed out, by its rule; None is never."""
        lifetime = self._storage.plans.of(self.topic_of(key)).index_lifetime_ms
        return None if lifetime is None else waiting.score // 1000 + lifetime

    def deadline(self, key: str, window: W, at: int | None) -> Done:
        """See that a tick looks at a window's leases by then."""
        if at is None or (window.due is not None and window.due <= at):
            return []
        window.due = at
        return [self._due.falls_due(due_member(WINDOW, key), at)]

    def note_waiting(self, key: str, window: W) -> Done:
        """Keep the index of windows that wait."""
        waits = self.something_waits(key, window)
        if waits == window.waits:
            return []
        window.waits = waits
        self._counters.waiting += 1 if waits else -1
        self._counters.waits += waits
        return [SetIndex(WAITING, key, 0 if waits else None)]

    # -- the end of a lease -------------------------------------------------------------------------------

    def release(self, lease: Lease) -> Done:
        """A lease is over: its member, which is not forgotten before, has room again."""
        del self._members[lease.member].leases[lease.number]
        self._members.touch(lease.member)
        return [] if lease.sent else self._confirmed(lease)

    def leave_copy(self, key: str, message_id: str) -> Done:
        """A lease is over, but its member, if it is connected, has the copy, or gets it yet: that takes up its room."""
        lease = self._windows[key].end(message_id)
        assert lease is not None, "the caller knows the lease"
        copy, member = (
            LeftCopy(lease.number, key, message_id, lease.alias),
            self._members[lease.member],
        )
        if member.filters:
            member.left[copy.name] = copy
        return self.release(lease)

    def acked_copy(self, client_id: str, key: str, message_id: str) -> tuple[str, LeftCopy] | None:
        """Forget a copy of a lease that is over, by any id that it has: its client has acknowledged it. Its member and the
        copy, if there is one.
        """
        for name, member in self._members.in_use(client_id):
            copy = member.left.get(copy_name(key, message_id)) or next(
                (x for x in member.left.values() if x.key == key and x.alias == message_id), None
            )
            if copy is not None:
                del member.left[copy.name]
                member.acked_to = max(member.acked_to, copy.number)
                self._members.touch(name)
                return name, copy
        return None

    def active(self, client_ids: Iterable[str], now_ms: int) -> None:
        """These clients work through what they have: the clocks of their copies start again."""
        for client_id in client_ids:
            for name, member in self._members.in_use(client_id):
                if member.filters or member.acked_at:  # else it is offline: this is told late
                    member.acked_at, member.probes = now_ms, 0
                    self._members.touch(name)

    def _confirmed(self, lease: Lease) -> Done:
        """One lease less that nobody has confirmed."""
        counters, member = self._counters, self._members[lease.member]
        done: Done = []
        member.unconfirmed -= 1
        self._members.touch(lease.member)
        if member.awaited and lease.number <= member.epoch:
            member.awaited -= 1
            if not member.awaited and member.filters:
                done += self.start_round(lease.member, member)
        counters.unconfirmed -= 1
        if counters.paused and counters.unconfirmed <= UNCONFIRMED_MAX // 2:
            counters.paused = False
            done += self.resume()
        return done

    def begin_epoch(self, member: Member) -> None:
        """What a member is handed from now on may not overtake what it was before."""
        member.epoch, member.awaited = self._counters.lease, member.unconfirmed
        member.rests_until = 0

    def resume(self) -> Done:
        """Have all windows that wait looked at, a piece with every tick."""
        self._counters.resume_after = ""
        if self._counters.resuming:
            return []
        self._counters.resuming = True
        return self.queue_work(RESUME)

    def give_back(self, offset: int, key: str, message_id: str, now_ms: int) -> Done:
        """A lease ended without an ack. What was delivered too often is dead; what is stored no more ends with it."""
        window, delivery = self.window(offset, key), self.delivery(key)
        lease = window.leases[message_id]
        done = self.release(lease)
        if not lease.stored:
            window.remove(message_id)
            return done
        window.give_back(message_id)
        if delivery is not None and lease.deliveries >= delivery.max_deliveries:
            waiting = window.returned_as(message_id)
            assert waiting is not None, "it has just been given back"
            window.remove(message_id)
            done += self.given_up(offset, key, waiting, too_often(lease.deliveries), now_ms)
        return done

    def freed(self, offset: int, key: str, names: Iterable[str], now_ms: int) -> Done:
        """Members have room again. One for which other windows may wait goes round them; one that is at that, and had to
        leave something, does so once more.
        """
        done: Done = []
        others_wait = self._counters.waiting > self._windows[key].waits
        for name in names:
            member = self._members.get(name)
            if member is None or not member.spans(self.topic_of(key)):
                continue
            if member.available():
                goes = others_wait and self._counters.waits > member.served
                goes |= member.round.everything
            else:
                goes = others_wait and member.round.active and member.round.left_some
            if goes:
                done += self.start_round(name, member)
        return [*done, *self.dispatch(offset, key, now_ms)]

    # -- reports of bridges -------------------------------------------------------------------------------

    def leased_key(self, report: Sent | DeliveryFailed) -> str | None:
        """The window of the lease that a report is about, if there is such a lease."""
        number = lease_number(report.lease)
        for _, member in self._members.of_client(report.client_id):
            if number in member.leases:
                return member.leases[number]
            for copy in member.left.values():
                if copy.number == number:
                    return copy.key
        return None

    def _reported(self, offset: int, report: Sent | DeliveryFailed) -> tuple[str, Lease] | None:
        """The lease that a report is about. One that does not match its lease is ignored."""
        if (key := self.leased_key(report)) is None:
            return None
        if (lease := self.window(offset, key).leases.get(report.message_id)) is None:
            return None
        return (key, lease) if lease.number == lease_number(report.lease) else None

    def sent(self, offset: int, event: DeliveriesSent, now_ms: int) -> Done:
        """Bridges have handed these over. Nobody acknowledges a copy of QoS 0: that it was sent is its ack."""
        done: Done = []
        for report in event.sent:
            found = self._reported(offset, report)
            if found is None:
                done += self._left_copy_sent(offset, report, now_ms)
            if found is None or found[1].sent:
                continue
            key, lease = found
            window, delivery = self.window(offset, key), self.delivery(key)
            lease.sent = True
            lease.deliveries += 1
            lease.holders = window.with_holder(lease.holders, report.client_id, report.alias)
            done += self._confirmed(lease)
            if report.alias is not None:
                window.aliases[report.alias] = report.message_id
            if report.qos == 0:
                done += self.acked(offset, key, report.message_id, report.client_id, now_ms)
            elif delivery is not None and self._members[lease.member].filters:
                lease.until = now_ms + delivery.ack_timeout_ms
                done += self.deadline(key, window, lease.until)
        return done

    def acked(self, offset: int, key: str, message_id: str, client_id: str, now_ms: int) -> Done:
        """A leased message is acknowledged by a client: it is done with. If that is the holder, its member has room."""
        window = self.window(offset, key)
        lease = window.leases[message_id]
        member = self._members[lease.member]
        done: Done = []
        if member.client_id != client_id:
            done += self.leave_copy(key, message_id)
            window.forget_holders(lease.holders)
        else:
            member.failures, member.acked_to = 0, max(member.acked_to, lease.number)
            done += self.release(lease)
        window.remove(message_id)
        if lease.stored:
            done += self.acknowledged(offset, key, message_id, lease.score)
        return [*done, *self.freed(offset, key, (lease.member,), now_ms)]

    def failed(self, offset: int, event: DeliveryFailed, now_ms: int) -> Done:
        """A copy was not handed over, though perhaps told of as sent by a broker that had yet to find nobody there."""
        found = self._reported(offset, event)
        if found is None:
            return self._left_copy_failed(offset, event, now_ms)
        key, lease = found
        if event.reason in ("gone", "too_large"):
            window = self.window(offset, key)
            done = self.release(lease)
            window.remove(event.message_id)
            if lease.stored and event.reason == "gone":
                done += self.acknowledged(offset, key, event.message_id, lease.score)
            elif lease.stored:
                waiting = Waiting(lease.score, event.message_id, lease.deliveries, lease.holders)
                done += self.given_up(offset, key, waiting, TOO_LARGE, now_ms)
            return [*done, *self.freed(offset, key, (lease.member,), now_ms)]
        lease.deliveries -= int(lease.sent)  # which counted as a delivery
        done = self.give_back(offset, key, event.message_id, now_ms)
        member = self._members[lease.member]
        if lease.number > member.epoch and not member.rests_until:
            done += self._rest(lease.member, member, now_ms)
        return [*done, *self.freed(offset, key, (lease.member,), now_ms)]

    def _left_copy_sent(self, offset: int, report: Sent, now_ms: int) -> Done:
        """The lease of a copy was over before this report. A copy of QoS 0 takes no room from here on."""
        for name, member in self._members.in_use(report.client_id):
            copies = (x for x in member.left.values() if x.number == lease_number(report.lease))
            copy = next(copies, None)
            if copy is None or copy.alias is not None:
                continue
            self._members.touch(name)
            if report.qos:
                member.left[copy.name] = structs.replace(copy, alias=report.alias)
                return []
            del member.left[copy.name]
            return self.freed(offset, copy.key, (name,), now_ms)
        return []

    def _left_copy_failed(self, offset: int, event: DeliveryFailed, now_ms: int) -> Done:
        """A copy of a lease that is over is not with its client any more."""
        key = self.leased_key(event)
        found = None if key is None else self.acked_copy(event.client_id, key, event.message_id)
        return [] if key is None or found is None else self.freed(offset, key, found[:1], now_ms)

    def _rest(self, name: str, member: Member, now_ms: int) -> Done:
        member.failures += 1
        rest_ms = min(REST_MS << min(member.failures - 1, 16), REST_MS_MAX)
        member.rests_until = now_ms + rest_ms
        self._members.touch(name)
        return [self._due.falls_due(due_member(MEMBER, name), member.rests_until)]

    # -- rounds --------------------------------------------------------------------------------------------

    def start_round(self, name: str, member: Member, *, everything: bool = False) -> Done:
        """Have a member go through all that waits for it, a piece with every tick; if it is at that, once more. One that
        has come may have to look at `everything` there is.
        """
        at = member.round
        self._members.touch(name)
        if at.active:
            at.whole = False
            if everything:
                at.topic_filter, at.after, at.everything = "", "", True
            return []
        if everything:
            at = Round(everything=True)
        goes = not member.awaited  # else when nothing is any more
        member.round = Round(at.topic_filter, at.after, active=goes, everything=at.everything)
        return self.queue_work(name) if goes else []

    def queue_work(self, name: str) -> Done:
        """One more that ticks work for, behind those that wait for it."""
        self._counters.work += 1
        self._counters.place += 1
        return [SetIndex(WORK, name, self._counters.place)]


def valid_until(lease: Lease) -> int:
    """Until when (ms) a bridge may still deliver the copy of a lease."""
    return lease.leased_at + COMMAND_VALID_FOR_S * 1000


def too_often(deliveries: int) -> str:
    """Why a message is dead."""
    return f"delivered {deliveries} times without an acknowledgement"
