"""What the owner of a topic does with its messages besides delivering them: body, index, retained message, receipts, the
user's commands. The three agents that own topics share it.

A body is kept until the last of {index entry, retained entry, dead letter} lets it go.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from millpond.agents.effects import (
    NO_SOURCE,
    ClearBodyExpiry,
    ClearRetained,
    DeleteBody,
    Effect,
    KeepReceipt,
    Output,
    Refusal,
    Retain,
    SetDue,
    SetState,
    StoreMessage,
    Unindex,
)
from millpond.agents.ports import LoadedState
from millpond.agents.reads import Read, ReadEntry, ReadIndex, ReadStates
from millpond.agents.topics.dedup import SeenIds
from millpond.agents.topics.due_times import INDEX, MESSAGE, RETAINED, DueTimes, due_member
from millpond.agents.topics.plans import MessageHook, TopicPlans
from millpond.agents.topics.state_cache import ChangedState, StateCache
from millpond.agents.topics.user_commands import run_commands
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import (
    Event,
    Message,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    MessageRetained,
)
from millpond.schemas.rules import Rules

# One tick looks at no more index entries than this: some ms of Redis. What is left over is still due, so that another
# tick follows at once.
SWEEP_ENTRIES_MAX: Final = 4_096


class RetainedState(Struct, frozen=True, kw_only=True):
    """The retained message of a topic. A topic without one has no state.

    `indexed` says whether the body is also held by the topic's index, or by a dead letter; `expires_at` is ms or None.
    """

    message_id: str
    score: int
    expires_at: int | None
    indexed: bool


_decoder = msgspec.json.Decoder(RetainedState)


def pack(state: RetainedState | None) -> bytes | None:
    """The state as it is stored."""
    return None if state is None else msgspec.json.encode(state)


def unpack(packed: bytes | None) -> RetainedState | None:
    """The state as it was stored. Only we write it: anything else is a bug, not an input."""
    return None if packed is None else _decoder.decode(packed)


class MessageStorage:
    """One partition's. `rules` are in force; `due` is shared with the machine that keeps this."""

    def __init__(self, due: DueTimes) -> None:
        """Nothing kept, no rules; `restore` follows."""
        self._due = due
        self.seen = SeenIds()
        self.rules_changed(Rules())
        self.retained: StateCache[RetainedState | None] = StateCache(unpack)
        self._dropped: dict[str, None] = {}  # bodies that nothing refers to after this batch
        self._places: dict[ReadEntry, int | None] = {}  # told of in this batch

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        """Start anew from what the store holds."""
        self.seen.restore(partition_state, stored.seen)
        self.rules_changed(rules)
        self.retained = StateCache(unpack)
        self._dropped, self._places = {}, {}

    def rules_changed(self, rules: Rules) -> None:
        """Go on by these rules."""
        self.rules, self.plans = rules, TopicPlans(rules)

    def unknown(self, topics: Iterable[str]) -> list[ReadStates]:
        """The reads for the retained messages of topics, where they are not known."""
        unknown = self.retained.unknown(topics)
        return [ReadStates(unknown)] if unknown else []

    def touches_retained(self, event: Event) -> bool:
        """Whether an event changes what its topic retains."""
        return (
            isinstance(event, MessagePublished)
            and event.retain
            and self.plans.of(event.topic).touches_retained
        )

    # -- a publish --------------------------------------------------------------------------------------

    def is_new(self, event: MessagePublished, now_ms: int) -> bool:
        """Whether a publish is none that was seen before. A topic that is none is a `DecodeError`."""
        error = self.plans.of(event.topic).error
        if error is not None:
            raise DecodeError(error)
        return self.seen.add(event.message_id, now_ms)

    def published(
        self, offset: int, event: MessagePublished, score: int, *, indexed: bool
    ) -> list[Effect | Output]:
        """Keep a new message as its topic's rules say; `indexed` if it has an entry in the topic's index."""
        plan = self.plans.of(event.topic)
        log_ms = score // 1000
        done: list[Effect | Output] = []
        # [MQTT-3.3.1-6], [MQTT-3.3.1-7]: an empty retained payload is never kept, it only clears.
        retained = event.retain and plan.retain and event.payload != ""
        needed_until: int | None = 0
        if indexed:
            needed_until = earliest(log_ms, plan.index_lifetime_ms, event.expires_at)
        if retained:
            retained_end = earliest(log_ms, plan.retained_lifetime_ms, event.expires_at)
            needed_until = later(needed_until, retained_end)
        if indexed or retained:
            done += self._store(StoreMessage(offset, event, score, indexed, needed_until))
        if indexed and plan.index_lifetime_ms is not None:
            end = log_ms + plan.index_lifetime_ms
            done.append(self._due.falls_due(due_member(INDEX, event.topic), end))
        if retained:
            state = RetainedState(
                message_id=event.message_id, score=score, expires_at=retained_end, indexed=indexed
            )
            done += self._retain(offset, event.topic, state)
        elif event.retain and plan.clear_retained and event.payload == "":
            done += self._retain(offset, event.topic, None)
        return done

    def _store(self, storing: StoreMessage) -> list[Effect]:
        """A body that was let go of in this batch stays."""
        event = storing.event
        self._dropped.pop(event.message_id, None)
        if event.expires_at is None:
            return [storing]
        message = due_member(MESSAGE, event.topic, event.message_id)
        return [storing, self._due.falls_due(message, event.expires_at)]

    # -- what the broker retains, as far as a bridge had to ask -----------------------------------------

    def wanted_by_retained(self, events: Iterable[Event]) -> list[Read]:
        """What the topics retain so far of which some of these tell, and whether their indexes have the messages."""
        told = [event for event in events if isinstance(event, MessageRetained)]
        entries = [ReadEntry(event.topic, event.message_id) for event in told]
        unknown = [entry for entry in dict.fromkeys(entries) if entry not in self._places]
        return [*self.unknown(event.topic for event in told), *unknown]

    def retains(self, topic: str, message_id: str) -> bool:
        """Whether this is what a topic retains, where that is known: one published again is known by it."""
        held = self.retained[topic]
        return held is not None and held.message_id == message_id

    def supply_place(self, read: ReadEntry, answer: int | None) -> None:
        """Where the index has the message."""
        self._places[read] = answer

    def broker_retains(
        self, offset: int, event: MessageRetained, score: int, *, dead: bool
    ) -> list[Effect]:
        """ON retained: keep or clear it, as at a publish. The message itself was told of before, or never is: one that is
        published after this is stored, but loses its body with the retained entry. `dead` if it is a dead letter.

        Raises:
            DecodeError: the topic cannot be published to.
        """
        plan = self.plans.of(event.topic)
        place = self._places[ReadEntry(event.topic, event.message_id)]
        if plan.error is not None:
            raise DecodeError(plan.error)
        if event.payload == "":
            return self._retain(offset, event.topic, None) if plan.clear_retained else []
        before = self.retained[event.topic]
        if not plan.retain or (before is not None and before.message_id == event.message_id):
            return []
        end = earliest(score // 1000, plan.retained_lifetime_ms, event.expires_at)
        needed_until = None if dead else end
        if place is not None:
            indexed_until = earliest(place // 1000, plan.index_lifetime_ms, event.expires_at)
            needed_until = later(needed_until, indexed_until)
        state = RetainedState(
            message_id=event.message_id, score=score, expires_at=end,
            indexed=dead or place is not None,
        )  # fmt: skip
        message = structs.replace(event, retain=True)
        stored = self._store(StoreMessage(offset, message, score, False, needed_until))
        return [*stored, *self._retain(offset, event.topic, state)]

    def commands(self, offset: int, event: MessagePublished) -> Sequence[Effect | Output]:
        """What the user's commands ask for at a publish."""
        return run_commands(self.plans.of(event.topic).commands["message.publish"], offset, event)

    def _retain(self, offset: int, topic: str, after: RetainedState | None) -> list[Effect]:
        """Replace what a topic retains. The old body goes with its last reference."""
        before = self.retained[topic]
        effects: list[Effect] = []
        self.retained.change(offset, topic, after)
        if before is not None and (after is None or after.message_id != before.message_id):
            if not before.indexed:
                self._dropped[before.message_id] = None
            if before.expires_at is not None:
                effects.append(SetDue(due_member(RETAINED, topic), None))
        if after is not None and after.expires_at is not None:
            effects.append(self._due.falls_due(due_member(RETAINED, topic), after.expires_at))
        return effects

    # -- what clients report ----------------------------------------------------------------------------

    def reported(
        self, offset: int, event: MessageAcked | MessageDelivered, now_ms: int
    ) -> Sequence[Effect | Output]:
        """A client got or acknowledged a message: its receipt, and the user's commands."""
        hook: MessageHook = (
            "message.acked" if isinstance(event, MessageAcked) else "message.delivered"
        )
        plan = self.plans.of(event.topic)
        lifetime = plan.receipts.get(hook)
        commands = run_commands(plan.commands[hook], offset, event)
        if lifetime is None:
            return commands
        receipt = KeepReceipt(
            offset,
            event.message_id,
            "acked" if hook == "message.acked" else "delivered",
            event.client_id,
            event.at // 1000,
            now_ms + lifetime,
        )
        return [receipt, *commands]

    # -- what goes --------------------------------------------------------------------------------------

    def unindex(self, offset: int, topic: str, message_ids: Sequence[str]) -> list[Effect]:
        """Take messages out of a topic's index, and let their bodies go."""
        for message_id in message_ids:
            self.let_go(topic, message_id)
        return [Unindex(offset, topic, tuple(message_ids))] if message_ids else []

    def let_go(self, topic: str, message_id: str) -> None:
        """Index and dead letters hold a body no longer; the retained entry still may."""
        held = self.retained[topic]
        if held is not None and held.message_id == message_id:
            without = structs.replace(held, indexed=False)
            self.retained.change(NO_SOURCE, topic, without)
        else:
            self._dropped[message_id] = None

    def sweep_retained(self, topic: str, now_ms: int) -> list[Effect]:
        """The retained message of a topic goes if its time has come."""
        held = self.retained[topic]
        if held is None or held.expires_at is None:
            return []
        if held.expires_at > now_ms:
            return [self._due.falls_due(due_member(RETAINED, topic), held.expires_at)]
        return self._retain(NO_SOURCE, topic, None)

    def expire(self, topic: str, message_id: str) -> list[Effect]:
        """A message with an expiry of its own: gone from index and retained entry alike."""
        self._dropped[message_id] = None
        held = self.retained[topic]
        if held is not None and held.message_id == message_id:
            self.retained.change(NO_SOURCE, topic, None)
        return [Unindex(NO_SOURCE, topic, (message_id,))]

    # -- after a refusal --------------------------------------------------------------------------------

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """A foreign key was in the way: what was half written of the message goes."""
        if not isinstance(event, Message):
            return ()
        topic, message_id = event.topic, event.message_id
        retains = event.retain or isinstance(event, MessageRetained)
        held = self.retained.get(topic) if retains else None
        if held is not None and held.message_id != message_id:
            held = None  # replaced meanwhile, and its body let go by that
        match refusal.part:
            case "body":
                if held is not None:
                    self.retained.change(refusal.offset, topic, None)
                return (Unindex(NO_SOURCE, topic, (message_id,)), ClearBodyExpiry(message_id))
            case "index" if held is not None:
                without = structs.replace(held, indexed=False)
                self.retained.change(refusal.offset, topic, without)
            case "index":
                self._dropped[message_id] = None
            case "retained" if held is not None:
                self.retained.change(refusal.offset, topic, None)
                if not held.indexed:
                    self._dropped[message_id] = None
        return ()

    # -- the end of a batch -----------------------------------------------------------------------------

    def finish(self) -> list[Effect]:
        """One write for each topic whose retained message changed, however often; the ids seen.

        A body that was let go and stored again within the batch stays: what is removed is removed last.
        """
        dropped, self._dropped, self._places = self._dropped, {}, {}
        changed = [effect for change in self.retained.finish() for effect in _kept(change)]
        return [*map(DeleteBody, dropped), *changed, *self.seen.finish()]

    def settled(self) -> None:
        self.retained.settled()


def _kept(change: ChangedState[RetainedState | None]) -> list[Effect]:
    """What becomes of a topic's retained message."""
    offset, topic, before, after = change
    effects: list[Effect] = [SetState(topic, pack(after))]
    if after is None:
        effects.append(ClearRetained(offset, topic))
    elif before is None or after.score != before.score:
        effects.append(Retain(offset, topic, after.message_id, after.score))
    return effects


def earliest(log_ms: int, lifetime_ms: int | None, expires_at: int | None) -> int | None:
    """When something kept since `log_ms` ends: by its rule's lifetime or its own expiry, the sooner."""
    if lifetime_ms is None:
        return expires_at
    end = log_ms + lifetime_ms
    return end if expires_at is None else min(end, expires_at)


def later(end: int | None, other: int | None) -> int | None:
    """The later of two ends; None is never."""
    return None if end is None or other is None else max(end, other)


def oldest_entries(topics: Sequence[str], known: Container[str]) -> list[ReadIndex]:
    """The reads for what a tick looks at of these topics' indexes, where it is not known."""
    limit = SWEEP_ENTRIES_MAX // max(len(topics), 1) + 1
    return [ReadIndex(topic, limit) for topic in topics if topic not in known]


def expired_entries(
    entries: Sequence[tuple[str, int]], limit: int, lifetime_ms: int, now_ms: int
) -> tuple[list[str], int | None]:
    """Of a topic's oldest index entries, of which `limit` were asked for: those that are too old, and when the next
    one will be (None if there is none). The last of a full page only tells that.
    """
    ends = [(message_id, score // 1000 + lifetime_ms) for message_id, score in entries]
    expired = [message_id for message_id, end in ends[: limit - 1] if end <= now_ms]
    return expired, ends[len(expired)][1] if len(ends) > len(expired) else None
