"""Message storage: what the owner of a topic does with its messages, besides delivering them.

The three agents that own topics share it. docs/explanation/machines/messages.md is its specification.

CONCEPTS

- Body: the stored message. Index entry: its place in the topic's index. Retained entry: the topic's retained message.
- Receipt: the note that a client received or acknowledged a message.
- A body's references: index entry, retained entry, dead letter.

INVARIANTS

1. A body lives until its last reference goes. Then it is unreferenced, and the end of the batch deletes it.
2. A topic has at most one retained message. The cached `RetainedState` says which, and whether the body has another
   reference beside it (`indexed`). Without it the body belongs to the index or a dead letter alone.
3. A body that one batch releases and then stores again stays. The store deletes after all writes, so `_store` takes the
   body back from the unreferenced ones.
4. A repeat of a publish changes nothing, while its id is among the seen ids.

They couple in `let_go`: index and dead letters release a body there, and the retained state decides whether it stays.
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

# Index entries for one tick: some ms of Redis. The rest stays due, so another tick follows at once.
SWEEP_ENTRIES_MAX: Final = 4_096


class RetainedState(Struct, frozen=True, kw_only=True):
    """The retained message of a topic. A topic without one has no state.

    `score` is its place in the log. `expires_at` and `published_at` are in ms, `expires_at` may be None. `indexed` is true
    if the topic's index or a dead letter refers to the body, too.
    """

    message_id: str
    score: int
    expires_at: int | None
    indexed: bool
    published_at: int = 0  # 0: written by an earlier version


_decoder = msgspec.json.Decoder(RetainedState)


def pack(state: RetainedState | None) -> bytes | None:
    """Encode a retained state for the store; None removes it."""
    return None if state is None else msgspec.json.encode(state)


def unpack(packed: bytes | None) -> RetainedState | None:
    """Decode a stored retained state. Only Millpond writes it, so an error here is a bug and no DecodeError."""
    return None if packed is None else _decoder.decode(packed)


class MessageStorage:
    """The message storage of one partition. `rules` are in force."""

    def __init__(self, due: DueTimes) -> None:
        """`due` is shared with the machine. Call `restore` before anything else."""
        self._due = due
        self.seen = SeenIds()
        self.rules_changed(Rules())
        self.retained: StateCache[RetainedState | None] = StateCache(unpack)
        # Message ids whose body the end of the batch deletes.
        self._unreferenced: dict[str, None] = {}
        # Index scores that `message.retained` needs, read in this batch; None if the index lacks the message.
        self._entry_scores: dict[ReadEntry, int | None] = {}

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        """Forget everything, and continue from the stored state."""
        self.seen.restore(partition_state, stored.seen)
        self.rules_changed(rules)
        self.retained = StateCache(unpack)
        self._unreferenced, self._entry_scores = {}, {}

    def rules_changed(self, rules: Rules) -> None:
        """Use these rules from here on."""
        self.rules, self.plans = rules, TopicPlans(rules)

    def unknown(self, topics: Iterable[str]) -> list[ReadStates]:
        """Return the reads for the retained states of topics that are not in memory."""
        unknown = self.retained.unknown(topics)
        return [ReadStates(unknown)] if unknown else []

    def touches_retained(self, event: Event) -> bool:
        """True if an event can change what its topic retains, so its retained state must be in memory."""
        return (
            isinstance(event, MessagePublished)
            and event.retain
            and self.plans.of(event.topic).touches_retained
        )

    # -- a publish --------------------------------------------------------------------------------------

    def is_new(self, event: MessagePublished, now_ms: int) -> bool:
        """True if this message id is new; remember it.

        Raises:
            DecodeError: the topic name is invalid.
        """
        error = self.plans.of(event.topic).error
        if error is not None:
            raise DecodeError(error)
        return self.seen.add(event.message_id, now_ms)

    def published(
        self, offset: int, event: MessagePublished, score: int, *, indexed: bool
    ) -> list[Effect | Output]:
        """Store and retain a new message, or clear the retained entry, as the topic's plan says.

        `indexed` is true if the message gets an index entry: that depends on the agent.
        """
        plan = self.plans.of(event.topic)
        log_ms = score // 1000
        done: list[Effect | Output] = []
        # [MQTT-3.3.1-6], [MQTT-3.3.1-7]: an empty retained payload is never stored, it only clears.
        retained = event.retain and plan.retain and event.payload != ""
        # A tick deletes the body. Its lifetime in the store is a safeguard. None is for ever; 0 is only where to begin.
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
                message_id=event.message_id, score=score, expires_at=retained_end, indexed=indexed,
                published_at=event.published_at,
            )  # fmt: skip
            done += self._retain(offset, event.topic, state)
        elif event.retain and plan.clear_retained and event.payload == "":
            done += self._retain(offset, event.topic, None)
        return done

    def _store(self, storing: StoreMessage) -> list[Effect]:
        """Store a body. If this batch was to delete it, it stays (invariant 3)."""
        event = storing.event
        self._unreferenced.pop(event.message_id, None)
        if event.expires_at is None:
            return [storing]
        message = due_member(MESSAGE, event.topic, event.message_id)
        return [storing, self._due.falls_due(message, event.expires_at)]

    # -- `message.retained`: a bridge asked the broker what it retains ----------------------------------

    def wanted_by_retained(self, events: Iterable[Event]) -> list[Read]:
        """Return the reads that `message.retained` needs: the topic's retained state, and the message's index entry."""
        retained = [event for event in events if isinstance(event, MessageRetained)]
        entries = [ReadEntry(event.topic, event.message_id) for event in retained]
        unknown = [entry for entry in dict.fromkeys(entries) if entry not in self._entry_scores]
        return [*self.unknown(event.topic for event in retained), *unknown]

    def retains(self, topic: str, message_id: str) -> bool:
        """True if this message is the topic's retained one. The retained state must be in memory.

        A repeat of its publish is recognised by it, even after the seen ids have forgotten it.
        """
        retained = self.retained[topic]
        return retained is not None and retained.message_id == message_id

    def supply_place(self, read: ReadEntry, answer: int | None) -> None:
        """Take the score of an index entry, or None if the index lacks the message."""
        self._entry_scores[read] = answer

    def broker_retains(
        self, offset: int, event: MessageRetained, score: int, *, dead: bool
    ) -> list[Effect]:
        """ON message.retained: retain the message or clear the retained entry, as at a publish.

        The message's own `message.published` comes before, or never. If it came after, the message would be stored, but
        its body would go with the retained entry. A message that was published before the one that is retained changes
        nothing: a broker with mountpoints retains one for each client, and any of them may be found. `dead` is true if the
        message is a dead letter.

        Raises:
            DecodeError: the topic name is invalid.
        """
        plan = self.plans.of(event.topic)
        index_score = self._entry_scores[ReadEntry(event.topic, event.message_id)]
        if plan.error is not None:
            raise DecodeError(plan.error)
        before = self.retained[event.topic]
        if before is not None and event.published_at < before.published_at:
            return []
        if event.payload == "":
            return self._retain(offset, event.topic, None) if plan.clear_retained else []
        if not plan.retain or (before is not None and before.message_id == event.message_id):
            return []
        end = earliest(score // 1000, plan.retained_lifetime_ms, event.expires_at)
        needed_until = None if dead else end
        if index_score is not None:
            indexed_until = earliest(index_score // 1000, plan.index_lifetime_ms, event.expires_at)
            needed_until = later(needed_until, indexed_until)
        state = RetainedState(
            message_id=event.message_id, score=score, expires_at=end,
            indexed=dead or index_score is not None, published_at=event.published_at,
        )  # fmt: skip
        # Index entry and retained entry share one body: it is written again, now with the retain flag.
        message = structs.replace(event, retain=True)
        stored = self._store(StoreMessage(offset, message, score, False, needed_until))
        return [*stored, *self._retain(offset, event.topic, state)]

    def commands(self, offset: int, event: MessagePublished) -> Sequence[Effect | Output]:
        """Return the user commands of a publish."""
        return run_commands(self.plans.of(event.topic).commands["message.publish"], offset, event)

    def _retain(self, offset: int, topic: str, after: RetainedState | None) -> list[Effect]:
        """Replace what a topic retains; None clears it. The former body goes, if it has no other reference."""
        before = self.retained[topic]
        effects: list[Effect] = []
        self.retained.change(offset, topic, after)
        if before is not None and (after is None or after.message_id != before.message_id):
            if not before.indexed:
                self._unreferenced[before.message_id] = None
            if before.expires_at is not None:
                effects.append(SetDue(due_member(RETAINED, topic), None))
        if after is not None and after.expires_at is not None:
            effects.append(self._due.falls_due(due_member(RETAINED, topic), after.expires_at))
        return effects

    # -- delivered, acked -------------------------------------------------------------------------------

    def reported(
        self, offset: int, event: MessageAcked | MessageDelivered, now_ms: int
    ) -> Sequence[Effect | Output]:
        """Write the receipt of a delivery or an acknowledgement, and run the user commands."""
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

    # -- remove -----------------------------------------------------------------------------------------

    def unindex(self, offset: int, topic: str, message_ids: Sequence[str]) -> list[Effect]:
        """Remove messages from a topic's index, and release their bodies."""
        for message_id in message_ids:
            self.let_go(topic, message_id)
        return [Unindex(offset, topic, tuple(message_ids))] if message_ids else []

    def let_go(self, topic: str, message_id: str) -> None:
        """Release a body from index and dead letters. It stays if the topic retains it."""
        retained = self.retained[topic]
        if retained is not None and retained.message_id == message_id:
            self.retained.change(NO_SOURCE, topic, structs.replace(retained, indexed=False))
        else:
            self._unreferenced[message_id] = None

    def sweep_retained(self, topic: str, now_ms: int) -> list[Effect]:
        """Clear the topic's retained message if it has expired. A later one falls due again."""
        retained = self.retained[topic]
        if retained is None or retained.expires_at is None:
            return []
        if retained.expires_at > now_ms:
            return [self._due.falls_due(due_member(RETAINED, topic), retained.expires_at)]
        return self._retain(NO_SOURCE, topic, None)

    def expire(self, topic: str, message_id: str) -> list[Effect]:
        """Remove a message with its own expiry from the index, the retained entry and the bodies."""
        self._unreferenced[message_id] = None
        retained = self.retained[topic]
        if retained is not None and retained.message_id == message_id:
            self.retained.change(NO_SOURCE, topic, None)
        return [Unindex(NO_SOURCE, topic, (message_id,))]

    # -- after a refusal --------------------------------------------------------------------------------

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """Remove the other parts of a message of which the store refused one.

        That happens if a key has another type than Millpond writes there, because another program wrote it.
        """
        if not isinstance(event, Message):
            return ()
        topic, message_id = event.topic, event.message_id
        retains = event.retain or isinstance(event, MessageRetained)
        retained = self.retained.get(topic) if retains else None
        if retained is not None and retained.message_id != message_id:
            # Another message replaced it since, and released its body.
            retained = None
        match refusal.part:
            case "body":
                # The foreign key has the name of the body: leave it, but take back the lifetime that it was given.
                if retained is not None:
                    self.retained.change(refusal.offset, topic, None)
                return (Unindex(NO_SOURCE, topic, (message_id,)), ClearBodyExpiry(message_id))
            case "index" if retained is not None:
                without = structs.replace(retained, indexed=False)
                self.retained.change(refusal.offset, topic, without)
            case "index":
                self._unreferenced[message_id] = None
            case "retained" if retained is not None:
                self.retained.change(refusal.offset, topic, None)
                if not retained.indexed:
                    self._unreferenced[message_id] = None
        return ()

    # -- the end of a batch -----------------------------------------------------------------------------

    def finish(self) -> list[Effect]:
        """End a batch: delete unreferenced bodies, write each changed retained state once, write the seen ids."""
        unreferenced, self._unreferenced, self._entry_scores = self._unreferenced, {}, {}
        changed = [
            effect for change in self.retained.finish() for effect in _retained_effects(change)
        ]
        return [*map(DeleteBody, unreferenced), *changed, *self.seen.finish()]

    def settled(self) -> None:
        self.retained.settled()


def _retained_effects(change: ChangedState[RetainedState | None]) -> list[Effect]:
    """Return the effects of a changed retained state: private state and public retained entry."""
    offset, topic, before, after = change
    effects: list[Effect] = [SetState(topic, pack(after))]
    if after is None:
        effects.append(ClearRetained(offset, topic))
    elif before is None or after.score != before.score:
        effects.append(Retain(offset, topic, after.message_id, after.score))
    return effects


def earliest(log_ms: int, lifetime_ms: int | None, expires_at: int | None) -> int | None:
    """Return when something stored at `log_ms` ends: by its rule's lifetime or its own expiry, the earlier."""
    if lifetime_ms is None:
        return expires_at
    end = log_ms + lifetime_ms
    return end if expires_at is None else min(end, expires_at)


def later(end: int | None, other: int | None) -> int | None:
    """Return the later of two ends. None is never."""
    return None if end is None or other is None else max(end, other)


def oldest_entries(topics: Sequence[str], known: Container[str]) -> list[ReadIndex]:
    """Return the reads of the index entries that a tick handles. The topics share `SWEEP_ENTRIES_MAX`.

    Topics in `known` are read already. One entry more than a tick handles shows when the next one expires.
    """
    limit = SWEEP_ENTRIES_MAX // max(len(topics), 1) + 1
    return [ReadIndex(topic, limit) for topic in topics if topic not in known]


def expired_entries(
    entries: Sequence[tuple[str, int]], limit: int, lifetime_ms: int, now_ms: int
) -> tuple[list[str], int | None]:
    """Return which of a topic's oldest index entries have expired, and when the next one expires, or None.

    `limit` is how many entries were read. The last entry of a full page never counts as expired: it only shows when the
    next one expires.
    """
    ends = [(message_id, score // 1000 + lifetime_ms) for message_id, score in entries]
    expired = [message_id for message_id, end in ends[: limit - 1] if end <= now_ms]
    return expired, ends[len(expired)][1] if len(ends) > len(expired) else None
