"""The contract of every store: content, refusals, reads, journal, user commands."""

from __future__ import annotations

import pytest

from millpond.agents.effects import (
    NO_SOURCE,
    ClearBodyExpiry,
    ClearRetained,
    DeadLetter,
    DeleteBody,
    ForgetPresence,
    KeepReceipt,
    Retain,
    RunCommand,
    SetDue,
    SetIndex,
    SetPresence,
    SetRules,
    SetState,
    Unindex,
    WriteSeen,
)
from millpond.agents.ports import LoadedState
from millpond.agents.reads import (
    ReadAllStates,
    ReadBelow,
    ReadBody,
    ReadDue,
    ReadEntry,
    ReadIndex,
    ReadNames,
    ReadRetained,
    ReadStates,
    ReadSubscriptions,
    WrongType,
)
from millpond.pipeline.stores.memory.server import StoredValue
from millpond.pipeline.stores.redis.packing import BODY_GRACE_MS
from millpond.schemas import keys
from tests.contracts.store_worlds import (
    FAR_MS,
    PARTITION,
    World,
    applied,
    commit,
    kept,
    transaction,
)


async def test_an_empty_partition_has_no_state(world: World) -> None:
    store = world.store()
    assert await store.load() == LoadedState(None, {}, None, ((), ()))
    assert await store.read([ReadDue(5), ReadIndex("t", 5), ReadStates(("t",))]) == [
        [], [], {"t": None},
    ]  # fmt: skip
    await store.close()


async def test_a_message_is_stored_as_a_hash_and_an_index_entry_in_log_order(world: World) -> None:
    store = world.store()
    await store.load()
    messages = [
        kept(offset, f"m{9 - offset}", "queue/a", payload=f"p{offset}") for offset in range(3)
    ]
    assert await commit(store, transaction(1, *messages)) == []
    dump = world.dump()
    assert dump[keys.message_index("queue/a")] == StoredValue(
        [("m9", 1_000_000), ("m8", 1_000_001), ("m7", 1_000_002)], None
    )
    assert dump[keys.message_body("m9")] == StoredValue(
        {
            "id": b"m9", "from": b"pub", "qos": b"1", "topic": b"queue/a", "payload": b"p0",
            "ts": b"1", "retain": b"false",
        },
        None,
    )  # fmt: skip
    assert await store.read([ReadIndex("queue/a", 2)]) == [[("m9", 1_000_000), ("m8", 1_000_001)]]
    await store.close()


async def test_a_body_expires_a_grace_period_after_its_message(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, kept(0, "m1", "t", expires_at=FAR_MS)))
    assert world.dump()[keys.message_body("m1")].expires_at == FAR_MS + BODY_GRACE_MS
    assert world.dump()[keys.message_index("t")].expires_at is None
    await store.close()


async def test_an_index_entry_keeps_its_first_score(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, kept(0, "m1", "t")))
    await commit(store, transaction(2, kept(5, "m1", "t")))
    assert await store.read([ReadIndex("t", 9)]) == [[("m1", 1_000_000)]]
    await store.close()


@pytest.mark.parametrize(
    ("foreign", "part"),
    [
        (keys.message_body("bad"), "body"),
        (keys.message_index("bad/topic"), "index"),
        (keys.retained("bad/topic"), "retained"),
        (keys.receipt("bad"), "receipt"),
        ("bad-counter", "command"),
        (keys.message_index("bad/removal"), "removal"),
    ],
)
async def test_a_foreign_key_in_the_way_refuses_one_part_and_the_rest_is_stored(
    world: World, foreign: str, part: str
) -> None:
    world.put(foreign, b"foreign")
    store = world.store()
    await store.load()
    refused = await commit(
        store,
        transaction(
            1,
            kept(10, "good", "good/topic"),
            kept(11, "bad", "other/topic"),
            kept(12, "other", "bad/topic"),
            Retain(13, "bad/topic", "other", 7),
            Retain(14, "good/topic", "good", 8),
            KeepReceipt(15, "bad", "acked", "sub", 5, FAR_MS),
            KeepReceipt(16, "good", "acked", "sub", 5, FAR_MS),
            SetState("good/topic", b"state"),
            Unindex(17, "bad/removal", ("m",)),
            RunCommand(18, (b"HSET", b"bad-counter", b"f", b"1")),
            RunCommand(19, (b"HSET", b"good-counter", b"f", b"1")),
        ),
    )
    offset = {"body": 11, "index": 12, "retained": 13, "receipt": 15, "command": 18, "removal": 17}
    assert [(each.offset, each.part) for each in refused] == [(offset[part], part)]
    assert refused[0].reason.startswith("WRONGTYPE")
    dump = world.dump()
    assert dump.pop(foreign).value == b"foreign"
    assert {
        "good-counter", keys.applied(PARTITION), keys.message_body("good"), keys.receipt("good"),
        keys.message_index("good/topic"), keys.retained("good/topic"), keys.table(PARTITION, "states"),
    } <= dump.keys()  # fmt: skip
    await store.close()


async def test_every_message_of_a_refused_index_is_refused(world: World) -> None:
    world.put(keys.message_index("t"), b"foreign")
    store = world.store()
    await store.load()
    refused = await commit(store, transaction(1, kept(1, "a", "t"), kept(2, "b", "t")))
    assert [(each.offset, each.part) for each in refused] == [(1, "index"), (2, "index")]
    await store.close()


async def test_a_topic_shaped_like_a_message_id_refuses_the_index_and_keeps_the_body(
    world: World,
) -> None:
    store = world.store()
    await store.load()
    refused = await commit(store, transaction(1, kept(1, "m1", "m2"), kept(2, "m2", "t")))
    assert [(each.offset, each.part) for each in refused] == [(1, "index")]
    assert await commit(store, transaction(2, DeleteBody("m1"))) == []
    assert await store.read([ReadIndex("m2", 5), ReadIndex("t", 5)]) == [[], [("m2", 1_000_002)]]
    await store.close()


async def test_deleting_a_body_leaves_an_index_of_that_name(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", "m2")))
    refused = await commit(store, transaction(2, DeleteBody("m2")))
    assert [(each.offset, each.part) for each in refused] == [(NO_SOURCE, "removal")]
    assert await store.read([ReadIndex("m2", 5)]) == [[("m1", 1_000_001)]]
    await store.close()


async def test_a_foreign_key_gets_no_lifetime_after_the_cleaning(world: World) -> None:
    world.put(keys.message_body("m1"), b"foreign")
    store = world.store()
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", "t", expires_at=FAR_MS)))
    await commit(store, transaction(2, Unindex(NO_SOURCE, "t", ("m1",)), ClearBodyExpiry("m1")))
    assert world.dump()[keys.message_body("m1")] == StoredValue(b"foreign", None)
    assert keys.message_index("t") not in world.dump()
    await store.close()


async def test_removals_leave_no_empty_key(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(
        store,
        transaction(
            1, kept(1, "m1", "t"), Retain(1, "t", "m1", 1), SetState("t", b"s"), SetDue("d", 5)
        ),
    )
    removals = (Unindex(2, "t", ("m1",)), ClearRetained(2, "t"), DeleteBody("m1"))
    assert (
        await commit(store, transaction(2, *removals, SetState("t", None), SetDue("d", None))) == []
    )
    assert list(world.dump()) == [keys.applied(PARTITION)]
    await store.close()


async def test_a_topic_retains_the_newest_message_only(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, Retain(1, "t", "m1", 9)))
    await commit(store, transaction(2, Retain(2, "t", "m2", 5)))
    assert world.dump()[keys.retained("t")].value == [("m2", 5)]
    await store.close()


async def test_states_and_rules_are_replaced_and_read_back(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(
        store,
        transaction(
            1, SetRules("old"), SetState("a", b"1"), SetState("b", b"\xff\x00"),
        ),
    )  # fmt: skip
    await commit(
        store,
        transaction(
            2, SetRules("new"), SetState("a", None), SetState("c", None),
            SetState("c", b"3"),
        ),
    )  # fmt: skip
    assert await store.read([ReadStates(("c", "a", "b")), ReadStates(())]) == [
        {"c": b"3", "a": None, "b": b"\xff\x00"}, {},
    ]  # fmt: skip
    assert (await store.load()).rules == "new"
    await store.close()


async def test_the_earliest_due_time_counts_until_the_member_is_removed(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(
        store,
        transaction(1, *(SetDue(member, 50) for member in ("b", "a", "earlier", "later", "gone"))),
    )
    await commit(
        store,
        transaction(
            2,
            SetDue("earlier", 60), SetDue("earlier", 40), SetDue("later", None), SetDue("later", 90),
            SetDue("later", 95), SetDue("gone", 10), SetDue("gone", None), SetDue("new", 70),
        ),
    )  # fmt: skip
    everything = [("earlier", 40), ("a", 50), ("b", 50), ("new", 70), ("later", 90)]
    assert await store.read([ReadDue(9), ReadDue(2)]) == [everything, everything[:2]]
    await store.close()


async def test_seen_ids_of_any_text_are_stored_by_generation(world: World) -> None:
    odd = ("a b", "line\nbreak", 'quo"te', "\0", "é\u2028😀", "\\n")
    store = world.store()
    await store.load()
    await commit(store, transaction(1, WriteSeen(0, False, odd), WriteSeen(1, True, ("x",))))
    await commit(store, transaction(2, WriteSeen(0, False, ("more",))))
    assert (await store.load()).seen == ((*odd, "more"), ("x",))
    await commit(store, transaction(3, WriteSeen(2, True, ()), WriteSeen(3, False, ("y",))))
    assert (await store.load()).seen == ((), ("x", "y"))
    await store.close()


async def test_a_journal_entry_stays_until_it_is_produced(world: World) -> None:
    outputs = [DeadLetter(3, "not JSON"), DeadLetter(4, "é\n")]
    store = world.store()
    await store.load()
    await commit(store, transaction(1, outputs=outputs[:1]))
    await commit(store, transaction(2, outputs=outputs))
    await store.close()
    successor = world.store()
    stored = await successor.load()
    assert stored.applied == applied(2)
    assert {sequence: list(each) for sequence, each in stored.journal.items()} == {
        1: outputs[:1], 2: outputs,
    }  # fmt: skip
    await commit(successor, transaction(3, produced=[1]))
    assert list((await successor.load()).journal) == [2]
    await commit(successor, transaction(4, produced=[2]))
    assert (await successor.load()).journal == {}
    await successor.close()


async def test_a_user_command_runs_once_and_its_error_is_returned(world: World) -> None:
    store = world.store()
    await store.load()
    commands = [
        RunCommand(1, (b"INCR", b"seen:m1")),
        RunCommand(2, (b"SET", b"text", b"\xff\x00 spaces")),
        RunCommand(3, (b"INCR", b"text")),
        RunCommand(4, (b"NOSUCHCOMMAND", b"key")),
        RunCommand(5, (b"INCR", b"seen:m1")),
    ]
    refused = await commit(store, transaction(1, kept(6, "m1", "t"), *commands))
    assert [(each.offset, each.part) for each in refused] == [(3, "command"), (4, "command")]
    assert "integer" in refused[0].reason and "NOSUCHCOMMAND" in refused[1].reason
    assert world.dump()["seen:m1"].value == b"2"
    assert (await store.load()).applied == applied(1)
    assert world.dump()["seen:m1"].value == b"2"
    await store.close()


@pytest.mark.parametrize("topic", ["a b", "a:b:c", "😀/é", "{a}b", "$share", "line\nbreak", '"'])
async def test_any_text_can_be_a_topic_and_an_id(world: World, topic: str) -> None:
    store = world.store()
    await store.load()
    message_id = f"id of {topic}"
    effects = (
        kept(1, message_id, topic, client_id=topic),
        Retain(1, topic, message_id, 1),
        KeepReceipt(1, message_id, "delivered", topic, 3, FAR_MS),
        SetState(topic, b"s"),
        SetDue(f"index\0{topic}", 5),
    )
    assert await commit(store, transaction(1, *effects)) == []
    assert await store.read([ReadIndex(topic, 1), ReadDue(1), ReadStates((topic,))]) == [
        [(message_id, 1_000_001)], [(f"index\0{topic}", 5)], {topic: b"s"},
    ]  # fmt: skip
    assert world.dump()[keys.receipt(message_id)].value == {f"delivered:{topic}": b"3"}
    await store.close()


@pytest.mark.parametrize(
    ("payload", "encoding", "raw"),
    [
        ("", "utf-8", b""),
        ("é😀\r\n", "utf-8", "é😀\r\n".encode()),
        ("/wAKDQ==", "base64", b"\xff\x00\n\r"),
        ("x" * (1 << 20), "utf-8", b"x" * (1 << 20)),
    ],
    ids=["empty", "text", "bytes", "1 MiB"],
)
async def test_a_payload_is_stored_byte_by_byte(
    world: World, payload: str, encoding: str, raw: bytes
) -> None:
    store = world.store()
    await store.load()
    message = kept(1, "m1", "t", payload=payload, payload_encoding=encoding)
    await commit(store, transaction(1, message))
    body = world.dump()[keys.message_body("m1")].value
    assert isinstance(body, dict) and body["payload"] == raw
    await store.close()


async def test_no_reads_have_no_answers(world: World) -> None:
    store = world.store()
    await store.load()
    assert await store.read([]) == []
    await store.close()


async def test_all_states_are_read_page_by_page(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, *(SetState(f"c{at}", b"%d" % at) for at in range(2_000))))
    found: dict[str, bytes] = {}
    cursor = -1
    while cursor:
        ((cursor, some),) = await store.read([ReadAllStates(max(cursor, 0))])
        found |= some
    assert found == {f"c{at}": b"%d" % at for at in range(2_000)}
    await store.close()


async def test_a_private_index_is_read_below_a_score(world: World) -> None:
    store = world.store()
    await store.load()
    placed = [SetIndex("seen:n@1", f"c{at}", at) for at in (3, 1, 2, 9)]
    await commit(store, transaction(1, *placed, SetIndex("other", "c1", 1)))
    await commit(
        store, transaction(2, SetIndex("seen:n@1", "c2", 8), SetIndex("other", "c1", None))
    )
    assert await store.read(
        [ReadBelow("seen:n@1", 9, 5), ReadBelow("seen:n@1", 9, 1), ReadBelow("other", 9, 5)]
    ) == [[("c1", 1), ("c3", 3), ("c2", 8)], [("c1", 1)], []]
    await store.close()


async def test_presence_is_a_hash_of_the_client_and_a_field_of_its_node(world: World) -> None:
    store = world.store()
    await store.load()
    await commit(store, transaction(1, SetPresence(0, "c", True, 5_900, None, None, "n1")))
    assert world.dump()[keys.presence("c")].value == {
        "state": b"1", "online_at": b"5", "offline_at": b"undefined",
    }  # fmt: skip
    assert world.dump()[keys.node("n1")].value == {"c": b"5"}
    await commit(store, transaction(2, SetPresence(1, "c", False, 5_900, 7_000, "n1", None)))
    assert world.dump()[keys.presence("c")].value == {
        "state": b"0", "online_at": b"5", "offline_at": b"7",
    }  # fmt: skip
    assert keys.node("n1") not in world.dump()
    await commit(store, transaction(3, RunCommand(2, (b"HSET", b"mqtt:client:c", b"own", b"x"))))
    await commit(store, transaction(4, ForgetPresence(3, "c"), ForgetPresence(3, "unknown")))
    assert world.dump()[keys.presence("c")].value == {"own": b"x"}
    await store.close()


async def test_retained_topics_are_found_by_prefix_and_bodies_by_id(
    world: World,
) -> None:
    store = world.store()
    await store.load()
    topics = ("a", "a/b", "a/é", "ab", "b")
    for sequence, topic in enumerate(topics, start=1):
        message = kept(sequence, f"id {topic}", topic, retain=True)
        await commit(store, transaction(sequence, message, Retain(0, topic, f"id {topic}", 1)))
    await commit(store, transaction(6, ClearRetained(0, "ab")))
    other = world.store(PARTITION._replace(agent="sessions"))
    await other.load()
    every, some, first, none = await other.read(
        [
            ReadNames(PARTITION, keys.RETAINED_INDEX, "", "", 9),
            ReadNames(PARTITION, keys.RETAINED_INDEX, "a/", "", 9),
            ReadNames(PARTITION, keys.RETAINED_INDEX, "", "", 1),
            ReadNames(PARTITION._replace(number=8), keys.RETAINED_INDEX, "", "", 9),
        ]
    )
    assert (every, some, first, none) == (["a", "a/b", "a/é", "b"], ["a/b", "a/é"], ["a"], [])
    assert await other.read(
        [
            ReadNames(PARTITION, keys.RETAINED_INDEX, "a/", "a/b", 9),
            ReadNames(PARTITION, keys.RETAINED_INDEX, "", "a", 2),
        ]
    ) == [["a/é"], ["a/b", "a/é"]]
    found, cleared, body, missing = await other.read(
        [ReadRetained("a/b"), ReadRetained("ab"), ReadBody("id a/b"), ReadBody("id x")]
    )
    assert (found, cleared, missing) == ("id a/b", None, {})
    assert (body["topic"], body["payload"]) == (b"a/b", b"hello")
    for each in (store, other):
        await each.close()


async def test_a_public_key_of_another_type_is_named_to_outputs_and_else_counts_as_empty(
    world: World,
) -> None:
    store = world.store()
    await store.load()
    for key in (
        keys.subscriptions("c"), keys.retained("t"), keys.message_body("m"), keys.message_index("t"),
    ):  # fmt: skip
        world.put(key, b"a string")
    subscriptions, retained = await store.read([ReadSubscriptions("c"), ReadRetained("t")])
    for answer, key in ((subscriptions, "mqtt:sub:c"), (retained, "mqtt:retain:t")):
        assert isinstance(answer, WrongType)
        assert (answer.key, answer.reason[:9]) == (key, "WRONGTYPE")
    assert await store.read([ReadBody("m"), ReadIndex("t", 9), ReadEntry("t", "m")]) == [
        {}, [], None,
    ]  # fmt: skip
    assert await store.read([ReadSubscriptions("unknown")]) == [{}]
    await store.close()
