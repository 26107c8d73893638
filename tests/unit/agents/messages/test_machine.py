"""The messages machine: one test for each rule of its transitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from millpond.agents.effects import (
    NO_SOURCE,
    ClearBodyExpiry,
    ClearRetained,
    DeadLetter,
    DeleteBody,
    Effect,
    KeepReceipt,
    Output,
    Refusal,
    Retain,
    RunCommand,
    SetDue,
    SetRules,
    SetState,
    StoreMessage,
    Unindex,
    WriteSeen,
)
from millpond.agents.messages.machine import MessagesMachine
from millpond.agents.ports import LoadedState
from millpond.agents.reads import ReadDue, ReadIndex, ReadStates
from millpond.agents.topics import storage
from millpond.agents.topics.due_times import INDEX, MESSAGE, RETAINED, due_member
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import Event, NodeStarted, RulesChanged, Tick
from millpond.schemas.rules import Rules
from tests.support import given

NOTHING_STORED = LoadedState(None, {}, None, ((), ()))
TICK = Tick(at=0, node="millpond", agent="messages")


class Running:
    """A machine over a store of a few dicts. It does what the driver does, without faults."""

    def __init__(self, *tables: str) -> None:
        self.machine = MessagesMachine()
        self.rules = given.rules(*tables)
        self.machine.restore({}, NOTHING_STORED, self.rules)
        self.states: dict[str, bytes] = {}
        self.due: dict[str, int] = {}
        self.index: dict[str, dict[str, int]] = {}
        self.offset = -1
        self.score = 0

    def fold(self, *events: Event, now_ms: int = 10_000) -> list[Effect | Output]:
        """Fold one batch; return its effects without those of seen ids."""
        while reads := self.machine.wanted(events, now_ms):
            for read in reads:
                self.machine.supply(read, self.answer(read))
        effects: list[Effect | Output] = []
        for event in events:
            self.offset += 1
            self.score = max(now_ms * 1000, self.score + 1)
            effects += self.machine.step(self.offset, event, now_ms, self.score)
        effects += self.machine.finish()
        self.carry_out(effects)
        self.machine.settled()
        return [effect for effect in effects if not isinstance(effect, WriteSeen)]

    def answer(self, read: Any) -> Any:
        match read:
            case ReadStates():
                return {topic: self.states.get(topic) for topic in read.names}
            case ReadDue():
                return sorted(self.due.items(), key=lambda item: (item[1], item[0]))[: read.limit]
            case ReadIndex():
                entries = self.index.get(read.topic, {}).items()
                return sorted(entries, key=lambda item: item[1])[: read.limit]

    def carry_out(self, effects: Sequence[Effect | Output]) -> None:
        for effect in effects:
            match effect:
                case StoreMessage(event=event, score=score, indexed=True):
                    self.index.setdefault(event.topic, {}).setdefault(event.message_id, score)
                case Unindex(topic=topic, message_ids=message_ids):
                    for message_id in message_ids:
                        self.index[topic].pop(message_id, None)
                case SetDue(member=member, at=None):
                    self.due.pop(member, None)
                case SetDue(member=member, at=int(at)):
                    self.due[member] = min(at, self.due.get(member, at))
                case SetState(key=topic, state=None):
                    self.states.pop(topic, None)
                case SetState(key=topic, state=bytes(state)):
                    self.states[topic] = state


def of_kind(effects: Sequence[Effect | Output], *kinds: type) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kinds)]


# -- published ------------------------------------------------------------------------------------------


def test_a_publish_is_stored_with_its_index_entry() -> None:
    event = given.published()
    assert Running(given.store()).fold(event) == [StoreMessage(0, event, 10_000_000, True, None)]


def test_a_publish_without_a_matching_rule_stores_nothing() -> None:
    assert Running(given.store("other/#")).fold(given.published()) == []


def test_a_qos_0_publish_is_not_stored() -> None:
    assert Running(given.store()).fold(given.published(qos=0)) == []


def test_a_qos_0_publish_is_stored_where_the_rule_says_so() -> None:
    running = Running(given.store(store_qos0=True))
    assert of_kind(running.fold(given.published(qos=0)), StoreMessage)


def test_a_repeated_publish_changes_nothing() -> None:
    running = Running(given.store(), given.command("INCR seen:${msgid}"))
    running.fold(given.published())
    assert running.fold(given.published()) == []


def test_scores_follow_the_log_and_never_tie() -> None:
    running = Running(given.store())
    effects = running.fold(given.published("a"), given.published("b"))
    assert [effect.score for effect in effects] == [10_000_000, 10_000_001]  # type: ignore[union-attr]
    earlier = running.fold(given.published("c"), now_ms=9_000)
    assert earlier[0].score == 10_000_002  # type: ignore[union-attr]


def test_expired_time_gives_the_body_a_lifetime_and_the_topic_a_due_time() -> None:
    running = Running(given.store(expired_time=60))
    event = given.published()
    assert running.fold(event) == [
        StoreMessage(0, event, 10_000_000, True, 70_000),
        SetDue(due_member(INDEX, "t"), 70_000),
    ]
    assert running.machine.next_due_ms == 70_000


def test_the_earlier_of_rule_and_message_expiry_ends_a_message() -> None:
    running = Running(given.store(expired_time=60))
    effects = running.fold(given.published(expires_at=20_000))
    assert effects[0].expires_at == 20_000  # type: ignore[union-attr]
    assert SetDue(due_member(MESSAGE, "t", "m1"), 20_000) in effects


def test_an_expired_message_is_not_stored_but_its_commands_run() -> None:
    running = Running(given.store(), given.command("INCR seen:${msgid}"))
    assert running.fold(given.published(expires_at=10_000)) == [
        RunCommand(0, (b"INCR", b"seen:m1"))
    ]


def test_an_invalid_topic_raises_a_decode_error() -> None:
    running = Running(given.store())
    with pytest.raises(DecodeError, match="wildcard"):
        running.machine.step(0, given.published(topic="a/+"), 0, 0)


def test_the_agent_owns_topics_without_a_delivery_rule() -> None:
    queue = given.a_rule(
        hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue"
    )
    machine = Running(given.store(), queue).machine
    assert machine.owns("t")
    assert not machine.owns("queue/a")


# -- retained -------------------------------------------------------------------------------------------


def test_a_retained_publish_has_one_body_for_index_and_retained_entry() -> None:
    running = Running(given.store(), given.retain())
    event = given.published(retain=True)
    effects = running.fold(event)
    assert of_kind(effects, StoreMessage) == [StoreMessage(0, event, 10_000_000, True, None)]
    assert of_kind(effects, Retain) == [Retain(0, "t", "m1", 10_000_000)]


def test_a_retained_publish_replaces_the_former_one_and_deletes_its_body() -> None:
    running = Running(given.retain())
    running.fold(given.published("a", retain=True))
    effects = running.fold(given.published("b", retain=True))
    assert of_kind(effects, DeleteBody) == [DeleteBody("a")]
    assert of_kind(effects, Retain) == [Retain(1, "t", "b", 10_000_001)]


def test_a_replaced_body_stays_while_the_index_refers_to_it() -> None:
    running = Running(given.store(), given.retain())
    running.fold(given.published("a", retain=True))
    assert of_kind(running.fold(given.published("b", retain=True)), DeleteBody) == []


def test_several_retained_publishes_in_one_batch_are_one_write() -> None:
    running = Running(given.retain())
    effects = running.fold(*(given.published(name, retain=True) for name in "abc"))
    assert of_kind(effects, Retain) == [Retain(2, "t", "c", 10_000_002)]
    assert of_kind(effects, DeleteBody) == [DeleteBody("a"), DeleteBody("b")]
    assert len(of_kind(effects, SetState)) == 1


def test_an_empty_retained_publish_clears_the_retained_entry() -> None:
    running = Running(given.retain(), given.clear_retained())
    running.fold(given.published("a", retain=True))
    effects = running.fold(given.published("b", retain=True, payload=""))
    assert of_kind(effects, ClearRetained, DeleteBody, SetState) == [
        DeleteBody("a"), SetState("t", None), ClearRetained(1, "t"),
    ]  # fmt: skip
    assert of_kind(effects, StoreMessage) == []


def test_an_empty_retained_publish_clears_nothing_without_the_rule() -> None:
    running = Running(given.retain())
    running.fold(given.published("a", retain=True))
    assert running.fold(given.published("b", retain=True, payload="")) == []


def test_a_publish_retained_and_cleared_in_one_batch_leaves_nothing() -> None:
    running = Running(given.retain(), given.clear_retained())
    effects = running.fold(
        given.published("a", retain=True), given.published("b", retain=True, payload="")
    )
    assert of_kind(effects, Retain, ClearRetained, SetState) == []
    assert of_kind(effects, DeleteBody) == [DeleteBody("a")]


def test_a_clearing_rule_alone_does_not_retain() -> None:
    assert Running(given.clear_retained()).fold(given.published(retain=True)) == []


def test_a_body_lives_as_long_as_the_longer_of_index_and_retained_entry() -> None:
    running = Running(given.store(expired_time=60), given.retain(expired_time=90))
    assert (
        of_kind(running.fold(given.published(retain=True)), StoreMessage)[0].expires_at == 100_000
    )
    running = Running(given.store(expired_time=60), given.retain())
    assert of_kind(running.fold(given.published(retain=True)), StoreMessage)[0].expires_at is None


def test_replacing_a_retained_message_replaces_its_due_time() -> None:
    running = Running(given.retain(expired_time=60))
    running.fold(given.published("a", retain=True))
    effects = running.fold(given.published("b", retain=True), now_ms=20_000)
    assert of_kind(effects, SetDue) == [
        SetDue(due_member(RETAINED, "t"), None), SetDue(due_member(RETAINED, "t"), 80_000),
    ]  # fmt: skip


def test_a_body_released_and_stored_again_in_one_batch_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by the properties: a store removes after everything that the batch stores."""
    monkeypatch.setattr("millpond.agents.topics.dedup.GENERATION_IDS_MAX", 1)
    running = Running(given.retain())
    effects = running.fold(*(given.published(name, retain=True) for name in "abca"))
    assert of_kind(effects, DeleteBody) == [DeleteBody("b"), DeleteBody("c")]
    assert of_kind(effects, Retain) == [Retain(3, "t", "a", 10_000_003)]


def test_a_message_retained_again_after_others_has_its_new_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by the properties: the same id before and after a batch is not the same entry."""
    monkeypatch.setattr("millpond.agents.topics.dedup.GENERATION_IDS_MAX", 1)
    running = Running(given.retain())
    running.fold(given.published("a", retain=True))
    effects = running.fold(*(given.published(name, retain=True) for name in "bca"))
    assert of_kind(effects, Retain) == [Retain(3, "t", "a", 10_000_003)]


def test_no_body_is_left_after_index_and_retained_entry_are_refused() -> None:
    running = Running(given.store(), given.retain())
    event = given.published(retain=True)
    running.fold(event)
    running.machine.refused(event, Refusal(0, "index", "WRONGTYPE"))
    running.machine.refused(event, Refusal(0, "retained", "WRONGTYPE"))
    assert of_kind(running.fold(), DeleteBody) == [DeleteBody("m1")]


def test_the_same_message_published_again_after_the_window_keeps_its_body() -> None:
    running = Running(given.retain())
    running.fold(given.published("a", retain=True))
    running.machine.restore({}, NOTHING_STORED, running.rules)
    assert of_kind(running.fold(given.published("a", retain=True)), DeleteBody) == []


# -- receipts, commands ---------------------------------------------------------------------------------


def test_an_ack_writes_a_receipt() -> None:
    running = Running(given.receipt(expired_time=60))
    assert running.fold(given.acked()) == [KeepReceipt(0, "m1", "acked", "sub", 5, 70_000)]


def test_a_delivery_writes_a_receipt_for_a_day_without_expired_time() -> None:
    running = Running(given.receipt("message.delivered"))
    assert running.fold(given.delivered()) == [
        KeepReceipt(0, "m1", "delivered", "sub", 4, 10_000 + 86_400_000)
    ]


def test_an_ack_without_a_receipt_rule_writes_nothing() -> None:
    assert Running(given.store()).fold(given.acked(), given.delivered()) == []


def test_commands_run_on_each_hook_with_their_values() -> None:
    running = Running(
        given.command("HSET last:${clientid} ${topic} ${payload}"),
        given.command("HSET ack:${clientid} ${topic} ${msgid}", hook="message.acked"),
    )
    assert running.fold(given.published(payload="two words"), given.acked()) == [
        RunCommand(0, (b"HSET", b"last:pub", b"t", b"two words")),
        RunCommand(1, (b"HSET", b"ack:sub", b"t", b"m1")),
    ]


def test_a_command_that_would_write_millponds_own_keys_becomes_a_dead_letter() -> None:
    running = Running(given.command("SET ${topic} x"))
    effects = running.fold(given.published(topic="millpond:{x}:applied"))
    assert isinstance(effects[0], DeadLetter)
    assert "millpond:" in effects[0].reason


def test_a_payload_is_never_judged_as_a_key() -> None:
    running = Running(given.command("SET last ${payload}"))
    assert running.fold(given.published(payload="millpond:{x}:applied")) == [
        RunCommand(0, (b"SET", b"last", b"millpond:{x}:applied"))
    ]


# -- ticks ----------------------------------------------------------------------------------------------


def test_a_tick_removes_expired_messages_with_their_bodies_and_sets_the_next_due_time() -> None:
    running = Running(given.store(expired_time=60))
    running.fold(given.published("a"), now_ms=10_000)
    running.fold(given.published("b"), now_ms=20_000)
    assert running.fold(TICK, now_ms=70_000) == [
        SetDue(due_member(INDEX, "t"), None),
        Unindex(NO_SOURCE, "t", ("a",)),
        SetDue(due_member(INDEX, "t"), 80_000),
        DeleteBody("a"),
    ]
    assert running.machine.next_due_ms == 80_000


def test_nothing_is_due_after_the_last_message_expired() -> None:
    running = Running(given.store(expired_time=60))
    running.fold(given.published("a"))
    running.fold(TICK, now_ms=70_000)
    assert running.machine.next_due_ms is None
    assert running.due == {}


def test_a_tick_just_before_the_time_removes_nothing() -> None:
    running = Running(given.store(expired_time=60))
    running.fold(given.published("a"))
    assert of_kind(running.fold(TICK, now_ms=69_999), Unindex) == []
    assert running.machine.next_due_ms == 70_000


def test_an_expired_entry_leaves_the_body_to_the_retained_entry() -> None:
    running = Running(given.store(expired_time=60), given.retain())
    running.fold(given.published("a", retain=True))
    effects = running.fold(TICK, now_ms=70_000)
    assert of_kind(effects, Unindex) == [Unindex(NO_SOURCE, "t", ("a",))]
    assert of_kind(effects, DeleteBody) == []
    assert of_kind(running.fold(given.published("b", retain=True)), DeleteBody) == [DeleteBody("a")]


def test_a_retained_message_expires_by_its_own_rule() -> None:
    running = Running(given.retain(expired_time=60))
    running.fold(given.published("a", retain=True))
    effects = running.fold(TICK, now_ms=70_000)
    assert of_kind(effects, DeleteBody, ClearRetained) == [
        DeleteBody("a"),
        ClearRetained(NO_SOURCE, "t"),
    ]
    assert running.due == {}


def test_a_message_with_its_own_expiry_is_removed_from_index_and_retained_entry() -> None:
    running = Running(given.store(), given.retain())
    running.fold(given.published("a", retain=True, expires_at=20_000))
    effects = running.fold(TICK, now_ms=20_000)
    assert Unindex(NO_SOURCE, "t", ("a",)) in effects
    assert DeleteBody("a") in effects
    assert ClearRetained(NO_SOURCE, "t") in effects
    running.fold(given.published("b", expires_at=30_000))
    assert of_kind(running.fold(TICK, now_ms=30_000), Unindex, ClearRetained) == [
        Unindex(NO_SOURCE, "t", ("b",))
    ]


def test_a_due_time_of_former_rules_removes_nothing_that_new_rules_keep() -> None:
    running = Running(given.store(expired_time=60), given.retain(expired_time=60))
    running.fold(given.published("a", retain=True))
    lasting = given.rules(given.store(), given.retain())
    running.fold(RulesChanged(at=0, node="n", agent="messages", rules=lasting.canonical()))
    effects = running.fold(TICK, now_ms=70_000)
    assert of_kind(effects, Unindex) == []


def test_messages_that_new_rules_keep_longer_fall_due_again_later() -> None:
    running = Running(given.store(expired_time=60))
    running.fold(given.published("a"))
    longer = given.rules(given.store(expired_time=120))
    running.fold(RulesChanged(at=0, node="n", agent="messages", rules=longer.canonical()))
    assert running.fold(TICK, now_ms=70_000) == [
        SetDue(due_member(INDEX, "t"), None), SetDue(due_member(INDEX, "t"), 130_000),
    ]  # fmt: skip
    assert running.machine.next_due_ms == 130_000


def test_a_retained_message_that_was_replaced_is_not_swept_by_the_old_due_time() -> None:
    running = Running(given.retain(expired_time=60))
    running.fold(given.published("a", retain=True))
    running.due[due_member(RETAINED, "t")] = 15_000
    effects = running.fold(TICK, now_ms=20_000)
    assert of_kind(effects, DeleteBody) == []
    assert running.due == {due_member(RETAINED, "t"): 70_000}
    running.due = {due_member(RETAINED, "gone"): 15_000}
    assert of_kind(running.fold(TICK, now_ms=20_000), DeleteBody) == []


def test_a_tick_does_a_bounded_piece_and_the_rest_is_still_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "SWEEP_ENTRIES_MAX", 3)
    monkeypatch.setattr("millpond.agents.topics.due_times.SWEEP_DUE_MAX", 1)
    running = Running(given.store(expired_time=60))
    running.fold(*(given.published(f"a{n}", topic="a") for n in range(5)))
    running.fold(given.published("b", topic="b"), now_ms=10_001)
    removed: list[str] = []
    for _ in range(4):
        for effect in of_kind(running.fold(TICK, now_ms=80_000), Unindex):
            assert len(effect.message_ids) <= 3
            removed += effect.message_ids
    assert removed == ["a0", "a1", "a2", "a3", "a4", "b"]
    assert running.due == {}
    assert running.machine.next_due_ms is None


# -- rules, other agents' events, restoring -------------------------------------------------------------


def test_new_rules_are_in_force_from_their_record_on() -> None:
    running = Running(given.store())
    silent = given.rules(given.store("other/#"))
    change = RulesChanged(at=0, node="n", agent="messages", rules=silent.canonical())
    assert running.fold(change) == [SetRules(silent.canonical())]
    assert running.fold(given.published()) == []
    assert running.machine.rules.canonical() == silent.canonical()


def test_rules_that_do_not_decode_raise_a_decode_error() -> None:
    running = Running(given.store())
    with pytest.raises(DecodeError):
        running.machine.step(0, RulesChanged(at=0, node="n", agent="messages", rules="{"), 0, 0)


def test_another_agents_event_is_ignored() -> None:
    assert Running(given.store()).fold(NodeStarted(at=0, node="n")) == []


def test_a_restored_machine_continues_from_its_state() -> None:
    running = Running(given.store(expired_time=60))
    running.fold(given.published("a"))
    state = running.machine.partition_state()
    stored = LoadedState(None, {}, None, (("a",), ()))
    restored = MessagesMachine()
    restored.restore(state, stored, running.rules)
    assert restored.next_due_ms == 70_000
    assert restored.step(1, given.published("a"), 10_000, 10_000_001) == ()
    assert restored.rules.canonical() == running.rules.canonical()


def test_a_new_machine_has_no_rules() -> None:
    assert MessagesMachine().rules == Rules()


def test_states_beyond_the_bound_are_forgotten_and_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("millpond.agents.topics.state_cache.STATES_HELD_MAX", 1)
    running = Running(given.retain())
    running.fold(
        given.published("a", topic="a", retain=True), given.published("b", topic="b", retain=True)
    )
    running.fold(given.published("c", topic="c", retain=True))
    effects = running.fold(given.published("d", topic="a", retain=True))
    assert of_kind(effects, DeleteBody) == [DeleteBody("a")]


# -- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "retained", "part", "cleaning"),
    [
        ([given.store()], False, "body", [Unindex(NO_SOURCE, "t", ("m1",)), ClearBodyExpiry("m1")]),
        ([given.store()], False, "index", [DeleteBody("m1")]),
        ([given.store(), given.retain()], True, "index", []),
        ([given.store(), given.retain()], True, "retained", []),
        ([given.retain()], True, "retained", [DeleteBody("m1")]),
        ([given.retain()], True, "body", [Unindex(NO_SOURCE, "t", ("m1",)), ClearBodyExpiry("m1")]),
        ([given.store()], False, "command", []),
    ],
)
def test_the_other_parts_of_a_refused_message_are_removed(
    tables: list[str], retained: bool, part: Any, cleaning: list[Effect]
) -> None:
    running = Running(*tables)
    event = given.published(retain=retained)
    running.fold(event)
    effects = [*running.machine.refused(event, Refusal(0, part, "WRONGTYPE")), *running.fold()]
    assert of_kind(effects, Unindex, ClearBodyExpiry, DeleteBody) == cleaning


def test_a_message_with_a_refused_body_does_not_stay_retained() -> None:
    running = Running(given.retain())
    event = given.published(retain=True)
    running.fold(event)
    running.machine.refused(event, Refusal(0, "body", "WRONGTYPE"))
    assert of_kind(running.fold(), ClearRetained) == [ClearRetained(0, "t")]


def test_a_refusal_of_another_event_than_a_publish_needs_no_cleaning_up() -> None:
    machine = Running(given.receipt()).machine
    assert machine.refused(given.acked(), Refusal(0, "receipt", "WRONGTYPE")) == ()


def test_a_refused_retained_entry_that_was_replaced_meanwhile_is_left_alone() -> None:
    running = Running(given.retain())
    event = given.published("a", retain=True)
    running.fold(event)
    running.fold(given.published("b", retain=True))
    running.machine.refused(event, Refusal(0, "retained", "WRONGTYPE"))
    assert of_kind(running.fold(), ClearRetained) == []
    running.machine.refused(event, Refusal(0, "body", "WRONGTYPE"))
    assert of_kind(running.fold(), ClearRetained) == []
