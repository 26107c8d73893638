"""The messages agent's machine: it stores messages as the rules say, and removes them when they expire.

Rule 1: every transition of a message without a delivery rule is in this file, or in `agents/topics/storage.py`, whose
header has the concepts and invariants: body, index entry, retained entry, receipt, and who refers to a body.
Rule 2: no IO, no clock, no chance. docs/explanation/machines/messages.md is the specification.

STATE

- In the fence (`partition_state`): the number and start of the current generation of seen ids, and the next due time.
- For each topic that retains a message, in the table `states`: a `RetainedState`.
- Stored messages have no private state: index and bodies are the state. Only the topic's owner writes them.
- In memory only, during a tick: the due things (`DueTimes.supplied`), and the oldest index entries (`_entries`).

INVARIANTS

1. Everything that expires has a due thing at its end or earlier: an index (for its oldest entry), a retained entry, a
   message with its own expiry. So a tick finds it. When can a due thing be late or missing? After new rules shorten the
   lifetime of an index, or give it one: the old due thing stays, or the next publish to the topic makes the first one.
2. A tick, `message.retained` and `rules.changed` are stepped alone: the first two read the index, so the index must
   have everything published before. New rules change which topics the agent owns.

TRANSITIONS

ON message.published:
1. An invalid topic is a DecodeError. A repeat of a seen id changes nothing.
2. Unless it has expired on its way: store and index it, retain it, or clear the retained entry, as the plan says.
3. Run the user commands. They run even for a message that has expired.

ON message.retained: retain the message, or clear the retained entry.

ON message.delivered, message.acked: write the receipt, and run the user commands.

ON tick, for each due thing, at most 32:
1. `index`: remove the expired entries and release their bodies. The oldest that is left falls due again.
2. `retained`: clear the retained entry, if it has expired.
3. `message`: remove the message everywhere.

ON rules.changed: use the new rules, and store them.

ON refused: remove the other parts of the message (`MessageStorage.refused`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from millpond.agents.effects import NO_SOURCE, Effect, Output, Refusal, SetDue, SetRules
from millpond.agents.ports import LoadedState
from millpond.agents.reads import Read, ReadDue, ReadEntry, ReadIndex, ReadStates
from millpond.agents.topics.due_times import INDEX, RETAINED, DueTimes, due_member, split_due
from millpond.agents.topics.storage import MessageStorage, expired_entries, oldest_entries
from millpond.schemas import keys
from millpond.schemas.events import (
    AgentName,
    Event,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    MessageRetained,
    RulesChanged,
    Tick,
)
from millpond.schemas.rules import Rules


class MessagesMachine:
    """State and transitions of one partition."""

    agent: AgentName = "messages"

    def __init__(self) -> None:
        """Call `restore` before anything else."""
        self._due = DueTimes()
        self._storage = MessageStorage(self._due)
        # Supplied for a tick: topic → its oldest index entries, and how many were read at most.
        self._entries: dict[str, tuple[list[tuple[str, int]], int]] = {}

    # -- interface of the driver ------------------------------------------------------------------------

    def restore(
        self, partition_state: Mapping[str, Any], stored: LoadedState, rules: Rules
    ) -> None:
        self._due.restore(partition_state)
        self._storage.restore(partition_state, stored, rules)
        self._entries = {}

    @property
    def next_due_ms(self) -> int | None:
        return self._due.next_ms

    def owns(self, key: str) -> bool:
        """True for every topic without a delivery rule."""
        return self.rules.owner(key) == self.agent

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        return self._storage.rules

    def alone(self, event: Event) -> bool:
        """True for the events of invariant 2."""
        return isinstance(event, Tick | MessageRetained | RulesChanged)

    def wanted(self, events: Sequence[Event], now_ms: int) -> Sequence[Read]:
        """Return the reads for the retained states that may change; for a tick, for due things and index entries."""
        if len(events) == 1 and isinstance(events[0], Tick):
            return self._wanted_by_tick(now_ms)
        touched = filter(self._storage.touches_retained, events)
        unknown = self._storage.unknown(keys.record_key(event) for event in touched)
        return [*unknown, *self._storage.wanted_by_retained(events)]

    def _wanted_by_tick(self, now_ms: int) -> list[Read]:
        if self._due.supplied is None:
            return [self._due.wanted()]
        overdue = self._due.overdue(now_ms)
        reads: list[Read] = [*self._storage.unknown(topic for _, topic, _ in overdue)]
        indexes = [topic for kind, topic, _ in overdue if kind == INDEX]
        return [*reads, *oldest_entries(indexes, self._entries)]

    def supply(self, read: Read, answer: Any) -> None:
        match read:
            case ReadStates():
                self._storage.retained.supply(answer)
            case ReadDue():
                self._due.supplied = answer
            case ReadEntry():
                self._storage.supply_place(read, answer)
            case _:
                assert isinstance(read, ReadIndex), "`wanted` asks for nothing else"
                self._entries[read.topic] = answer, read.limit

    def step(self, offset: int, event: Event, now_ms: int, score: int) -> Sequence[Effect | Output]:
        """Fold one event.

        Raises:
            DecodeError: a topic name is invalid, or new rules cannot be read.
        """
        match event:
            case MessagePublished():
                return self._published(offset, event, now_ms, score)
            case MessageRetained():
                return self._storage.broker_retains(offset, event, score, dead=False)
            case MessageAcked() | MessageDelivered():
                return self._storage.reported(offset, event, now_ms)
            case Tick():
                return self._tick(now_ms)
            case RulesChanged():
                self._storage.rules_changed(Rules.from_canonical(event.rules))
                return (SetRules(event.rules),)
            case _:
                return ()  # an event of another agent

    def finish(self) -> Sequence[Effect]:
        return self._storage.finish()

    def settled(self) -> None:
        self._storage.settled()

    def partition_state(self) -> dict[str, int]:
        return {**self._storage.seen.partition_state(), **self._due.partition_state()}

    def refused(self, event: Event, refusal: Refusal) -> Sequence[Effect]:
        return self._storage.refused(event, refusal)

    # -- transitions ------------------------------------------------------------------------------------

    def _published(
        self, offset: int, event: MessagePublished, now_ms: int, score: int
    ) -> Sequence[Effect | Output]:
        if not self._storage.is_new(event, now_ms):
            return ()
        plan = self._storage.plans.of(event.topic)
        done: list[Effect | Output] = []
        if event.expires_at is None or event.expires_at > now_ms:
            indexed = plan.store and (event.qos > 0 or plan.store_qos0)
            done += self._storage.published(offset, event, score, indexed=indexed)
        if plan.commands["message.publish"]:
            done += self._storage.commands(offset, event)
        return done

    def _tick(self, now_ms: int) -> Sequence[Effect]:
        effects: list[Effect] = []
        for member in self._due.take(now_ms):
            effects.append(SetDue(member, None))
            kind, topic, message_id = split_due(member)
            if kind == INDEX:
                effects += self._sweep_index(topic, now_ms)
            elif kind == RETAINED:
                effects += self._storage.sweep_retained(topic, now_ms)
            else:
                effects += self._storage.expire(topic, message_id)
        self._entries = {}
        return effects

    def _sweep_index(self, topic: str, now_ms: int) -> list[Effect]:
        """Remove the index entries that have expired by the rules in force."""
        lifetime = self._storage.plans.of(topic).index_lifetime_ms
        if lifetime is None:
            return []  # new rules store the topic without `expired_time`, or no longer
        entries, limit = self._entries[topic]
        expired, next_end = expired_entries(entries, limit, lifetime, now_ms)
        effects = self._storage.unindex(NO_SOURCE, topic, expired)
        if next_end is not None:
            effects.append(self._due.falls_due(due_member(INDEX, topic), next_end))
        return effects
