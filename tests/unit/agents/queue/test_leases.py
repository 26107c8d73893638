"""The table of leases: reports, failures, acks, deaths; who may acknowledge; what a repeat changes."""

from __future__ import annotations

import pytest

from millpond.agents.delivery import leasing, window
from millpond.agents.delivery.dead_messages import DEAD_LETTER_RETENTION_MS
from millpond.agents.queue import machine
from millpond.agents.queue.machine import QOS_0_WAIT_MS
from millpond.schemas import keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S
from millpond.schemas.events import DeliveriesSent, Sent
from tests.support import given
from tests.support.delivery import AT, Delivering
from tests.unit.agents.queue.test_machine import ACK_TIMEOUT_MS, a_queue


def reported(world: Delivering, lease: str, client: str, name: str) -> None:
    sent = Sent(lease, client, name)
    world.tell(DeliveriesSent(**AT, agent="queue", sent=(sent,)))


# -- reports


@pytest.mark.parametrize(
    ("lease", "client", "name"),
    [
        ("queue/0/2", "a", "m1"), ("queue/0/1", "b", "m1"), ("queue/0/1", "a", "m2"), ("", "a", "m1"),
        ("nonsense", "a", "m1"), ("queue/0/1", "nobody", "m1"),
    ],
)  # fmt: skip
def test_a_report_that_does_not_match_its_lease_is_ignored(
    lease: str, client: str, name: str
) -> None:
    world = a_queue()
    world.join("a")
    world.join("b", "queue/b")
    world.publish("m1")
    before = {**world.table("windows"), **world.table("members")}
    reported(world, lease, client, name)
    assert {**world.table("windows"), **world.table("members")} == before


def test_a_copy_counts_as_delivered_once_its_sending_is_confirmed_and_only_once() -> None:
    world = a_queue(max_deliveries=3)
    world.join("a")
    world.publish("m1")
    commands = world.take()
    world.sent(commands)
    world.sent(commands)
    world.join("a", session=2)
    (again,) = world.take()
    assert again.attempt == 2


def test_the_time_for_an_ack_begins_when_the_copy_was_sent() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    commands = world.take()
    world.join("b")
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert world.take() == []
    world.sent(commands)
    world.at(world.now_ms + ACK_TIMEOUT_MS - 1)
    assert world.take() == []
    world.at(world.now_ms + 1)
    assert world.taken() == [("b", "m1")]


def test_a_command_that_nobody_reports_comes_back_after_an_hour_and_counts_nothing() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    assert world.taken() == [("a", "m1")]
    world.at(world.now_ms + leasing.SEND_TIMEOUT_MS - 1)
    assert world.take() == []
    world.at(world.now_ms + 1)
    (again,) = world.take()
    assert again.attempt == 1


def test_a_subscriber_of_qos_0_is_served_once_and_the_sending_is_its_ack() -> None:
    world = a_queue(max_inflight=1)
    world.join("a", qos=0)
    world.publish("m1", "m2")
    assert world.hand_over() == [("a", "m1")]
    assert world.stored("queue/a") == ["m2"]
    assert world.hand_over() == [("a", "m2")]
    assert world.table("windows") == {}


def test_a_publish_of_qos_0_is_handed_once_to_one_who_has_room_and_not_stored() -> None:
    world = a_queue(max_inflight=1)
    world.join("a")
    world.join("b")
    world.publish("m1", "m2", "m3", qos=0)
    (first, second, third) = world.take()
    assert [first.client_id, second.client_id, third.client_id] == ["a", "b", "a"]
    assert {first.lease, second.lease, third.lease} == {""}
    assert world.stored("queue/a") == []


@pytest.mark.parametrize("after_ms", [0, QOS_0_WAIT_MS - 1, QOS_0_WAIT_MS])
def test_a_publish_of_qos_0_waits_a_few_seconds_for_one_who_takes_it(after_ms: int) -> None:
    """A publish right after a SUBACK came before the join, and was lost."""
    world = a_queue(max_inflight=2)
    world.publish("m0", "m1", "m2", qos=0)
    world.at(world.now_ms + after_ms)
    in_time = after_ms < QOS_0_WAIT_MS
    assert world.stored("queue/a") == (["m0", "m1", "m2"] if in_time else [])
    world.join("a")
    # In order, behind those that wait, as QoS 0
    world.publish("m3", qos=0)
    assert world.hand_over() == ([("a", "m0"), ("a", "m1")] if in_time else [("a", "m3")])
    if in_time:
        assert world.hand_over() == [("a", "m2"), ("a", "m3")]
    assert world.table("windows") == {}


def test_a_publish_of_qos_0_waits_for_one_who_has_room() -> None:
    world = a_queue(max_inflight=1)
    world.join("a")
    world.publish("m4", "m5")
    world.hand_over()
    world.publish("m6", qos=0)
    assert world.take() == []
    assert world.stored("queue/a") == ["m4", "m5", "m6"]
    world.at(world.now_ms + QOS_0_WAIT_MS)
    assert world.stored("queue/a") == ["m4", "m5"]


def test_a_waiting_publish_of_qos_0_ends_with_its_own_expiry() -> None:
    world = a_queue()
    world.publish("m0", qos=0, expires_at=world.now_ms + 1_000)
    world.publish("m1", qos=0, expires_at=world.now_ms + 2 * QOS_0_WAIT_MS)
    world.at(world.now_ms + 1_000)
    assert world.stored("queue/a") == ["m1"]
    world.at(world.now_ms + QOS_0_WAIT_MS)
    assert world.stored("queue/a") == []


def test_a_waiting_publish_of_qos_0_pushes_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = a_queue(max_length=2)
    world.publish("m0")
    world.publish("m1", "m2", qos=0)
    assert world.stored("queue/a") == ["m0", "m1"]
    world.publish("m3")
    assert world.stored("queue/a") == ["m1", "m3"]
    monkeypatch.setattr(machine, "QOS_0_WAITING_MAX", 3)
    world = a_queue()
    world.publish("m0", "m1", "m2", "m3", qos=0)
    assert world.stored("queue/a") == ["m0", "m1", "m2"]


def test_a_retained_publish_of_qos_0_and_one_that_the_broker_delivers_do_not_wait() -> None:
    world = Delivering("queue", given.queue(), given.retain())
    world.publish("m0", qos=0, retain=True)
    assert world.stored("queue/a") == []
    world.join("a", broker_delivers=True)
    world.publish("m1", qos=0)
    assert world.stored("queue/a") == []


def test_a_publish_of_qos_0_is_stored_where_the_rule_says_so() -> None:
    world = a_queue(store_qos0=True)
    world.publish("m1", qos=0)
    assert world.stored("queue/a") == ["m1"]
    world.join("a")
    assert [(each.message_id, each.qos) for each in world.take()] == [("m1", 0)]


# -- failures


@pytest.mark.parametrize("reason", ["no_client", "stale", "bridge"])
def test_a_failure_returns_the_message_to_who_does_not_rest(reason: str) -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    commands = world.take()
    world.join("b")
    world.fail(commands, reason)  # type: ignore[arg-type]
    assert world.hand_over() == [("b", "m1")]
    world.publish("m2", "m3")
    assert {client for client, _ in world.hand_over()} == {"b"}


def test_what_was_told_of_as_sent_may_fail_after_all_and_counts_nothing() -> None:
    world = a_queue(max_deliveries=1)
    world.join("a")
    world.publish("m1")
    for _ in range(2):
        commands = world.take()
        assert [each.attempt for each in commands] == [1]
        world.sent(commands)
        world.fail(commands, "no_client")
        world.join("a")
    assert world.hand_over() == [("a", "m1")]
    assert world.stored("queue/a") == ["m1"]


def test_a_failure_that_comes_after_the_ack_changes_nothing() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1", "m2")
    first, second = world.take()
    world.sent([first, second])
    world.ack("a", "m1")
    world.fail([first], "no_client")
    world.publish("m3")
    assert world.hand_over() == [("a", "m3")]


def test_a_rest_doubles_until_a_join_or_an_acknowledgement() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    for rest_ms in (1_000, 2_000, 4_000):
        world.fail(world.take(), "no_client")
        world.at(world.now_ms + rest_ms - 1)
        assert world.take() == []
        world.at(world.now_ms + 1)
    world.fail(world.take(), "no_client")
    world.join("a")
    commands = world.take()
    assert [each.message_id for each in commands] == ["m1"]
    world.fail(commands, "no_client")
    world.at(world.now_ms + 1_000)
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m1")
    world.publish("m2")
    world.fail(world.take(), "no_client")
    world.at(world.now_ms + 1_000)
    assert world.taken() == [("a", "m2")]


def test_nothing_new_overtakes_what_is_still_under_way_to_a_member_that_comes_back() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1", "m2", "m3")
    first, second, third = world.take()
    # Given a connection that breaks before the first one was sent, and is made anew
    world.fail([first], "no_client")
    world.join("a")
    world.publish("m4")
    assert world.take() == []
    # When the others have failed, too, Then all of them come, in order, in an epoch of their own
    world.fail([second, third], "stale")
    again = world.take()
    assert [each.message_id for each in again] == ["m1", "m2", "m3", "m4"]
    assert all(each.epoch > third.epoch for each in again)


def test_what_is_under_way_to_a_member_that_comes_back_is_waited_for_until_its_validity_ends() -> (
    None
):
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.take()
    world.join("a")
    world.publish("m2")
    assert world.take() == []
    world.at(world.now_ms + COMMAND_VALID_FOR_S * 1000)
    assert world.taken() == [("a", "m1"), ("a", "m2")]


def test_a_second_subscription_does_not_wait_for_what_is_under_way() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.join("a", "queue/b")
    world.publish("m2", topic="queue/b")
    assert world.taken() == [("a", "m1"), ("a", "m2")]


def test_commands_of_an_epoch_that_is_over_do_not_send_a_member_to_rest() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1", "m2")
    first, second = world.take()
    world.fail([first], "no_client")
    world.at(world.now_ms + leasing.REST_MS)
    assert world.take() == []
    world.fail([second], "stale")
    assert world.taken() == [("a", "m1"), ("a", "m2")]


def test_a_message_whose_command_is_too_large_is_dead() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.fail(world.take(), "too_large")
    assert world.stored("queue/a") == []
    assert list(world.table("dead")) == ["m1"]


def test_a_message_whose_body_is_missing_ends() -> None:
    world = a_queue()
    world.publish("m1", "m2")
    del world.server.values[keys.message_body("m1")]
    world.join("a")
    world.settle()
    assert world.taken() == [("a", "m2")]
    assert world.stored("queue/a") == ["m2"]


# -- acks


def test_an_earlier_holder_may_acknowledge_late_and_by_the_name_of_its_copy() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1", "m2")
    world.sent(world.take(), alias="copy of ")
    world.leave("a")
    world.join("b")
    assert world.hand_over() == [("b", "m1"), ("b", "m2")]
    world.ack("b", "copy of m1")
    assert world.stored("queue/a") == ["m2"]
    world.restart()
    world.ack("a", "copy of m2")
    assert world.stored("queue/a") == []


def test_a_message_that_has_come_back_may_still_be_acknowledged_by_who_had_it() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.leave("a")
    world.ack("b", "m1")
    assert world.stored("queue/a") == ["m1"]
    world.ack("a", "m1")
    assert world.stored("queue/a") == []


def test_the_name_of_a_copy_is_forgotten_with_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by reading: in memory the name outlived its holder, in the store it did not."""
    monkeypatch.setattr(window, "HOLDERS_MAX", 2)
    world = a_queue()
    world.join("a")
    world.publish("m1")
    for session, alias in enumerate(("first ", "second ", "third "), start=2):
        world.sent(world.take(), alias)
        world.join("a", session=session)
    world.ack("a", "first m1")
    assert world.stored("queue/a") == ["m1"]
    world.ack("a", "third m1")
    assert world.stored("queue/a") == []


def test_a_repeat_of_what_is_stored_or_in_hand_changes_nothing_however_late() -> None:
    """Found by reading: it was leased twice, and the first lease was lost."""
    world = a_queue(max_inflight=1)
    world.publish("m1", "m2")
    world.join("a")
    assert world.hand_over() == [("a", "m1")]
    world.now_ms += 130_000
    world.publish("m3", "m4", "m5")
    world.now_ms += 130_000
    world.publish("m1", "m2")
    assert world.stored("queue/a") == ["m1", "m2", "m3", "m4", "m5"]
    world.restart()
    served = []
    for _ in range(5):
        world.hand_over()
        name = world.stored("queue/a")[0]
        served.append(name)
        world.ack("a", name)
    assert served == ["m1", "m2", "m3", "m4", "m5"]
    assert world.table("windows") == {}


# -- where the broker delivers


def test_where_the_broker_delivers_only_what_was_stored_before_is_handed_over() -> None:
    world = a_queue()
    world.publish("m1")
    world.join("a", broker_delivers=True)
    world.publish("m2")
    world.publish("m3", qos=0)
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m2", broker_delivers=True)
    assert world.stored("queue/a") == ["m1"]
    world.join("b")
    world.publish("m4")
    assert world.hand_over() == [("b", "m4")]


def test_where_the_broker_delivers_any_of_its_clients_acks_is_the_first_one() -> None:
    world = a_queue(max_inflight=1)
    world.publish("m1", "m2")
    world.join("a", broker_delivers=True)
    world.join("b", broker_delivers=True)
    world.restart()
    world.ack("b", "m1", broker_delivers=True)
    world.ack("stranger", "m2")
    assert world.stored("queue/a") == ["m2"]
    world.ack("stranger", "m2", broker_delivers=True)
    world.ack("b", "m2", broker_delivers=True)
    assert world.stored("queue/a") == []


def test_an_ack_may_come_before_its_publish_where_the_broker_delivers() -> None:
    world = a_queue()
    world.ack("a", "m1", broker_delivers=True)  # its client's join is not here yet, either
    world.publish("m1")
    assert world.stored("queue/a") == []


def test_an_ack_right_behind_the_join_of_its_client_finds_what_is_stored() -> None:
    """Found by reading: in one batch with the join, the place of the message was not asked for."""
    world = a_queue()
    world.publish("m1", "m2", "m3")
    world.join("z", "queue/z")
    world.restart()
    joined = given.joined("a", "queue/a", source_offset=9, broker_delivers=True)
    world.tell(joined, given.acked("m2", "queue/a", client_id="a", broker_delivers=True))
    assert world.stored("queue/a") == ["m1", "m3"]


# -- dead letters


def dead_world(**settings: object) -> Delivering:
    world = a_queue(max_deliveries=1, **settings)
    world.join("a")
    world.publish("m1", retain=True)
    world.hand_over()
    world.join("a", session=2)
    assert list(world.table("dead")) == ["m1"]
    return world


def test_a_dead_letter_says_what_it_was_and_why() -> None:
    world = dead_world()
    (letter,) = world.dead_letters
    headers = dict(letter.headers)
    assert (letter.key, letter.value) == (b"queue/a", b"hello")
    assert headers["message-id"] == b"m1" and headers["deliveries"] == b"1"
    assert headers["reason"] == b"delivered 1 times without an acknowledgement"


def test_a_dead_letter_is_dropped_by_order_or_after_a_week() -> None:
    for end in ("drop", "week"):
        world = dead_world()
        assert keys.message_body("m1") in world.server.values
        if end == "drop":
            world.drop("m1", topic="queue/other")
            world.drop("m1", "unknown")
        else:
            world.at(world.now_ms + DEAD_LETTER_RETENTION_MS - 1)
            assert list(world.table("dead")) == ["m1"]
            world.at(world.now_ms + 1)
        assert world.table("dead") == {}
        assert keys.message_body("m1") not in world.server.values


def test_a_requeue_of_what_is_no_dead_letter_does_nothing() -> None:
    world = dead_world()
    world.requeue("unknown")
    world.requeue("m1", topic="queue/other")
    assert world.take() == []
    world.requeue("m1")
    world.requeue("m1")
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m1")
    assert world.stored("queue/a") == []


def test_a_requeued_message_lives_as_long_as_a_new_one() -> None:
    world = dead_world(expired_time=60)
    world.at(world.now_ms + 100_000)
    world.requeue("m1")
    (again,) = world.take()
    assert again.expires_at == world.now_ms + 60_000
    world.at(world.now_ms + 60_000)
    assert world.stored("queue/a") == []


def test_a_requeue_in_the_batch_in_which_the_message_died_loses_nothing() -> None:
    """Found by reading: the index entry was removed after it had been written."""
    world = a_queue(max_length=1, overflow="dead_letter")
    world.publish("m1")
    world.tell(given.published("m2", "queue/a"), world.order("m1"))
    assert world.stored("queue/a") == ["m1"]
    assert list(world.table("dead")) == ["m2"]


def test_a_requeue_of_what_is_dead_and_in_hand_takes_it_out_of_the_hand() -> None:
    """Found by the properties: the message was lost."""
    world = a_queue(max_length=1, overflow="dead_letter")
    world.join("a")
    world.publish("m1", "m2")
    assert world.taken() == [("a", "m1"), ("a", "m2")]
    world.requeue("m1")
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m1")
    assert world.stored("queue/a") == []


def test_a_requeue_into_a_full_queue_after_a_restart() -> None:
    """Found by reading: the oldest message was not read that had to go."""
    world = a_queue(max_length=2, overflow="dead_letter")
    world.publish("m1", "m2", "m3")
    world.restart()
    world.requeue("m1")
    assert world.stored("queue/a") == ["m3", "m1"]
    assert list(world.table("dead")) == ["m2"]


def test_a_dead_letter_made_in_the_tick_in_which_it_would_have_expired_keeps_its_body() -> None:
    """Found by reading: the sweep of the same tick dropped it."""
    world = a_queue(max_deliveries=1, expired_time=30)
    world.join("a")
    world.publish("m1")
    world.publish("m2", expires_at=world.now_ms + 20_000)
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    dead = world.table("dead")
    assert {name for name in ("m1", "m2") if keys.message_body(name) in world.server.values} == set(
        dead
    )
    assert world.stored("queue/a") == []
