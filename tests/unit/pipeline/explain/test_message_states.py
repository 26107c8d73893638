"""The states of messages and their sentences. The agents' own machines make the states that are read."""

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
from millpond.agents.queue.machine import QOS_0_WAIT_MS
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.topics.plans import make_plan
from millpond.pipeline.explain import message_states, sentences
from millpond.pipeline.explain.log_search import WantedMessage
from millpond.pipeline.explain.message_states import Known, SubscriberView
from millpond.pipeline.explain.results import LogEvent, MessageState
from millpond.pipeline.explain.topics import Top, TopicRow
from millpond.pipeline.kafka.log_reader import Searched
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
    """What the world's log and store have about a message."""
    wanted, events = WantedMessage(message_id, topic), []
    for (kafka_topic, partition), records in world.log.records.items():
        for record in records:
            full = SimpleNamespace(partition=partition, headers=(), **record._asdict())
            of_topic = {keys.DEAD_LETTERS_TOPIC: wanted.dead_letters}
            events += of_topic.get(kafka_topic, wanted.events)(full)
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
    return words(state, world.now_ms)


def view(world: Delivering, client: str, topic: str) -> SubscriberView:
    subscriber = subscriber_named(client)
    return SubscriberView(
        subscriber=subscriber,
        known=unpack_subscriber(world.table("subscribers").get(subscriber)),
        reader=unpack_reader(world.table("windows").get(reader_key(subscriber, topic))),
    )


def of_pubsub(
    world: Delivering, client: str, message_id: str = "m1", topic: str = "pubsub/a", **fields: Any
) -> str | None:
    log = unpack_log(world.table("logs").get(topic))
    about = known(world, message_id, topic, **fields)
    state = message_states.of_pubsub(about, topic, log, view(world, client, topic))
    if state is None:
        return None
    assert state.subscriber == client
    return words(state, world.now_ms)


def words(state: MessageState, now_ms: int) -> str:
    """The state as a sentence, with times as seconds since the start."""
    text = sentences.in_words(state, now_ms)
    return re.sub(r"1970-01-01 (\d\d):(\d\d):(\d\d)\.\d{3}Z", _since_start, text)


def _since_start(match: re.Match[str]) -> str:
    hours, minutes, seconds = map(int, match.groups())
    return f"{hours * 3600 + minutes * 60 + seconds - START_MS // 1000}s"


# -- queues ------------------------------------------------------------------------------------------------------------


def nothing(world: Delivering) -> None:
    """The message was only published."""


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
        (nothing, "ready: no clients online"),
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
            "ready: delivered 1 time without an acknowledgement, no clients online",
        ),
        (
            again,
            "leased by 'ben' since 0s (0.0 s ago), delivery 2, not confirmed by the bridge, returns at 3600s",
        ),
        (acked, "acked by 'anna' at 0s"),
        (
            acked_at_qos_0,
            "acked by 'anna' at 0s (a copy of QoS 0 is done when it is sent)",
        ),
        (
            dead,
            "dead since 0s: delivered 2 times without an acknowledgement (an ack by 'anna', 'ben' takes it back)",
        ),
        (taken_back, "acked by 'anna' at 0s"),
        (dropped, "dropped by an operator at 0s"),
        (requeued, "ready: no clients online"),
    ],
)  # fmt: skip
def test_a_queued_message_is_in_the_state_that_events_led_to(
    happens: Callable[[Delivering], None], expected: str
) -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1")
    happens(world)
    assert of_queue(world) == expected


def test_a_ready_message_shows_how_many_are_before_it_and_how_many_clients_are_online() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", "m2")
    assert of_queue(world, "m2", before=1, online=2) == (
        "ready: 1 stored message before it, 2 clients online"
    )
    assert of_queue(world, "m2", before=0, online=1) == (
        "ready: no stored messages before it, 1 client online"
    )


def test_a_queued_message_is_expired_before_and_after_the_tick_that_deletes_it() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", topic="short/a")
    world.now_ms += 60_000
    assert of_queue(world, topic="short/a") == "expired at 60s: the next tick deletes it"
    world.at(world.now_ms)
    assert of_queue(world, topic="short/a") == "expired at 60s"


def test_a_leased_message_that_expires_is_shown_as_no_longer_stored() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", topic="short/a")
    world.join("anna", "short/a")
    world.at(START_MS + 60_000)
    assert of_queue(world, topic="short/a").endswith(
        "; it has expired or was superseded, and only this client has it"
    )


def test_a_superseded_message_is_gone_and_one_of_qos_0_is_passed_on() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m1", "m2", topic="latest/a")
    world.publish("zero", topic="queue/a", qos=0)
    assert of_queue(world, "zero").startswith("ready: ")
    world.at(world.now_ms + QOS_0_WAIT_MS)
    assert of_queue(world, topic="latest/a") == (
        "gone without an acknowledgement: the topic exceeded max_length, or its rules changed"
    )
    assert of_queue(world, "m2", "latest/a").startswith("ready")
    assert of_queue(world, "zero").startswith("passed on: ")


def test_a_message_after_the_applied_offset_waits_in_kafka() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    world.append(given.published("m1", "queue/a"))
    assert of_queue(world) == "in Kafka, published at 0s: its agent has not read it yet"


def test_events_after_the_applied_offset_are_ignored() -> None:
    world = Delivering("queue", *QUEUE)
    world.join("anna", "latest/a")
    world.publish("m1", topic="latest/a")
    world.hand_over()
    world.publish("m2", topic="latest/a")
    world.leave("anna", "latest/a")
    world.append(given.acked("m1", "latest/a", client_id="anna"))
    assert of_queue(world, topic="latest/a").startswith("gone without an acknowledgement")


def test_a_message_stored_ahead_of_the_fence_waits() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    assert of_queue(world, score=99_000_000) == (
        "in Kafka, published at 89s: its agent has not read it yet"
    )


def test_a_late_acknowledgement_of_a_dead_letter_is_named() -> None:
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


def test_a_requeued_message_is_not_dead() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    dead_letter = DeadMessage(topic="queue/a", message_id="m1", reason="r", deliveries=1, at=0)
    assert of_queue(world, dead=dead_letter).startswith("dead")
    requeued_since = structs.replace(dead_letter, requeued=True)
    assert of_queue(world, dead=requeued_since).startswith("gone")


def test_a_message_stored_before_its_topic_was_a_queue_is_stored() -> None:
    world = Delivering("queue", *QUEUE)
    world.publish("m0")
    assert of_queue(world, score=1_000) == (
        "stored since -10s: it was stored before its topic was a queue"
    )


# -- pubsub ------------------------------------------------------------------------------------------------------------


def test_each_subscriber_of_a_pubsub_topic_has_its_own_state_of_a_message() -> None:
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
        "acked by 'ahead' at 0s (ahead of the read offset: an earlier message is not done)"
    )
    assert of_pubsub(world, "away") == "ready: no clients online"
    assert of_pubsub(world, "nobody") is None
    world.at(START_MS + 30_000)
    world.join("slow", "pubsub/a", session=2)
    reason = "slow: delivered 1 times without an acknowledgement (an ack by 'slow' takes it back)"
    assert of_pubsub(world, "slow") == f"dead since 30s: {reason}"
    log = unpack_log(world.table("logs").get("pubsub/a"))
    assert words(message_states.of_log(known(world, "m1", "pubsub/a"), log), 0) == "stored since 0s"
    world.requeue("m1", topic="pubsub/a")
    again = of_pubsub(world, "slow")
    assert again is not None
    assert again.startswith("leased by 'slow' since 30s")


def test_a_message_is_behind_a_subscriber_that_began_later() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.publish("m1", topic="late/a")
    world.now_ms += 1_000
    world.join("new", "late/a")
    assert of_pubsub(world, "new", topic="late/a") == (
        "behind its read offset: acknowledged, or older than its first read"
    )


def test_a_message_is_ready_for_a_subscriber_that_has_never_read_its_topic() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("new", "pubsub/#")
    world.leave("new", "pubsub/#", "disconnected")
    world.publish("m1", topic="pubsub/a")
    assert view(world, "new", "pubsub/a").reader.made_at is None
    assert of_pubsub(world, "new") == "ready: no clients online"


def test_a_trimmed_message_is_acked_or_expired_for_each_subscriber() -> None:
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
    of_log = message_states.of_log(known(world, "m1", "short/a"), log)
    assert words(of_log, world.now_ms) == "expired at 60s"


def test_a_shared_subscription_is_one_subscriber() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("one", "$share/g/pubsub/a")
    world.publish("m1", topic="pubsub/a")
    sentence = of_pubsub(world, "$share/g/pubsub/a")
    assert sentence is not None
    assert sentence.startswith("leased by 'one' of $share/g since 0s")


def test_a_leased_message_that_is_trimmed_is_shown_as_no_longer_stored() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("slow", "short/a")
    world.publish("m1", topic="short/a")
    world.at(START_MS + 60_000)
    sentence = of_pubsub(world, "slow", topic="short/a")
    assert sentence is not None
    assert sentence.startswith("leased by 'slow'")
    assert sentence.endswith("; it has expired or was superseded, and only this client has it")


def test_a_trimmed_message_is_shown_as_not_stored_before_its_reader_is_updated() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.join("away", "few/a")
    world.publish("m1", topic="few/a")
    world.leave("away", "few/a", "disconnected")
    world.publish("m2", topic="few/a")
    assert (
        view(world, "away", "few/a").reader.leases["m1"].stored
    )  # the agent has not updated the reader since
    sentence = of_pubsub(world, "away", topic="few/a")
    assert sentence is not None
    assert sentence.endswith("; it has expired or was superseded, and only this client has it")


def test_a_message_that_is_dead_for_one_subscriber_is_acked_for_another() -> None:
    world = Delivering("pubsub", *PUBSUB)
    for name in ("slow", "quick"):
        world.join(name, "pubsub/a")
    world.publish("m1", topic="pubsub/a")
    world.hand_over()
    world.ack("quick", "m1", topic="pubsub/a")
    world.join("slow", "pubsub/a", session=2)
    assert (of_pubsub(world, "slow") or "").startswith("dead since 0s")
    assert of_pubsub(world, "quick") == "acked by 'quick' at 0s"


def test_an_earlier_message_is_behind_a_subscriber_that_starts_with_the_latest() -> None:
    world = Delivering("pubsub", *PUBSUB)
    world.publish("m1", topic="late/a")
    world.now_ms += 1_000
    world.tell_unticked(given.joined("new", "late/#"))
    world.tell_unticked(given.left("new", "late/#", reason="disconnected", source_offset=1))
    assert view(world, "new", "late/a").reader.made_at is None
    assert (of_pubsub(world, "new", topic="late/a") or "").startswith("behind its read offset")


# -- topics without a delivery rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"score": 20_000_000}, "stored since 10s"),
        ({"score": 20_000_000, "now_ms": 90_000}, "expired at 70s: the next tick deletes it"),
        ({"applied": 0}, "in Kafka, published at 10s: its agent has not read it yet"),
        ({"retained": True}, "retained: stored only as the retained message of its topic"),
        ({"now_ms": 90_000}, "expired at 70s"),
        ({}, "gone without an acknowledgement: its rules changed, or another program deleted it"),
        (
            {"events": ()},
            "gone without an acknowledgement: its rules changed, or another program deleted it",
        ),
    ],
)
def test_a_message_without_a_delivery_rule_is_in_the_state_that_the_facts_give(
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
    assert words(state, values["now_ms"]) == expected


@pytest.mark.parametrize(
    ("qos", "rule", "expected"),
    [
        (0, given.store("t"), "not stored: its QoS is 0"),
        (1, given.store("u"), "not stored: no rule stores messages of its topic"),
    ],
)
def test_a_message_that_no_rule_stores_has_the_reason(qos: int, rule: str, expected: str) -> None:
    event = LogEvent(
        kind="published", kafka_topic="mqtt.messages", partition=0, offset=5, at=20_000,
        message_id="m1", topic="t", qos=qos,
    )  # fmt: skip
    plan = make_plan(given.rules(rule), "t")
    about = Known(message_id="m1", plan=plan, score=None, applied=9, now_ms=0, events=(event,))
    assert words(message_states.of_message(about), 0) == expected


# -- words, and the events in records ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (-1, "0.0 s"), (1_500, "1.5 s"), (10_000, "10 s"), (119_000, "119 s"), (120_000, "2 min"),
        (7_199_000, "119 min"), (7_200_000, "2 h"), (172_800_000, "2 d"),
    ],
)  # fmt: skip
def test_an_age_has_the_largest_unit_of_which_there_are_two(ms: int, expected: str) -> None:
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
def test_the_searched_part_is_described(bounds: tuple[int, int, int, int], expected: str) -> None:
    start, first, stop, end = bounds
    part = Searched(kafka_topic="x", partition=3, start=start, first=first, stop=stop, end=end)
    assert sentences.searched(part) == expected


ODD = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


def a_record(key: bytes, value: bytes | None, **fields: Any) -> Any:
    values = {"partition": 0, "offset": 1, "timestamp": 2, "headers": ()}
    return SimpleNamespace(key=key, value=value, **{**values, **fields})


@drawn(ODD, ODD, ODD)
def test_a_record_is_found_by_its_own_id_and_by_no_other(name: str, other: str, topic: str) -> None:
    record = a_record(*given.key_and_value(given.published(name, topic, payload=other)))
    (found,) = WantedMessage(name, topic).events(record)
    assert (found.kind, found.message_id, found.topic) == ("published", name, topic)
    if name != other:
        assert WantedMessage(other, None).events(record) == []
        assert WantedMessage(name, topic + "x").events(record) == []


def test_an_id_is_found_however_the_json_escapes_it() -> None:
    key, value = given.key_and_value(given.published("a/é", "t"))
    escaped = value.replace("a/é".encode(), b"a\\/\\u00e9")
    assert escaped != value
    (found,) = WantedMessage("a/é", "t").events(a_record(key, escaped))
    assert found.message_id == "a/é"


@pytest.mark.parametrize("value", [None, b"", b"m1", b'{"type":"tick"}', b'{"message_id":"m1"}'])
def test_a_record_that_cannot_be_decoded_has_no_events(value: bytes | None) -> None:
    assert WantedMessage("m1", None).events(a_record(b"t", value)) == []


def test_a_dead_letter_is_found_by_its_header_or_by_its_bytes() -> None:
    reason = (("reason", b"because"), ("agent", b"queue"))
    named = a_record(b"t", b"payload", headers=(("message-id", b"m1"), *reason))
    bytes_only = a_record(b"t", b'{"message_id":"m1", what', headers=reason)
    for record in (named, bytes_only):
        (found,) = WantedMessage("m1", "t").dead_letters(record)
        assert (found.kind, found.detail) == ("dead_letter", "queue: because")
        assert found.kafka_topic == keys.DEAD_LETTERS_TOPIC
        assert WantedMessage("m2", "t").dead_letters(record) == []
        assert WantedMessage("m1", "u").dead_letters(record) == []


# -- the list of topics ------------------------------------------------------------------------------------------------


@drawn(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5))), st.integers(1, 7))
def test_the_list_has_the_deepest_topics(depths: list[tuple[int, int]], limit: int) -> None:
    rows = [
        TopicRow(topic=f"{at:03d}", agent="queue", partition=0, messages=messages, dead=dead)
        for at, (messages, dead) in enumerate(depths)
    ]
    top = Top(limit)
    for row in (*rows, *rows):  # the scan of a table may return a topic twice
        top.add(row)
    expected = sorted(((row.messages, row.dead) for row in rows), reverse=True)[:limit]
    assert [(row.messages, row.dead) for row in top.rows()] == expected
    assert len({row.topic for row in top.rows()}) == len(top.rows())
