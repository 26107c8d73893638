"""The messages agent's machine.

Rule 1: every transition of a message without a delivery rule is in this file.
Rule 2: no IO, no clock, no chance.

ON published: unless its id was seen, keep the body, its index entry and the retained entry, as the topic's rules
say; run the user's commands. ON delivered, acked: note the receipt; run the user's commands. ON tick: what is
due goes, a bounded piece at a time. ON rules changed: go on by the new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from agents.commands import run_commands
from agents.effects import (
    NO_SOURCE,
    ClearRetained,
    DeadLetter,
    DropBody,
    Effect,
    KeepReceipt,
    Refusal,
    Retain,
    SetDue,
    SetRules,
    SetState,
    SpareBody,
    StoreMessage,
    Unindex,
)
from agents.held import Changed, Held
from agents.messages.state import (
    INDEX,
    RETAINED,
    TopicState,
    earliest,
    index_due,
    later,
    message_due,
    pack,
    retained_due,
    split_due,
    unpack,
)
from agents.plans import MessageHook, Plan, Plans
from agents.ports import Read, ReadDue, ReadIndex, ReadStates, Stored
from agents.seen import SeenIds
from schemas.errors import DecodeError
from schemas.events import (
    AgentName,
    Event,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    RulesChanged,
    Tick,
)
from schemas.rules import Rules

# One tick looks at no more than this: 32 due things and 4,096 index entries are some ms of Redis. What is left
# over is still due, so that another tick follows at once.
SWEEP_DUE_MAX: Final = 32
SWEEP_ENTRIES_MAX: Final = 4_096


class MessagesMachine:
    """State and transitions of one partition."""

    agent: AgentName = "messages"
    # A tick reads the index, so everything published before must be in it; new rules decide what is owned.
    alone: frozenset[type] = frozenset({Tick, RulesChanged})

    def __init__(self) -> None:
        """An empty partition without rules; `restore` follows."""
        self._seen = SeenIds()
        self._rules = Rules()
        self._plans = Plans(self._rules)
        self._clear()

    def _clear(self) -> None:
        self.next_due_ms: int | None = None
        self._topics: Held[TopicState | None] = Held(unpack)
        self._dropped: dict[str, None] = {}  # bodies that nothing refers to after this batch
        # Supplied for a tick: what is due; the oldest index entries, and how many were asked for.
        self._due: list[tuple[str, int]] | None = None
        self._entries: dict[str, tuple[list[tuple[str, int]], int]] = {}

    # -- what the driver asks ---------------------------------------------------------------------------

    def restore(self, partition_state: Mapping[str, int], stored: Stored, rules: Rules) -> None:
        """See `agents.ports.Machine`."""
        self._clear()
        self._seen.restore(partition_state, stored.seen)
        self.next_due_ms = partition_state.get("next_due_ms")
        self._plans, self._rules = Plans(rules), rules

    def owns(self, key: str) -> bool:
        """Every topic that no delivery rule claims."""
        return self._rules.owner(key) == self.agent

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        return self._rules

    def wanted(self, events: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """The states of topics whose retained message may change; for a tick, what is due and its entries."""
        if len(events) == 1 and isinstance(events[0], Tick):
            return self._wanted_by_tick(now_ms)
        unknown = self._topics.unknown(
            event.topic
            for event in events
            if isinstance(event, MessagePublished)
            and event.retain
            and self._plans.of(event.topic).touches_retained
        )
        return [ReadStates(unknown)] if unknown else []

    def _wanted_by_tick(self, now_ms: int) -> list[Read]:
        if self._due is None:
            return [ReadDue(SWEEP_DUE_MAX + 1)]
        overdue = [split_due(member) for member, at in self._due[:SWEEP_DUE_MAX] if at <= now_ms]
        reads: list[Read] = []
        unknown = self._topics.unknown(topic for _, topic, _ in overdue)
        if unknown:
            reads.append(ReadStates(unknown))
        indexes = [topic for kind, topic, _ in overdue if kind == INDEX]
        limit = SWEEP_ENTRIES_MAX // max(len(indexes), 1) + 1
        reads.extend(ReadIndex(topic, limit) for topic in indexes if topic not in self._entries)
        return reads

    def supply(self, read: Read, answer: Any) -> None:
        """See `agents.ports.Machine`."""
        match read:
            case ReadStates():
                self._topics.supply(answer)
            case ReadDue():
                self._due = answer
            case _:
                assert isinstance(read, ReadIndex), "nothing else is wanted"
                self._entries[read.topic] = answer, read.limit

    def step(
        self, offset: int, event: Event, now_ms: int, score: int
    ) -> Sequence[Effect | DeadLetter]:
        """One event. A topic that cannot be published to, or rules that cannot be read, are a `DecodeError`."""
        match event:
            case MessagePublished():
                return self._published(offset, event, now_ms, score)
            case MessageAcked():
                return self._reported(offset, event, "message.acked", now_ms)
            case MessageDelivered():
                return self._reported(offset, event, "message.delivered", now_ms)
            case Tick():
                return self._tick(now_ms)
            case RulesChanged():
                return self._rules_changed(event)
            case _:
                return ()  # another agent's concern

    def finish(self) -> Sequence[Effect]:
        """One write for each topic whose retained message changed, however often; the ids seen.

        A body that was let go and stored again within the batch stays: what is removed is removed last.
        """
        dropped, self._dropped = self._dropped, {}
        changed = [effect for change in self._topics.finish() for effect in _kept(change)]
        return [*map(DropBody, dropped), *changed, *self._seen.finish()]

    def settled(self) -> None:
        """See `agents.ports.Machine`."""
        self._topics.settled()

    def partition_state(self) -> dict[str, int]:
        """See `agents.ports.Machine`."""
        state = self._seen.partition_state()
        if self.next_due_ms is not None:
            state["next_due_ms"] = self.next_due_ms
        return state

    # -- transitions ------------------------------------------------------------------------------------

    def _published(
        self, offset: int, event: MessagePublished, now_ms: int, score: int
    ) -> Sequence[Effect | DeadLetter]:
        plan = self._plans.of(event.topic)
        if plan.error is not None:
            raise DecodeError(plan.error)
        if not self._seen.add(event.message_id, now_ms):
            return ()
        effects: list[Effect | DeadLetter] = []
        if event.expires_at is None or event.expires_at > now_ms:
            self._keep(effects, plan, offset, event, score)
        if plan.commands["message.publish"]:
            effects.extend(run_commands(plan.commands["message.publish"], offset, event))
        return effects

    def _keep(
        self,
        effects: list[Effect | DeadLetter],
        plan: Plan,
        offset: int,
        event: MessagePublished,
        score: int,
    ) -> None:
        log_ms = score // 1000
        indexed = plan.store and (event.qos > 0 or plan.store_qos0)
        # [MQTT-3.3.1-6], [MQTT-3.3.1-7]: an empty retained payload is never kept, it only clears.
        retained = event.retain and plan.retain and event.payload != ""
        index_end = earliest(log_ms, plan.index_lifetime_ms, event.expires_at)
        needed_until = index_end if indexed else 0
        if retained:
            retained_end = earliest(log_ms, plan.retained_lifetime_ms, event.expires_at)
            needed_until = later(needed_until, retained_end)
        if indexed or retained:
            self._dropped.pop(event.message_id, None)
            effects.append(StoreMessage(offset, event, score, indexed, needed_until))
            if event.expires_at is not None:
                due = message_due(event.topic, event.message_id)
                effects.append(self._falls_due(due, event.expires_at))
        if indexed and plan.index_lifetime_ms is not None:
            effects.append(self._falls_due(index_due(event.topic), log_ms + plan.index_lifetime_ms))
        if retained:
            state = TopicState(
                message_id=event.message_id, score=score, expires_at=retained_end, indexed=indexed
            )
            effects.extend(self._retain(offset, event.topic, state))
        elif event.retain and plan.clear_retained and event.payload == "":
            effects.extend(self._retain(offset, event.topic, None))

    def _retain(self, offset: int, topic: str, after: TopicState | None) -> list[Effect]:
        """Replace what a topic retains. The old body goes with its last reference."""
        before = self._topics[topic]
        effects: list[Effect] = []
        self._topics.change(offset, topic, after)
        if before is not None and (after is None or after.message_id != before.message_id):
            if not before.indexed:
                self._dropped[before.message_id] = None
            if before.expires_at is not None:
                effects.append(SetDue(retained_due(topic), None))
        if after is not None and after.expires_at is not None:
            effects.append(self._falls_due(retained_due(topic), after.expires_at))
        return effects

    def _falls_due(self, member: str, at: int) -> SetDue:
        if self.next_due_ms is None or at < self.next_due_ms:
            self.next_due_ms = at
        return SetDue(member, at)

    def _reported(
        self,
        offset: int,
        event: MessageAcked | MessageDelivered,
        hook: MessageHook,
        now_ms: int,
    ) -> Sequence[Effect | DeadLetter]:
        plan = self._plans.of(event.topic)
        effects: list[Effect | DeadLetter] = []
        lifetime = plan.receipts.get(hook)
        if lifetime is not None:
            effects.append(
                KeepReceipt(
                    offset,
                    event.message_id,
                    "acked" if hook == "message.acked" else "delivered",
                    event.client_id,
                    event.at // 1000,
                    now_ms + lifetime,
                )
            )
        if plan.commands[hook]:
            effects.extend(run_commands(plan.commands[hook], offset, event))
        return effects

    def _rules_changed(self, event: RulesChanged) -> Sequence[Effect]:
        self._rules = Rules.from_canonical(event.rules)
        self._plans = Plans(self._rules)
        return (SetRules(event.rules),)

    def _tick(self, now_ms: int) -> Sequence[Effect]:
        """What is due goes; the next thing due is known again afterwards."""
        assert self._due is not None, "the driver supplies what a tick wants"
        due, self._due = self._due, None
        looked_at = due[:SWEEP_DUE_MAX]
        self.next_due_ms = min((at for _, at in due[SWEEP_DUE_MAX:]), default=None)
        effects: list[Effect] = []
        for member, at in looked_at:
            if at > now_ms:
                self.next_due_ms = at if self.next_due_ms is None else min(at, self.next_due_ms)
                continue
            effects.append(SetDue(member, None))
            kind, topic, message_id = split_due(member)
            if kind == INDEX:
                effects.extend(self._sweep_index(topic, now_ms))
            elif kind == RETAINED:
                effects.extend(self._sweep_retained(topic, now_ms))
            else:
                effects.extend(self._drop_message(topic, message_id))
        self._entries = {}
        return effects

    def _sweep_index(self, topic: str, now_ms: int) -> list[Effect]:
        """The index entries that are too old by the rules in force, and their bodies."""
        lifetime = self._plans.of(topic).index_lifetime_ms
        if lifetime is None:
            return []  # the rules changed: nothing of this topic expires any more
        entries, limit = self._entries[topic]
        ends = [(message_id, score // 1000 + lifetime) for message_id, score in entries]
        expired = [message_id for message_id, end in ends[: limit - 1] if end <= now_ms]
        effects: list[Effect] = []
        if expired:
            effects.append(Unindex(NO_SOURCE, topic, tuple(expired)))
            for message_id in expired:
                self._let_go(topic, message_id)
        if len(ends) > len(expired):
            effects.append(self._falls_due(index_due(topic), ends[len(expired)][1]))
        return effects

    def _let_go(self, topic: str, message_id: str) -> None:
        """The index holds a body no longer; the retained entry still may."""
        held = self._topics[topic]
        if held is not None and held.message_id == message_id:
            self._topics.change(NO_SOURCE, topic, msgspec.structs.replace(held, indexed=False))
        else:
            self._dropped[message_id] = None

    def _sweep_retained(self, topic: str, now_ms: int) -> list[Effect]:
        held = self._topics[topic]
        if held is None or held.expires_at is None:
            return []
        if held.expires_at > now_ms:
            return [self._falls_due(retained_due(topic), held.expires_at)]
        return self._retain(NO_SOURCE, topic, None)

    def _drop_message(self, topic: str, message_id: str) -> list[Effect]:
        """A message with an expiry of its own: gone from index and retained entry alike."""
        self._dropped[message_id] = None
        held = self._topics[topic]
        if held is not None and held.message_id == message_id:
            self._topics.change(NO_SOURCE, topic, None)
        return [Unindex(NO_SOURCE, topic, (message_id,))]

    # -- after a refusal --------------------------------------------------------------------------------

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        """A foreign key was in the way: what was half written of the message goes."""
        if not isinstance(event, MessagePublished):
            return ()
        topic, message_id = event.topic, event.message_id
        held = self._topics.get(topic) if event.retain else None
        if held is not None and held.message_id != message_id:
            held = None  # replaced meanwhile, and its body let go by that
        match refusal.part:
            case "body":
                if held is not None:
                    self._topics.change(refusal.offset, topic, None)
                return (Unindex(NO_SOURCE, topic, (message_id,)), SpareBody(message_id))
            case "index" if held is not None:
                self._topics.change(
                    refusal.offset, topic, msgspec.structs.replace(held, indexed=False)
                )
            case "index":
                self._dropped[message_id] = None
            case "retained" if held is not None:
                self._topics.change(refusal.offset, topic, None)
                if not held.indexed:
                    self._dropped[message_id] = None
        return ()


def _kept(change: Changed[TopicState | None]) -> list[Effect]:
    """What becomes of a topic's retained message."""
    offset, topic, before, after = change
    effects: list[Effect] = [SetState(topic, pack(after))]
    if after is None:
        effects.append(ClearRetained(offset, topic))
    elif before is None or after.score != before.score:
        effects.append(Retain(offset, topic, after.message_id, after.score))
    return effects
