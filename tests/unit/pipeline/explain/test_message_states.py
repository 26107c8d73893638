"""What a message is, worked out of states that the machines themselves have made, and said in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from msgspec import structs

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.agents.delivery.dead_messages import unpack as unpack_dead
from millpond.agents.pubsub.state import (
    reader_key,
    subscriber_named,
    unpack_log,
    unpack_reader,
    unpack_subscriber,
)
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.topics.plans import make_plan
from millpond.pipeline.explain import message_states, sentences
from millpond.pipeline.explain.log_search import WantedMessage
from millpond.pipeline.explain.message_states import Known, Reading
from millpond.pipeline.explain.results import LogEvent, MessageState, Searched
from millpond.pipeline.explain.topics import Top, TopicRow
from millpond.pipeline.stores.memory.server import Zset
from millpond.schemas import keys
from tests.support import given
from tests.support.delivery import Delivering

START_MS = 10_000  # of the log of `Delivering`
QUEUE = (
    given.queue("queue/#", ack_timeout_s=30, max_deliveries=2, max_inflight=1),
    given.queue("short/#", expired_time=60),
    given.queue("latest/#", max_length=1),
    given.retain(),
)
PUBSUB = (
    given.pubsub("pubsub/#", ack_timeout_s=30, max_deliveries=1),
    given.pubsub("short/#", expired_time=60),
    given.pubsub("late/#", start="latest"),
    given.pubsub("few/#", max_length=1),
)


def known(world: Delivering, message_id: str, topic: str, **fields: Any) -> Known:
    """What the world's log and store say of a message."""
    wanted, events = WantedMessage(message_id, topic), []
    for (kafka_topic, partition), records in world.log.records.items():
        for record in records:
            whole = SimpleNamespace(
                topic=kafka_topic, partition=partition, headers=(), **record._asdict()
            )
            events += wanted.events(whole)
    index = world.server.of(keys.message_index(topic), Zset)
    retained = world.server.of(keys.retained(topic), Zset)
    applied = world.applied
    assert applied is not None
    values: dict[str, Any] = {
        "plan": make_plan(world.rules, topic),
        "score": int(index[message_id]) if message_id in index else None,
        "applied": applied.offset,
        "now_ms": world.now_ms,
        "events": events,
        "dead": unpack_dead(world.table("dead").get(message_id)),
        "retained": message_id in retained,
        **fields,
    }
    return Known(message_id=message_id, **values)


def of_queue(
    world: Delivering, message_id: str = "m1", topic: str = "queue/a", *, online: int = 0, **fields: Any
) -> str:  # fmt: skip
    window = unpack_queue(world.table("windows").get(topic))
    state = message_states.of_queue(known(world, message_id, topic, **fields), window, online)
    return said(state, world.now_ms)


def reading(world: Delivering, client: str, topic: str) -> Reading:
    subscriber = subscriber_named(client)
    return Reading(
        subscriber=subscriber,
        known=unpack_subscriber(world.table("subscribers").get(subscriber)),
        reader=unpack_reader(world.table("windows").get(reader_key(subscriber, topic))),
    )


def of_pubsub(
    world: Delivering, client: str, message_id: str = "m1", topic: str = "pubsub/a", **fields: Any
) -> str | None:
    log = unpack_log(world.table("logs").get(topic))
    about = known(world, message_id, topic, **fields)
    state = message_states.of_pubsub(about, topic, log, reading(world, client, topic))
    if state is None:
        return None
    assert state.subscriber == client
    return said(state, world.now_ms)


def said(state: MessageState, now_ms: int) -> str:
    """In words, with times as seconds since the start."""
    text = sentences.in_words(state, now_ms)
    return re.sub(r"1970-01-01 (\d\d):(\d\d):(\d\d)\.\d{3}Z", _since_start, text)


def _since_start(match: re.Match[str]) -> str:
    hours, minutes, seconds = map(int, match.groups())
    return f"{hours * 3600 + minutes * 60 + seconds - START_MS // 1000}s"


# -- queues ------------------------------------------------------------------------------------------------------------


def nothing(world: Delivering) -> None:
    """As it was published."""


def leased(world: Delivering) -> None:
    world.join("anna")


def grouped(world: Delivering) -> None:
    world.join("anna", "$share/g/queue/a")


def sent(world: Delivering) -> None:
    leased(world)
    world.hand_over()


def overdue(world: Delivering) -> None:
    sent(world)
    world.now_ms += 40_000


def silent(world: Delivering) -> None:
    sent(world)
    world.at(START_MS + 30_000)


def returned(world: Delivering) -> None:
    sent(world)
    world.leave("anna")


def again(world: Delivering) -> None:
    returned(world)
    world.join("ben", session=2)


def acked(world: Delivering) -> None:
    sent(world)
    world.ack("anna", "m1")


def acked_at_qos_0(world: Delivering) -> None:
    world.join("anna", qos=0)
    world.hand_over()


def dead(world: Delivering) -> None:
    again(world)
    world.hand_over()
    world.leave("ben", session=2)


def taken_back(world: Delivering) -> None:
    dead(world)
    world.ack("anna", "m1")


def dropped(world: Delivering) -> None:
    dead(world)
    world.drop("m1")


def requeued(world: Delivering) -> None:
    dead(world)
    world.requeue("m1")


@pytest.mark.parametrize(
    ("happens", "expected"),
    [
        (nothing, "ready: nobody is online to take it"),
        (
            leased,
            "leased by 'anna' since 0s (0.0 s ago), delivery 1, not confirmed by the bridge, returns at 3600s",
        ),
        (
            grouped,
            "leased by 'anna' of $share/g since 0s (0.0 s ago), delivery 1, not confirmed by the bridge, returns at 3600s",
        ),
        (sent, "leased by 'anna' since 0s (0.0 s ago), delivery 1, sent, its ack is due by 30s"),
        (overdue, "leased by 'anna' since 0s (40 s ago), delivery 1, sent, its ack is overdue since 30s"),
        (
            silent,
            "leased by 'anna' since 0s (30 s ago), delivery 1, sent; overdue: it stays with its client unless another one takes it over",
        ),
        (
            returned,
            "ready: delivered 1 time without an acknowledgement, nobody is online to take it",
        ),
        (
            again,
            "leased by 'ben' since 0s (0.0 s ago), delivery 2, not confirmed by the bridge, returns at 3600s",
        ),
        (acked, "acked by 'anna' at 0s"),
        (
            acked_at_qos_0,
            "acked by 'anna' at 0s (a copy of QoS 0: that it was sent is its ack)",
        ),
        (
            dead,
            "dead since 0s: delivered 2 times without an acknowledgement (an ack by 'anna', 'ben' takes it back)",
        ),
        (taken_back, "acked by 'anna' at 0s"),
        (dropped, "dropped by an operator at 0s"),
        (requeued, "ready: nobody is online to take it"),
    ],
)  # fmt: skip
def test_a_queued_message_is_told_as_it_is(
    happens: Callable[[Delivering], None], expected: str
) -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1")
    happens(world)
    assert of_queue(world) == expected


def test_what_is_before_a_ready_message_and_who_could_take_it_is_told() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", "m2")
    assert of_queue(world, "m2", before=1, online=2) == (
        "ready: 1 stored message before it, 2 clients online"
    )
    assert of_queue(world, "m2", before=0, online=1) == (
        "ready: no stored messages before it, 1 client online"
    )


def test_a_queued_message_expires_before_a_tick_has_taken_it_away_and_after() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", topic="short/a")
    world.now_ms += 60_000
    assert of_queue(world, topic="short/a") == "expired at 60s: the next tick takes it away"
    world.at(world.now_ms)
    assert of_queue(world, topic="short/a") == "expired at 60s"


def test_one_that_expires_in_somebodys_hands_is_the_holders_alone() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", topic="short/a")
    world.join("anna", "short/a")
    world.at(START_MS + 60_000)
    assert of_queue(world, topic="short/a").endswith(
        "; it has expired or was superseded, and is the holder's alone"
    )


def test_a_superseded_message_is_gone_and_one_of_qos_0_is_passed_on() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", "m2", topic="latest/a")
    world.publish("zero", topic="queue/a", qos=0)
    assert of_queue(world, topic="latest/a") == (
        "gone without an acknowledgement: the topic was longer than max_length, or its rules changed"
    )
    assert of_queue(world, "m2", "latest/a").startswith("ready")
    assert of_queue(world, "zero").startswith("passed on: ")


def test_what_the_agent_has_not_come_to_waits_in_kafka() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    world.append(given.published("m1", "queue/a"))
    assert of_queue(world) == "in Kafka, published at 0s: the agent has not come to it yet"


def test_what_the_agent_has_not_come_to_changes_nothing_yet() -> None:
    world = Delivering("queue", *QUEUE)
    world.join("anna", "latest/a")
    world.publish("m1", topic="latest/a")
    world.hand_over()
    world.publish("m2", topic="latest/a")
    world.leave("anna", "latest/a")
    world.append(given.acked("m1", "latest/a", client_id="anna"))
    assert of_queue(world, topic="latest/a").startswith("gone without an acknowledgement")


def test_what_is_stored_ahead_of_its_fence_waits() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    assert of_queue(world, score=99_000_000) == (
        "in Kafka, published at 89s: the agent has not come to it yet"
    )


def test_a_late_acknowledgement_of_a_dead_letter_is_told_as_that() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1")
    dead(world)
    letter = LogEvent(
        kind="dead_letter", kafka_topic="mqtt.dead-letters", partition=0, offset=0, at=world.now_ms,
        message_id="m1",
    )  # fmt: skip
    world.ack("anna", "m1")
    events = [*known(world, "m1", "queue/a").events, letter]
    late = "late: it was a dead letter, which the acknowledgement took back"
    assert of_queue(world, events=events) == f"acked by 'anna' at 0s ({late})"
    requeued_since = structs.replace(letter, kind="requeue", at=world.now_ms + 1, offset=1)
    assert of_queue(world, events=[*events, requeued_since]) == "acked by 'anna' at 0s"


def test_a_dead_letter_that_was_requeued_is_dead_no_more() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    letter = DeadMessage(topic="queue/a", message_id="m1", reason="r", deliveries=1, at=0)
    assert of_queue(world, dead=letter).startswith("dead")
    requeued_since = structs.replace(letter, requeued=True)
    assert of_queue(world, dead=requeued_since).startswith("gone")


def test_what_was_stored_before_its_topic_was_a_queue_is_told_as_that() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    assert of_queue(world, score=1_000) == (
        "stored since -10s: it was stored before its topic was a queue"
    )


# -- pubsub ------------------------------------------------------------------------------------------------------------


def test_each_subscriber_of_a_pubsub_message_is_told_of_by_itself() -> None:
    world = Delivering("pubsub", *PUBSUB)
    for name in ("done", "ahead", "slow", "away"):
        world.join(name, "pubsub/a")
    world.publish("m1", "m2", topic="pubsub/a")
    commands = world.take()
    world.sent(command for command in commands if command.client_id != "away")
    world.ack("done", "m1", "m2", topic="pubsub/a")
    world.ack("ahead", "m2", topic="pubsub/a")
    world.leave("away", "pubsub/a")
    world.ack("slow", "m2", topic="pubsub/a")
    assert of_pubsub(world, "done") == "acked by 'done' at 0s"
    assert of_pubsub(world, "ahead", "m2") == (
        "acked by 'ahead' at 0s (ahead of the read offset: something before it is not done with)"
    )
    assert of_pubsub(world, "away") == "ready: nobody is online to take it"
    assert of_pubsub(world, "nobody") is None
    world.at(START_MS + 30_000)
    world.join("slow", "pubsub/a", session=2)
    reason = "slow: delivered 1 times without an acknowledgement (an ack by 'slow' takes it back)"
    assert of_pubsub(world, "slow") == f"dead since 30s: {reason}"
    log = unpack_log(world.table("logs").get("pubsub/a"))
    assert said(message_states.of_log(known(world, "m1", "pubsub/a"), log), 0) == "stored since 0s"
    world.requeue("m1", topic="pubsub/a")
    again = of_pubsub(world, "slow")
    assert again is not None
    assert again.startswith("leased by 'slow' since 30s")


def test_a_subscriber_that_began_later_is_told_that_it_is_past_a_message() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.publish("m1", topic="late/a")
    world.now_ms += 1_000
    world.join("new", "late/a")
    assert of_pubsub(world, "new", topic="late/a") == (
        "behind its read offset: done with, or from before it began to read"
    )


def test_one_that_has_never_read_a_topic_is_told_what_it_would_get() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("new", "pubsub/#")
    world.leave("new", "pubsub/#", "disconnected")
    world.publish("m1", topic="pubsub/a")
    assert reading(world, "new", "pubsub/a").reader.made_at is None
    assert of_pubsub(world, "new") == "ready: nobody is online to take it"


def test_what_is_trimmed_is_expired_for_who_has_not_read_it_and_acked_by_who_has() -> None:
    world = Delivering("pubsub", *PUBSUB)
    for name in ("quick", "away"):
        world.join(name, "short/a")
    world.publish("m1", topic="short/a")
    world.hand_over()
    world.ack("quick", "m1", topic="short/a")
    world.leave("away", "short/a")
    world.at(START_MS + 60_000)
    assert of_pubsub(world, "quick", topic="short/a") == "acked by 'quick' at 0s"
    assert of_pubsub(world, "away", topic="short/a") == "expired at 60s"
    log = unpack_log(world.table("logs").get("short/a"))
    whole = message_states.of_log(known(world, "m1", "short/a"), log)
    assert said(whole, world.now_ms) == "expired at 60s"


def test_a_group_is_told_of_as_one() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("one", "$share/g/pubsub/a")
    world.publish("m1", topic="pubsub/a")
    told = of_pubsub(world, "$share/g/pubsub/a")
    assert told is not None
    assert told.startswith("leased by 'one' of $share/g since 0s")


def test_one_that_is_trimmed_in_somebodys_hands_is_the_holders_alone() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("slow", "short/a")
    world.publish("m1", topic="short/a")
    world.at(START_MS + 60_000)
    told = of_pubsub(world, "slow", topic="short/a")
    assert told is not None
    assert told.startswith("leased by 'slow'")
    assert told.endswith("; it has expired or was superseded, and is the holder's alone")


def test_what_a_reader_has_yet_to_move_past_is_told_as_if_it_had() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("away", "few/a")
    world.publish("m1", topic="few/a")
    world.leave("away", "few/a", "disconnected")
    world.publish("m2", topic="few/a")
    assert reading(world, "away", "few/a").reader.leases["m1"].stored  # it was not looked at since
    told = of_pubsub(world, "away", topic="few/a")
    assert told is not None
    assert told.endswith("; it has expired or was superseded, and is the holder's alone")


def test_a_message_dead_for_one_subscriber_is_not_so_for_another() -> None:
    world = Delivering("pubsub", *PUBSUB)
    for name in ("slow", "quick"):
        world.join(name, "pubsub/a")
    world.publish("m1", topic="pubsub/a")
    world.hand_over()
    world.ack("quick", "m1", topic="pubsub/a")
    world.join("slow", "pubsub/a", session=2)
    assert (of_pubsub(world, "slow") or "").startswith("dead since 0s")
    assert of_pubsub(world, "quick") == "acked by 'quick' at 0s"


def test_one_that_begins_with_the_latest_and_has_read_nothing_is_past_what_was_before() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.publish("m1", topic="late/a")
    world.now_ms += 1_000
    world.tell_unticked(given.joined("new", "late/#"))
    world.tell_unticked(given.left("new", "late/#", reason="disconnected", source_offset=1))
    assert reading(world, "new", "late/a").reader.made_at is None
    assert (of_pubsub(world, "new", topic="late/a") or "").startswith("behind its read offset")


# -- topics that nobody delivers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"score": 20_000_000}, "stored since 10s"),
        ({"score": 20_000_000, "now_ms": 90_000}, "expired at 70s: the next tick takes it away"),
        ({"applied": 0}, "in Kafka, published at 10s: the agent has not come to it yet"),
        ({"retained": True}, "retained by its topic, and not stored otherwise"),
        ({"now_ms": 90_000}, "expired at 70s"),
        ({}, "gone without an acknowledgement: its rules changed, or somebody deleted it"),
        (
            {"events": ()},
            "gone without an acknowledgement: its rules changed, or somebody deleted it",
        ),
    ],
)
def test_a_message_that_nobody_delivers_is_told_as_it_is(
    fields: dict[str, Any], expected: str
) -> None:
    event = LogEvent(
        kind="published", kafka_topic="mqtt.messages", partition=0, offset=5, at=20_000,
        message_id="m1", topic="t", qos=1,
    )  # fmt: skip
    plan = make_plan(given.rules(given.store("t", expired_time=60)), "t")
    values: dict[str, Any] = {
        "plan": plan, "score": None, "applied": 9, "now_ms": 30_000, "events": (event,), **fields,
    }  # fmt: skip
    state = message_states.of_message(Known(message_id="m1", **values))
    assert said(state, values["now_ms"]) == expected


@pytest.mark.parametrize(
    ("qos", "rule", "expected"),
    [
        (0, given.store("t"), "not stored: it is of QoS 0"),
        (1, given.store("u"), "not stored: no rule stores messages of its topic"),
    ],
)
def test_what_the_rules_do_not_store_is_told_with_the_reason(
    qos: int, rule: str, expected: str
) -> None:
    event = LogEvent(
        kind="published", kafka_topic="mqtt.messages", partition=0, offset=5, at=20_000,
        message_id="m1", topic="t", qos=qos,
    )  # fmt: skip
    plan = make_plan(given.rules(rule), "t")
    about = Known(message_id="m1", plan=plan, score=None, applied=9, now_ms=0, events=(event,))
    assert said(message_states.of_message(about), 0) == expected


# -- words, and what is picked out of records --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (-1, "0.0 s"), (1_500, "1.5 s"), (10_000, "10 s"), (119_000, "119 s"), (120_000, "2 min"),
        (7_199_000, "119 min"), (7_200_000, "2 h"), (172_800_000, "2 d"),
    ],
)  # fmt: skip
def test_an_age_has_the_unit_that_tells_enough(ms: int, expected: str) -> None:
    assert sentences.age(ms) == expected


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0, 0, 0, 0), "x[3], which is empty"),
        ((5, 5, 9, 9), "x[3], records 5 to 8"),
        ((0, 5, 9, 9), "x[3], records 5 to 8 of 0 to 8"),
        ((0, 9, 9, 9), "x[3]: nothing of its records 0 to 8"),
    ],
)
def test_what_was_searched_is_said(bounds: tuple[int, int, int, int], expected: str) -> None:
    start, first, stop, end = bounds
    part = Searched(kafka_topic="x", partition=3, start=start, first=first, stop=stop, end=end)
    assert sentences.searched(part) == expected


ODD = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


def a_record(key: bytes, value: bytes | None, **fields: Any) -> Any:
    values = {
        "topic": keys.MESSAGES_TOPIC,
        "partition": 0,
        "offset": 1,
        "timestamp": 2,
        "headers": (),
    }
    return SimpleNamespace(key=key, value=value, **{**values, **fields})


@drawn(ODD, ODD, ODD)
def test_a_message_is_found_by_any_id_and_no_other_is(name: str, other: str, topic: str) -> None:
    record = a_record(*given.key_and_value(given.published(name, topic, payload=other)))
    (found,) = WantedMessage(name, topic).events(record)
    assert (found.kind, found.message_id, found.topic) == ("published", name, topic)
    if name != other:
        assert WantedMessage(other, None).events(record) == []
        assert WantedMessage(name, topic + "x").events(record) == []


def test_an_id_is_found_however_a_bridge_has_escaped_it() -> None:
    key, value = given.key_and_value(given.published("a/é", "t"))
    escaped = value.replace("a/é".encode(), b"a\\/\\u00e9")
    assert escaped != value
    (found,) = WantedMessage("a/é", "t").events(a_record(key, escaped))
    assert found.message_id == "a/é"


@pytest.mark.parametrize("value", [None, b"", b"m1", b'{"type":"tick"}', b'{"message_id":"m1"}'])
def test_what_nobody_can_read_says_nothing(value: bytes | None) -> None:
    assert WantedMessage("m1", None).events(a_record(b"t", value)) == []


def test_a_dead_letter_is_found_by_its_header_or_by_its_bytes() -> None:
    reason = (("reason", b"because"), ("agent", b"queue"))
    named = a_record(
        b"t", b"payload", topic=keys.DEAD_LETTERS_TOPIC, headers=(("message-id", b"m1"), *reason)
    )
    bytes_only = a_record(
        b"t", b'{"message_id":"m1", what', topic=keys.DEAD_LETTERS_TOPIC, headers=reason
    )
    for record in (named, bytes_only):
        (found,) = WantedMessage("m1", "t").events(record)
        assert (found.kind, found.detail) == ("dead_letter", "queue: because")
        assert WantedMessage("m2", "t").events(record) == []
        assert WantedMessage("m1", "u").events(record) == []


# -- the list of topics ------------------------------------------------------------------------------------------------


@drawn(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5))), st.integers(1, 7))
def test_the_deepest_are_the_deepest(depths: list[tuple[int, int]], limit: int) -> None:
    rows = [
        TopicRow(topic=f"{at:03d}", agent="queue", partition=0, messages=messages, dead=letters)
        for at, (messages, letters) in enumerate(depths)
    ]
    top = Top(limit)
    for row in (*rows, *rows):  # a table that changes meanwhile may tell the same twice
        top.add(row)
    expected = sorted(((row.messages, row.dead) for row in rows), reverse=True)[:limit]
    assert [(row.messages, row.dead) for row in top.rows()] == expected
    assert len({row.topic for row in top.rows()}) == len(top.rows())
