"""The table of who is remembered and what is trimmed, rewound and dead. See `test_pubsub_machine.py`."""

from __future__ import annotations

import pytest

from millpond.agents.delivery.dead_messages import DEAD_LETTER_RETENTION_MS
from millpond.schemas.events import Event, SubscriberJoined, SubscriberLeft
from tests.simulation import pubsub_judge as judge
from tests.unit.agents.pubsub.test_machine import TOPIC, Pubsub
from tests.unit.agents.pubsub.test_readers import SHARED, read_all, reader

RETENTION_MS = 60_000


def gone(world: Pubsub, subscriber: str = "a") -> bool:
    """Whether nothing is left of a subscriber."""
    known = judge.subscribers(world.server)
    left = [key for key in judge.readers(world.server) if key.startswith(f"{subscriber}\0")]
    return not left and subscriber not in known and world.shown(subscriber) is None


# -- forgetting


def test_unsubscribing_forgets_nothing_while_another_filter_matches() -> None:
    world = Pubsub()
    world.join("a")
    world.join("a", "pubsub/+")
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", TOPIC, "unsubscribed")
    assert world.shown("a") == "m1"
    world.leave("a", "pubsub/+", "unsubscribed")
    assert gone(world)


def test_unsubscribing_from_a_wildcard_forgets_page_by_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in ("delivery.rounds", "pubsub.forgetting", "pubsub.readers"):
        monkeypatch.setattr(f"millpond.agents.{place}.PAGE_MAX", 2)
    world = Pubsub()
    world.join("a", "pubsub/#")
    for number in range(7):
        world.publish(f"m{number}", topic=f"pubsub/{number}")
        world.hand_over()
        world.ack("a", f"m{number}", topic=f"pubsub/{number}")
    assert len(judge.readers(world.server)) == 7
    world.leave("a", "pubsub/#", "unsubscribed")
    assert gone(world)
    assert not judge.readers(world.server)


@pytest.mark.parametrize("topic_filter", [TOPIC, "pubsub/#"])
@pytest.mark.parametrize("subscribed_ms", [None, -7, 0, 7])
@pytest.mark.parametrize("at_once", [True, False])
def test_who_subscribes_again_before_the_tick_that_forgets_begins_anew(
    topic_filter: str, subscribed_ms: int | None, at_once: bool
) -> None:
    world = Pubsub()
    world.join("a", topic_filter)
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    assert world.shown("a") == "m1"
    # UNSUBSCRIBE, UNSUBACK, SUBSCRIBE: the time of the subscription is one of another log.
    events: list[Event] = [
        SubscriberLeft(
            at=0, node="n", client_id="a", topic_filter=topic_filter, reason="unsubscribed",
            session=1, source_offset=50,
        ),
        SubscriberJoined(
            at=0, node="n", client_id="a", topic_filter=topic_filter, qos=1, session=1,
            source_offset=51,
            subscribed_at=0 if subscribed_ms is None else world.now_ms + subscribed_ms,
        ),
    ]  # fmt: skip
    if at_once:
        world.append(*events)
    else:
        for event in events:
            world.tell_unticked(event)
    world.settle()
    assert world.shown("a") is None
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m1")
    assert world.shown("a") == "m1"


def test_what_was_announced_twice_is_forgotten_once() -> None:
    world = Pubsub()
    world.join("a", source_offset=10)
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    for _ in range(2):  # by two owners of the clients' partition
        world.leave("a", TOPIC, "unsubscribed", source_offset=11)
        world.join("a", source_offset=12, subscribed_at=world.now_ms - 5)
        assert world.hand_over() in ([("a", "m1")], [])
        world.ack("a", "m1")
    assert world.shown("a") == "m1"


def test_disconnecting_keeps_for_ever() -> None:
    world = Pubsub(offset_retention_s=60)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", TOPIC, "disconnected")
    world.at(world.now_ms + 100 * RETENTION_MS)
    assert world.shown("a") == "m1"


def test_who_comes_back_in_time_is_remembered() -> None:
    world = Pubsub(offset_retention_s=60)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a")
    world.at(world.now_ms + RETENTION_MS - 1)
    world.join("a", session=2)
    world.at(world.now_ms + RETENTION_MS)
    assert world.shown("a") == "m1"
    world.leave("a", TOPIC, "session_ended", session=2)
    world.at(world.now_ms + RETENTION_MS)
    assert gone(world)


def test_a_group_is_dropped_after_its_last_member_went_for_whatever_reason() -> None:
    world = Pubsub(offset_retention_s=60)
    for client in "ab":
        world.join(client, SHARED)
    world.publish("m1")
    world.take()
    world.leave("a", SHARED, "unsubscribed")
    world.leave("b", SHARED, "disconnected")
    world.leave("b", SHARED, "session_ended")
    world.at(world.now_ms + RETENTION_MS)
    assert not judge.subscribers(world.server)
    assert not judge.readers(world.server)


def test_a_group_is_dropped_after_its_last_member_unsubscribed() -> None:
    world = Pubsub(offset_retention_s=60)
    world.join("a", SHARED)
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", SHARED, "unsubscribed")
    assert world.shown(SHARED) == "m1"
    world.at(world.now_ms + RETENTION_MS)
    assert not judge.subscribers(world.server)


def test_the_session_of_a_group_member_that_is_away_ends_and_nobody_minds() -> None:
    world = Pubsub(offset_retention_s=60)
    world.join("a", SHARED)
    world.leave("a", SHARED)
    world.join("a", SHARED, session=2)
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")]


def test_giving_up_what_was_never_held_is_nothing() -> None:
    world = Pubsub()
    world.join("a")
    world.leave("a", "pubsub/+", "unsubscribed")
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")]


# -- trimming


def test_a_lagging_subscriber_moves_up_and_its_loss_is_counted() -> None:
    world = Pubsub(max_length=2, max_inflight=1)
    world.join("a")
    world.publish("m1", "m2", "m3", "m4", "m5")
    assert world.stored(TOPIC) == ["m4", "m5"]
    assert world.hand_over() == [("a", "m1")]
    assert reader(world).lost == 2  # m1 is the holder's alone
    world.ack("a", "m1")
    assert read_all(world) == ["m4", "m5"]
    world.rewind("a", 0)
    assert reader(world).lost == 2


def test_the_failure_of_a_trimmed_message_ends_it() -> None:
    world = Pubsub(max_length=1, max_inflight=1)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.join("a", session=2)
    assert world.hand_over() == [("a", "m2")]


def test_what_is_older_than_its_rule_says_is_trimmed_also_what_came_back() -> None:
    world = Pubsub(expired_time=5)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.leave("a")
    world.at(world.now_ms + 5_000)
    assert world.stored(TOPIC) == []
    world.join("a", session=2)
    assert world.hand_over() == []
    assert reader(world).lost == 2
    assert world.shown("a") == "m2"


def test_a_message_that_expires_by_itself_leaves_a_gap() -> None:
    world = Pubsub(max_inflight=1)
    world.publish("m1")
    world.publish("m2", expires_at=world.now_ms + 1_000)
    world.publish("m3")
    world.join("a")
    world.at(world.now_ms + 1_000)
    assert read_all(world) == ["m1", "m3"]
    assert world.shown("a") == "m3"


def test_a_message_that_expired_in_somebodys_hands_is_not_dead_but_over() -> None:
    world = Pubsub(max_deliveries=1)
    world.join("a")
    world.publish("m1", expires_at=world.now_ms + 1_000)
    world.hand_over()
    world.at(world.now_ms + 1_000)
    world.join("a", session=2)
    assert not judge.dead(world.server)
    assert not reader(world).leases


def test_a_repeat_that_nobody_recognises_does_no_harm() -> None:
    world = Pubsub(max_length=1)
    for number in range(3):
        world.publish("m1")
        for each in "ab":
            world.now_ms += 200_000
            world.publish(f"{each}{number}", topic="pubsub/b")
    assert world.stored(TOPIC) == ["m1"]
    world.publish("m2", "m3")
    assert world.stored(TOPIC) == ["m3"]
    assert judge.logs(world.server)[TOPIC].length == 1


def test_what_is_too_old_when_it_is_published_is_not_stored() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1", expires_at=world.now_ms)
    assert world.take() == []
    assert world.stored(TOPIC) == []


# -- dead


def dead(world: Pubsub, *clients: str) -> None:
    """A message is dead for these, with `max_deliveries` = 1."""
    for client in clients:
        world.join(client)
    world.publish("m1")
    world.hand_over()
    for client in clients:
        world.join(client, session=2)


def test_a_dead_message_comes_once_more_to_those_who_gave_it_up_also_after_it_was_trimmed() -> None:
    world = Pubsub(max_deliveries=1, max_length=1, expired_time=60)
    dead(world, "a", "b")
    assert judge.dead(world.server)["m1"].subscribers == ("a", "b")
    world.publish("m2")
    world.hand_over()
    world.ack("a", "m2")
    world.ack("b", "m2")
    world.at(world.now_ms + 120_000)
    world.requeue("m1", topic=TOPIC)
    assert world.hand_over() == [("a", "m1"), ("b", "m1")]
    world.requeue("m1", topic=TOPIC)
    assert world.hand_over() == []
    world.ack("a", "m1")
    assert world.shown("a") == "m2"


def test_a_requeued_message_does_not_hold_the_offset() -> None:
    world = Pubsub(max_deliveries=1)
    dead(world, "a")
    world.publish("m2")
    world.hand_over()
    world.requeue("m1", topic=TOPIC)
    world.ack("a", "m2")
    assert world.shown("a") == "m2"


def test_a_dead_message_is_dropped_by_order_or_when_its_time_is_over() -> None:
    world = Pubsub(max_deliveries=1, max_length=1)
    dead(world, "a")
    world.drop("m1", topic="pubsub/other")
    world.drop("m1", topic=TOPIC)
    assert not judge.dead(world.server)
    assert world.stored(TOPIC) == ["m1"]  # the log has it still
    world.publish("m2")
    world.hand_over()
    world.join("a", session=3)
    assert list(judge.dead(world.server)) == ["m2"]
    world.publish("m3")
    world.at(world.now_ms + DEAD_LETTER_RETENTION_MS)
    assert "m2" not in judge.dead(world.server)
    judge.check_bodies(world.server)


def test_a_dead_message_that_expires_by_itself_keeps_its_body() -> None:
    world = Pubsub(max_deliveries=1)
    world.join("a")
    world.publish("m1", expires_at=world.now_ms + 1_000)
    world.hand_over()
    world.join("a", session=2)
    assert list(judge.dead(world.server)) == ["m1"]
    world.at(world.now_ms + 1_000)
    assert world.stored(TOPIC) == []
    judge.check_bodies(world.server)
    world.drop("m1", topic=TOPIC)
    judge.check_bodies(world.server)


def test_what_is_requeued_for_nobody_is_nothing() -> None:
    world = Pubsub(max_deliveries=1)
    dead(world, "a")
    world.requeue("m1", topic="pubsub/other")
    world.leave("a", TOPIC, "unsubscribed", session=2)
    world.requeue("m1", topic=TOPIC)
    assert world.hand_over() == []


# -- rewinding


def place(world: Pubsub, name: str) -> int:
    return judge.scores(world.server, TOPIC)[name]


def test_rewinding_goes_behind_any_place_in_the_log() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1", "m2", "m3")
    world.hand_over()
    world.ack("a", "m1", "m2", "m3")
    world.rewind("a", place(world, "m2"))
    assert world.hand_over() == [("a", "m3")]
    world.rewind("a", 0)
    assert world.hand_over() == [("a", "m1"), ("a", "m2"), ("a", "m3")]
    world.rewind("a", 10**17)
    assert world.hand_over() == []
    world.publish("m4")
    assert world.hand_over() == [("a", "m4")]


def test_rewinding_frees_what_is_in_the_subscribers_hands() -> None:
    world = Pubsub(max_inflight=2)
    world.join("a", "pubsub/+")
    world.publish("m1", "m2", "m3")
    commands = world.take()
    world.rewind("a", place(world, "m2"))
    world.sent(commands)
    assert world.hand_over() == [("a", "m3")]


def test_rewinding_frees_what_somebody_has_who_is_away() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.leave("a", TOPIC, "disconnected")
    world.rewind("a", 0)
    assert not reader(world).leases
    world.join("a")
    assert world.hand_over() == [("a", "m1")]


def test_a_group_is_rewound_by_its_subscription_also_while_nobody_is_there() -> None:
    world = Pubsub()
    world.join("a", SHARED)
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", SHARED)
    world.rewind(SHARED, 0)
    world.join("b", SHARED)
    assert world.hand_over() == [("b", "m1")]


def test_who_does_not_read_a_topic_cannot_be_rewound() -> None:
    world = Pubsub()
    world.publish("m1")
    world.rewind("nobody", 0)
    assert len(world.dead_letters) == 1
