"""How the driver reads and batches, over a log and a store in memory. The other files here test the rest."""

from __future__ import annotations

import pytest

from millpond.agents.driver import decoding
from millpond.agents.messages.machine import MessagesMachine
from millpond.pipeline.stores.memory.server import Zset
from millpond.schemas import codec, keys
from millpond.schemas.errors import BrokenInvariant
from millpond.schemas.events import Event, RulesChanged, Tick
from tests.support import given
from tests.support.partition import World, run

INCR = given.command("INCR seen:${msgid}")


# -- reading --------------------------------------------------------------------------------------------


def test_a_published_message_is_in_the_store_once_it_is_settled() -> None:
    world = World(given.store())
    driver = world.started()
    world.append(given.published("a"), given.published("b"))
    world.feed(driver)
    assert world.stored() == ["a", "b"]


def test_another_agents_record_is_skipped_by_its_key_before_it_is_decoded() -> None:
    queue = given.a_rule(
        hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue"
    )
    world = World(queue)
    driver = world.started()
    world.append_raw(b"queue/a", b"not decoded")
    world.append_raw(b"$millpond/queue", b"not decoded either")
    world.feed(driver)
    assert world.dead_letters == []
    assert driver.records_skipped == 2
    assert driver.next_offset == 3


def test_a_record_that_does_not_decode_becomes_a_dead_letter_and_later_records_are_folded() -> None:
    world = World(given.store())
    driver = world.started()
    world.append(given.published("a"))
    poison = world.append_raw(b"t", b"\xff{")
    world.append(given.published("b"))
    world.feed(driver)
    assert world.stored() == ["a", "b"]
    (dead_letter,) = world.dead_letters
    headers = dict(dead_letter.headers)
    assert (dead_letter.key, dead_letter.value) == (b"t", b"\xff{")
    assert headers["source-topic"] == b"mqtt.messages"
    assert headers["source-partition"] == b"0"
    assert headers["source-offset"] == b"%d" % poison.offset
    assert headers["agent"] == b"messages"
    assert b"JSON" in headers["reason"]


@pytest.mark.parametrize("value", [None, b"", b"{}", b"[]", b'{"type":"unknown","at":1}'])
def test_a_value_that_is_not_an_event_becomes_a_dead_letter(value: bytes | None) -> None:
    world = World(given.store())
    driver = world.started()
    poison = world.append_raw(b"t", value)
    world.feed(driver)
    assert world.dead_letter_counts == {poison.offset: 1}
    assert world.dead_letters[0].value == value


@pytest.mark.parametrize("key", [b"other", None, b"", b"\xff"])
def test_a_record_whose_key_is_not_its_events_becomes_a_dead_letter(key: bytes | None) -> None:
    world = World(given.store())
    driver = world.started()
    poison = world.append_raw(key, codec.encode(given.published()))
    world.feed(driver)
    assert world.dead_letter_counts == {poison.offset: 1}
    assert world.dead_letters[0].key == key
    assert b"key" in dict(world.dead_letters[0].headers)["reason"]
    assert world.stored() == []


def test_a_publish_with_an_invalid_topic_becomes_a_dead_letter() -> None:
    world = World(given.store())
    driver = world.started()
    (poison,) = world.append(given.published(topic="a/+"))
    world.append(given.published("b"))
    world.feed(driver)
    assert world.dead_letter_counts == {poison.offset: 1}
    assert world.stored() == ["b"]


def test_a_forbidden_user_command_becomes_a_dead_letter_and_the_message_is_stored() -> None:
    world = World(given.store(), given.command("SET ${payload} x"))
    driver = world.started()
    (record,) = world.append(given.published(payload="millpond:mine"))
    world.feed(driver)
    assert world.dead_letter_counts == {record.offset: 1}
    assert world.stored() == ["m1"]


def test_the_owner_of_a_key_is_determined_again_when_the_memory_was_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "OWNED_KEYS_MAX", 1)
    world = World(given.store())
    driver = world.started()
    world.append(*(given.published(f"{name}1", topic=name) for name in "aba"))
    world.feed(driver)
    assert world.stored("a") == ["a1"]


def test_offsets_below_the_position_are_skipped() -> None:
    world = World(INCR)
    driver = world.started()
    records = world.append(*(given.published(name) for name in "abc"))
    world.feed(driver)
    run(driver.process(records))
    run(driver.settle())
    assert [world.text(f"seen:{name}") for name in "abc"] == ["1", "1", "1"]


def test_a_gap_before_the_first_record_is_read_from_the_log() -> None:
    world = World(given.store())
    driver = world.started()
    *_, last = world.append(*(given.published(name) for name in "abc"))
    run(driver.process([last]))
    run(driver.settle())
    assert world.stored() == ["a", "b", "c"]


# -- batches --------------------------------------------------------------------------------------------


def test_the_next_batch_is_packed_while_the_one_before_is_in_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    calls: list[str] = []
    record_calls(monkeypatch, driver.store, "pack", calls)
    record_calls(monkeypatch, driver.machine, "settled", calls)
    run(driver.process(world.append(given.published("a"))))
    run(driver.process(world.append(given.published("b"))))
    run(driver.settle())
    assert calls == ["pack", "pack", "settled", "settled"]


def record_calls(monkeypatch: pytest.MonkeyPatch, of: object, name: str, calls: list[str]) -> None:
    """Append the method's name to `calls` whenever it is called."""
    method = getattr(of, name)

    def recorded(*arguments: object) -> object:
        calls.append(name)
        return method(*arguments)

    monkeypatch.setattr(of, name, recorded)


def test_a_batch_is_one_transaction() -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    before = world.applied
    world.append(*(given.published(name) for name in "abc"))
    world.feed(driver)
    assert before is not None and world.applied is not None
    assert world.applied.sequence == before.sequence + 1


@pytest.mark.parametrize(
    "alone",
    [
        Tick(at=0, node="n", agent="messages"),
        RulesChanged(at=0, node="n", agent="messages", rules="[]"),
    ],
)
def test_an_event_that_is_stepped_alone_splits_the_batch(alone: Event) -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    before = world.applied
    world.append(given.published("a"), alone, given.published("b"))
    world.feed(driver)
    assert before is not None and world.applied is not None
    assert world.applied.sequence == before.sequence + 3


def test_a_tick_finds_in_the_store_what_was_published_before_it_in_the_same_run() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    world.append(given.published("a"))
    world.now_ms = 70_000
    world.append(Tick(at=0, node="n", agent="messages"))
    world.feed(driver)
    assert world.stored() == []
    assert keys.message_body("a") not in world.server.values


def test_the_fence_identifies_the_last_applied_record() -> None:
    world = World(given.store())
    driver = world.started()
    world.now_ms = 12_345
    (record,) = world.append(given.published())
    world.feed(driver)
    applied = world.applied
    assert applied is not None
    assert (applied.offset, applied.timestamp) == (record.offset, 12_345)
    assert (applied.cluster_id, applied.partition_count) == ("memory", 1)
    assert (applied.now_ms, applied.score) == (12_345, 12_345_000)


def test_messages_of_the_same_moment_keep_their_order() -> None:
    world = World(given.store())
    driver = world.started()
    world.append(*(given.published(name) for name in "cba"))
    world.feed(driver)
    index = world.server.of(keys.message_index("t"), Zset)
    assert [name for name, _ in index.ordered()] == ["c", "b", "a"]
    assert len(set(index.values())) == 3


def test_the_logs_clock_never_goes_back() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    world.append(given.published("a"))
    world.now_ms = 5_000
    world.append(given.published("b"))
    world.feed(driver)
    assert world.applied is not None
    assert world.applied.now_ms == 10_000
    assert world.stored() == ["a", "b"]


def test_timestamps_that_go_back_change_no_order_and_no_expiry() -> None:
    world = World(given.store(expired_time=60))
    driver = world.started()
    for world.now_ms, name in ((70_000, "a"), (10_000, "b"), (50_000, "c")):
        world.append(given.published(name))
    world.feed(driver)
    index = world.server.of(keys.message_index("t"), Zset)
    assert [name for name, _ in index.ordered()] == ["a", "b", "c"]
    # From 10 s to 50 s the log's time went from 70 s to 90 s.
    for world.now_ms, remaining in (
        (129_999, ["a", "b", "c"]), (130_000, ["c"]), (149_999, ["c"]), (150_000, []), (60_000, []),
    ):  # fmt: skip
        world.append(Tick(at=0, node="n", agent="messages"))
        world.feed(driver)
        assert world.stored() == remaining
    world.append(given.published("d"))
    world.now_ms = 189_999
    world.append(Tick(at=0, node="n", agent="messages"))
    world.feed(driver)
    assert world.stored() == ["d"]


def test_skipped_records_move_the_clock() -> None:
    world = World(
        given.a_rule(hook="session.subscribed", topic="q", action="on_message_fetch_for_queue")
    )
    driver = world.started()
    world.now_ms = 99_000
    world.append_raw(b"q", b"another agent's")
    world.now_ms = 20_000
    world.append(given.published())
    world.feed(driver)
    assert world.applied is not None
    assert world.applied.now_ms == 99_000


def test_the_offset_of_skipped_records_is_written_by_maintain() -> None:
    world = World(
        given.a_rule(hook="session.subscribed", topic="q", action="on_message_fetch_for_queue")
    )
    driver = world.started()
    world.feed(driver)
    skipped = world.append_raw(b"q", b"another agent's")
    world.feed(driver)
    assert world.applied is not None
    assert world.applied.offset == skipped.offset - 1
    assert driver.committable == skipped.offset
    run(driver.maintain())
    assert world.applied.offset == skipped.offset
    assert driver.committable == skipped.offset + 1


def test_maintain_writes_nothing_when_nothing_has_changed() -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    run(driver.maintain())
    before = world.applied
    run(driver.maintain())
    assert world.applied == before


def test_a_bug_raises_an_error_with_the_offset_and_nothing_of_the_batch_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(given.store())
    driver = world.started()
    world.feed(driver)
    before = world.server.dump()
    step = MessagesMachine.step

    def broken(machine: MessagesMachine, offset: int, *rest: object) -> object:
        if offset == 2:
            raise KeyError("a bug of ours")
        return step(machine, offset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(MessagesMachine, "step", broken)
    world.append(given.published("a"), given.published("b"))
    with pytest.raises(BrokenInvariant, match=r"mqtt.messages\[0\].*offset 2.*a bug of ours"):
        run(driver.process(world.unread(driver)))
    run(driver.close())
    assert world.server.dump() == before
    assert driver.committable == 1
    monkeypatch.undo()
    world.feed(world.started())
    assert world.stored() == ["a", "b"]
