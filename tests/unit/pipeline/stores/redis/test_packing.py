"""Effects become these commands in this order, and an error reply becomes the refusals of the right records."""

from __future__ import annotations

import pytest
from hiredis import ReplyError

from millpond.agents.effects import (
    NO_SOURCE,
    ClearBodyExpiry,
    ClearRetained,
    DeadLetter,
    DeleteBody,
    Effect,
    KeepReceipt,
    Refusal,
    RefusedPart,
    Retain,
    RunCommand,
    SetDue,
    SetRules,
    SetState,
    StoreMessage,
    Unindex,
    WriteSeen,
)
from millpond.agents.ports import Applied, Transaction
from millpond.pipeline.stores.redis.commands import CommandList, refusals
from millpond.pipeline.stores.redis.connection import RedisCommand
from millpond.pipeline.stores.redis.packing import (
    BODY_FIELDS,
    BODY_GRACE_MS,
    BatchCommands,
    DueCommands,
    decode_seen,
)
from millpond.schemas.keys import Partition
from tests.support.given import published

PARTITION = Partition("app", "messages", 7)
PRIVATE = "millpond:{app:messages:7}:"
APPLIED = Applied(
    offset=9, timestamp=8, cluster_id="c", partition_count=24, sequence=5, produced=4, now_ms=7,
    score=6, machine={},
)  # fmt: skip


def commands(*effects: Effect, **fields: object) -> list[RedisCommand]:
    """Return all commands of a batch except the fence."""
    values: dict[str, object] = {"outputs": (), "produced": (), **fields}
    batch = Transaction(None, APPLIED, effects, **values)  # type: ignore[arg-type]
    packed = BatchCommands(PARTITION, batch)
    assert packed.state.commands.pop()[:2] == ("SET", f"{PRIVATE}applied")
    return packed.all().commands


def stored(offset: int, message_id: str, topic: str = "t", **fields: object) -> StoreMessage:
    expires_at = fields.pop("expires_at", None)
    indexed = bool(fields.pop("indexed", True))
    assert expires_at is None or isinstance(expires_at, int)
    return StoreMessage(offset, published(message_id, topic, **fields), offset, indexed, expires_at)


def test_a_message_is_a_hash_with_an_expiry_and_an_index_entry() -> None:
    message = stored(3, "m1", "a/b", retain=True, published_at=1_999, expires_at=10)
    assert commands(message) == [
        (
            "HSET", "mqtt:msg:m1", "id", "m1", "from", "pub", "qos", 1, "topic", "a/b",
            "payload", "hello", "ts", 1, "retain", "true",
        ),
        ("PEXPIREAT", "mqtt:msg:m1", 10 + BODY_GRACE_MS),
        ("ZADD", "mqtt:msg:a/b", "NX", 3, "m1"),
    ]  # fmt: skip


@pytest.mark.parametrize(("wall_ms", "end"), [(9, 10), (10, 10), (11, 11)])
def test_a_body_expires_an_hour_from_now_at_the_earliest(wall_ms: int, end: int) -> None:
    transaction = Transaction(None, APPLIED, [stored(3, "m1", expires_at=10)], [], [])
    packed = BatchCommands(PARTITION, transaction, wall_ms).all().commands
    assert ("PEXPIREAT", "mqtt:msg:m1", end + BODY_GRACE_MS) in packed


def test_a_message_that_is_only_retained_has_no_index_entry_and_a_binary_payload_is_decoded() -> (
    None
):
    message = stored(3, "m1", indexed=False, payload="/w==", payload_encoding="base64")
    (body,) = commands(message)
    assert b"\xff" in body and "ZADD" not in body


def test_a_batch_has_one_zadd_for_each_topic_after_all_bodies() -> None:
    packed = commands(stored(1, "a", "t"), stored(2, "b", "u"), stored(3, "c", "t"))
    assert [command[0] for command in packed] == ["HSET"] * 3 + ["ZADD"] * 2
    assert packed[3:] == [
        ("ZADD", "mqtt:msg:t", "NX", 1, "a", 3, "c"),
        ("ZADD", "mqtt:msg:u", "NX", 2, "b"),
    ]


def test_the_order_of_the_lists_does_not_depend_on_the_order_of_effects() -> None:
    packed = commands(
        DeleteBody("old"),
        ClearBodyExpiry("kept"),
        RunCommand(1, (b"INCR", b"x")),
        ClearRetained(1, "t"),
        Unindex(1, "t", ("a", "b")),
        SetRules("rules"),
        Retain(2, "t", "m", 7),
        KeepReceipt(2, "m", "acked", "sub", 4, 99),
    )
    assert packed == [
        ("HSET", "mqtt:receipt:m", "acked:sub", 4),
        ("PEXPIREAT", "mqtt:receipt:m", 99),
        ("ZREMRANGEBYRANK", "mqtt:retain:t", 0, -1),
        ("ZADD", "mqtt:retain:t", 7, "m"),
        ("SET", f"{PRIVATE}rules", "rules"),
        ("ZADD", f"{PRIVATE}retained", 0, "t"),
        ("HDEL", "mqtt:msg:old", *BODY_FIELDS),
        ("PERSIST", "mqtt:msg:kept"),
        (b"INCR", b"x"),
        ("ZREMRANGEBYRANK", "mqtt:retain:t", 0, -1),
        ("ZREM", "mqtt:msg:t", "a", "b"),
    ]


def test_removing_nothing_from_an_index_needs_no_command() -> None:
    assert commands(Unindex(1, "t", ())) == []


def test_a_batch_writes_each_state_once_and_the_last_one_counts() -> None:
    assert commands(
        SetState("a", b"1"), SetState("b", None), SetState("a", None),
        SetState("b", b"2"), SetState("c", b"3"), SetState("d", None),
    ) == [
        ("HSET", f"{PRIVATE}states", "b", b"2", "c", b"3"),
        ("HDEL", f"{PRIVATE}states", "a", "d"),
    ]  # fmt: skip


def test_seen_ids_are_json_lines_so_that_an_id_may_contain_a_line_break() -> None:
    ids = ("a", "b\nc", '"')
    (append, fresh) = commands(WriteSeen(3, False, ids), WriteSeen(4, True, ()))
    assert append[:2] == ("APPEND", f"{PRIVATE}seen:1")
    assert isinstance(append[2], bytes)
    assert decode_seen(append[2]) == ids and decode_seen(None) == ()
    assert fresh == ("SET", f"{PRIVATE}seen:0", b"")


def test_outputs_are_journaled_under_their_sequence_and_produced_entries_are_deleted() -> None:
    assert commands(outputs=[DeadLetter(3, "why")], produced=[1, 2]) == [
        ("HSET", f"{PRIVATE}journal", 5, b'[{"type":"dead_letter","offset":3,"reason":"why"}]'),
        ("HDEL", f"{PRIVATE}journal", 1, 2),
    ]


@pytest.mark.parametrize(
    ("times", "removed", "exact", "earliest"),
    [
        ([5], [], {}, {"m": 5}),
        ([5, 4, 6], [], {}, {"m": 4}),
        ([None], ["m"], {}, {}),
        ([5, None], ["m"], {}, {}),
        ([None, 5], [], {"m": 5}, {}),
        ([3, None, 7, 5, 9], [], {"m": 5}, {}),
        ([None, 5, None], ["m"], {}, {}),
    ],
)
def test_due_times_of_a_batch_are_combined_in_order(
    times: list[int | None], removed: list[str], exact: dict[str, int], earliest: dict[str, int]
) -> None:
    due = DueCommands()
    for at in times:
        due.fold("m", at)
    assert (list(due.removed), due.exact, due.earliest) == (removed, exact, earliest)


def test_due_times_of_a_batch_need_at_most_three_commands() -> None:
    effects = [SetDue("removed", None), SetDue("new", None), SetDue("new", 9), SetDue("early", 4)]
    assert commands(*effects, SetDue("b", 5)) == [
        ("ZREM", f"{PRIVATE}due", "removed"),
        ("ZADD", f"{PRIVATE}due", 9, "new"),
        ("ZADD", f"{PRIVATE}due", "LT", 4, "early", 5, "b"),
    ]


def test_an_error_reply_refuses_the_part_of_its_command_once() -> None:
    body, other = stored(1, "a", expires_at=5), stored(2, "b")
    asked = CommandList()
    for source in (
        body, body, (body, other), Retain(3, "t", "a", 1), Retain(3, "t", "a", 1),
        KeepReceipt(4, "a", "acked", "s", 1, 2), RunCommand(5, (b"X",)),
        Unindex(6, "t", ("a",)), DeleteBody("a"),
    ):  # fmt: skip
        asked.add(source, "X")
    error = ReplyError("WRONGTYPE no")
    expected: list[tuple[int, RefusedPart]] = [
        (1, "body"), (1, "index"), (2, "index"), (3, "retained"), (4, "receipt"),
        (5, "command"), (6, "removal"), (NO_SOURCE, "removal"),
    ]  # fmt: skip
    refused = refusals(asked.sources, [error] * len(asked.sources))
    assert refused == [Refusal(offset, part, "WRONGTYPE no") for offset, part in expected]
    assert refusals(asked.sources, [1] * len(asked.sources)) == []


def test_a_command_list_can_be_packed_split_and_reduced() -> None:
    asked = CommandList()
    asked.add(DeleteBody("a"), "DEL", "é")
    asked.add(None, "SET", "b", 1)
    assert asked.packed() == (
        b"*2\r\n$3\r\nDEL\r\n$2\r\n\xc3\xa9\r\n*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$1\r\n1\r\n"
    )
    others, those = asked.split(DeleteBody)
    assert (others.commands, those.commands) == ([("SET", "b", 1)], [("DEL", "é")])
    assert asked.without([0]).sources == [None]
