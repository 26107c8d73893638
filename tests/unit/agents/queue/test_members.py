"""The table of a queue's members and of what becomes of its messages besides acks: joins, leaves, groups; expiry, length,
retained messages, receipts, refusals, new rules.
"""

from __future__ import annotations

from typing import Any

import pytest

from millpond.agents.delivery import machine as delivery
from millpond.agents.delivery import membership
from millpond.agents.delivery.members import Members
from millpond.agents.topics import storage
from millpond.pipeline.stores.memory.server import Zset
from millpond.schemas import keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S
from millpond.schemas.events import NodeStarted, RulesChanged
from tests.support import given
from tests.support.delivery import AT, Delivering
from tests.unit.agents.queue.test_machine import a_queue

VALID_MS = COMMAND_VALID_FOR_S * 1000


def new_rules(world: Delivering, *tables: str) -> None:
    rules = given.rules(*tables).canonical()
    world.tell(RulesChanged(**AT, agent="queue", rules=rules))


# -- members


def test_members_of_a_group_compete_with_each_other_and_with_everybody_else() -> None:
    world = a_queue()
    for client in ("a", "b"):
        world.join(client, "$share/g/queue/+")
    world.join("c", "queue/a")
    world.publish(*(f"m{number}" for number in range(6)))
    counted = [client for client, _ in world.hand_over()]
    assert sorted(counted) == ["a", "a", "b", "b", "c", "c"]


def test_a_client_in_a_group_and_for_itself_is_two_members() -> None:
    world = a_queue(max_inflight=1)
    world.join("a", "queue/a")
    world.join("a", "$share/g/queue/a")
    world.publish("m1", "m2", "m3")
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]
    world.leave("a", "queue/a", "unsubscribed")
    world.ack("a", "m1")
    assert [name for _, name in world.hand_over()] == ["m3"]


def test_of_several_filters_the_best_qos_counts_and_the_member_stays_until_the_last() -> None:
    world = a_queue()
    world.join("a", "queue/a", qos=0)
    world.join("a", "queue/#", qos=2)
    world.publish("m1", qos=2)
    assert [each.qos for each in world.take()] == [2]
    world.leave("a", "queue/#", "unsubscribed")
    world.publish("m2", qos=2)
    assert [each.qos for each in world.take()] == [0]
    world.leave("a", "queue/a", "unsubscribed")
    world.publish("m3")
    assert world.take() == []


def test_old_news_of_a_member_is_ignored() -> None:
    world = a_queue()
    world.join("a", source_offset=10)
    world.leave("a", source_offset=9)
    world.leave("a", source_offset=11, session=0)
    world.join("a", "queue/b", source_offset=9)
    world.leave("stranger")
    world.publish("m1")
    world.publish("m2", topic="queue/b")
    assert world.taken() == [("a", "m1")]


def test_a_new_session_gives_back_what_the_old_one_had() -> None:
    world = a_queue(max_inflight=1)
    world.join("a", "queue/+")
    world.publish("m1", "m2")
    assert world.hand_over() == [("a", "m1")]
    world.join("a", "queue/+", session=2)
    (again,) = world.take()
    assert (again.message_id, again.attempt) == ("m1", 2)


def test_a_session_that_survives_keeps_its_messages_while_its_copies_are_valid() -> None:
    world = a_queue(ack_timeout_s=600)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.leave("a", reason="disconnected")
    world.join("b")
    world.at(world.now_ms + VALID_MS - 1)
    assert world.take() == []
    world.at(world.now_ms + 1)
    assert world.hand_over() == [("b", "m1")]


def test_a_session_that_comes_back_in_time_may_acknowledge_what_it_had() -> None:
    world = a_queue(max_inflight=1)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.leave("a", reason="disconnected")
    world.join("a")
    assert world.take() == []
    world.ack("a", "m1")
    assert world.hand_over() == [("a", "m2")]


def test_a_member_that_has_gone_is_forgotten_once_nothing_is_in_its_hands() -> None:
    world = a_queue(ack_timeout_s=3_600)
    world.join("a")
    world.join("b")
    world.publish("m1")
    world.hand_over()
    world.leave("b")
    world.leave("a", reason="disconnected")
    world.at(world.now_ms + VALID_MS)
    world.join("a", session=1)
    world.hand_over()
    world.at(world.now_ms + membership.FORGET_MS - VALID_MS)
    assert list(world.table("members")) == ["a"]
    world.leave("a")
    world.at(world.now_ms + 1)
    assert list(world.table("members")) == ["a"]
    world.at(world.now_ms + membership.FORGET_MS)
    assert world.table("members") == {}


def test_a_filter_that_is_none_is_a_dead_letter() -> None:
    world = a_queue()
    world.join("a", "queue/a#")
    world.join("a", "queue/#/x")
    assert len(world.dead_letters) == 2
    world.publish("m1", topic="queue/+")
    assert world.table("members") == {}


# -- what is too old, or too much


def test_an_expired_message_is_gone_for_everyone_but_its_holder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "SWEEP_ENTRIES_MAX", 1)
    for end in ("ack", "failure"):
        world = a_queue(expired_time=20, max_inflight=1)
        world.join("a")
        world.publish("m1", "m2", "m3")
        commands = world.take()
        world.sent(commands)
        world.at(world.now_ms + 20_000)
        assert world.stored("queue/a") == []
        world.publish("m4")
        assert world.take() == []
        if end == "ack":
            world.ack("a", "m1")
        else:
            world.join("a", session=2)
        assert world.taken() == [("a", "m4")]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_message_with_an_expiry_of_its_own_goes_then_and_is_counted_once(
    restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by reading: expiring by itself and by the rule in one tick, it was counted off twice."""
    monkeypatch.setattr(delivery, "READ_MIN", 1)
    world = a_queue(expired_time=20)
    world.publish("m1", expires_at=world.now_ms + 5_000)
    world.publish("m2", "m3")
    world.publish("late", expires_at=world.now_ms)
    if restarted:
        world.restart()
    world.now_ms += 25_000
    world.publish("m4")
    world.at(world.now_ms)
    assert world.stored("queue/a") == ["m4"]
    world.join("a")
    assert world.hand_over() == [("a", "m4")]
    world.ack("a", "m4")
    assert world.table("windows") == {}


def test_entries_of_somebody_else_are_swept_and_not_counted() -> None:
    """Found by reading: an emptied queue took what was in the index before its time for its own."""
    world = a_queue(expired_time=20)
    world.server.values[keys.message_index("queue/a")] = Zset({"old": 1})
    world.join("a")
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")]
    world.ack("a", "m1")
    world.at(world.now_ms + 20_000)
    assert keys.message_index("queue/a") not in world.server.values
    world.publish("m2")
    assert world.hand_over() == [("a", "m2")]


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_queue_that_is_too_long_drops_the_oldest(leased: bool, restarted: bool) -> None:
    world = a_queue(max_length=2, max_inflight=1)
    if leased:
        world.join("a")
    world.publish("m1", "m2")
    if restarted:
        world.restart()
    world.publish("m3", "m4")
    assert world.stored("queue/a") == ["m3", "m4"]
    if leased:
        assert set(world.hand_over()) == {("a", "m1")}
        world.ack("a", "m1")
        assert world.hand_over() == [("a", "m3")]


def test_a_queue_that_is_too_long_makes_dead_letters_where_the_rule_says_so() -> None:
    world = a_queue(max_length=1, overflow="dead_letter")
    world.publish("m1", "m2")
    assert world.stored("queue/a") == ["m2"]
    assert [dict(each.headers)["reason"] for each in world.dead_letters] == [
        b"the queue was longer than max_length"
    ]


def test_keep_latest_keeps_the_newest_message_of_each_topic() -> None:
    latest = given.a_rule(
        hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_keep_latest"
    )
    world = Delivering("queue", latest)
    world.publish("m1", "m2")
    world.publish("n1", topic="queue/b")
    world.join("a", "queue/#")
    assert sorted(world.hand_over()) == [("a", "m2"), ("a", "n1")]
    world.publish("m3")
    assert world.hand_over() == [("a", "m3")]
    world.ack("a", "m2", "m3")
    assert world.stored("queue/a") == []


def test_a_shorter_queue_by_new_rules_gets_there_a_piece_with_every_publish() -> None:
    world = a_queue()
    world.publish(*(f"m{number:02}" for number in range(20)))
    new_rules(world, given.queue(max_length=2))
    world.publish("n1")
    assert len(world.stored("queue/a")) == 13
    world.publish("n2", "n3")
    assert world.stored("queue/a") == ["n2", "n3"]


# -- new rules


def test_a_topic_that_is_no_queue_any_more_waits_until_it_is_one_again() -> None:
    world = a_queue()
    world.publish("m1", "m2")
    world.join("a")
    commands = world.take()
    new_rules(world, given.queue("queue/other"))
    world.sent(commands)
    world.fail(commands[1:], "stale")
    world.publish("ignored")
    world.join("b", "queue/other")
    assert world.take() == []
    new_rules(world, given.queue())
    world.at(world.now_ms + 3_600_000)
    assert world.hand_over() == [("a", "m2")]
    world.ack("a", "m1")
    assert world.stored("queue/a") == ["m2"]


def test_more_room_by_new_rules_is_used_at_once() -> None:
    world = a_queue(max_inflight=1)
    world.publish("m1", "m2")
    world.join("a")
    assert world.hand_over() == [("a", "m1")]
    new_rules(world, given.queue(max_inflight=2))
    assert world.hand_over() == [("a", "m2")]


def test_what_new_rules_make_too_old_does_not_block_what_is_behind_it() -> None:
    """Found by reading: it was not handed out, and no time was set for it to go."""
    world = a_queue()
    world.publish("m1")
    world.at(world.now_ms + 5_000)
    new_rules(world, given.queue(expired_time=5))
    world.publish("m2")
    world.join("a", "queue/+")
    assert world.hand_over() == [("a", "m2")]
    assert world.stored("queue/a") == ["m2"]


# -- what is kept besides


def test_a_retained_message_survives_its_ack_and_its_copy_in_the_queue() -> None:
    world = Delivering("queue", given.queue(), given.retain("queue/#", expired_time=60))
    world.join("a")
    world.publish("m1", retain=True)
    world.hand_over()
    world.ack("a", "m1")
    assert keys.message_body("m1") in world.server.values
    assert world.server.of(keys.retained("queue/a"), Zset).keys() == {"m1"}
    world.at(world.now_ms + 60_000)
    assert keys.message_body("m1") not in world.server.values


def test_receipts_are_kept_and_commands_run() -> None:
    world = Delivering(
        "queue", given.queue(), given.receipt(topic="queue/#"),
        given.receipt("message.delivered", "queue/#"), given.command("INCR seen:${msgid}"),
    )  # fmt: skip
    world.publish("m1", "m1")
    world.tell(given.acked("m1", "queue/a"), given.delivered("m1", "queue/a"))
    assert world.counted_once("m1")
    receipt: Any = world.server.values[keys.receipt("m1")]
    assert receipt.keys() == {"acked:sub", "delivered:sub"}


def test_another_agents_event_is_ignored() -> None:
    world = a_queue()
    assert world.driver.machine.step(9, NodeStarted(at=0, node="n"), 0, 0) == ()
    assert world.driver.machine.rules.canonical() == world.rules.canonical()


@pytest.mark.parametrize("foreign", [keys.message_body("m1"), keys.message_index("queue/a")])
@pytest.mark.parametrize("leased", [False, True])
def test_a_message_that_the_store_refused_is_the_queues_no_longer(
    foreign: str, leased: bool
) -> None:
    world = a_queue()
    world.server.values[foreign] = b"somebody else's"
    if leased:
        world.join("a")
    world.publish("m1")
    world.publish("m2", topic="queue/b")
    world.tick(world.now_ms + 1)
    assert world.server.values[foreign] == b"somebody else's"
    assert len(world.dead_letters) == 1
    counters = world.driver.machine.partition_state()["delivery"]
    assert (counters["waiting"], counters["unconfirmed"]) == (1, int(leased))
    world.at(world.now_ms + 3_600_000)
    world.take()
    world.join("b")
    assert world.take() == []


def test_a_member_that_the_store_tells_of_twice_is_one() -> None:
    world = a_queue()
    world.join("a")
    held = Members()
    for _ in range(2):
        held.supply_all(world.table("members"))
    assert [name for name, _ in held.of_client("a")] == ["a"]


# -- wildcards that a rule ignores


def test_a_wildcard_that_the_rule_ignores_gets_nothing_and_empties_no_queue() -> None:
    world = a_queue(wildcards="ignore")
    world.publish("m1")
    world.join("explorer", "#", qos=0)
    world.publish("m2")
    for _ in range(3):
        world.tick()
    assert world.taken() == []
    world.join("a", "queue/a")
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]
    world.publish("m3")
    assert world.hand_over() == [("a", "m3")]


def test_a_group_is_served_by_a_wildcard_that_the_rule_ignores() -> None:
    world = a_queue(wildcards="ignore")
    world.publish("m1")
    world.join("a", "$share/g/queue/#")
    world.publish("m2")
    world.tick()
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]


def test_of_two_filters_only_the_one_that_is_served_counts() -> None:
    world = a_queue(wildcards="ignore")
    world.join("a", "queue/a", qos=1)
    world.join("a", "queue/#", qos=2)
    world.publish("m1", qos=2)
    assert [each.qos for each in world.take()] == [1]


def test_one_wildcard_may_be_served_by_one_rule_and_ignored_by_another() -> None:
    world = Delivering("queue", given.queue("queue/#", wildcards="ignore"), given.queue("open/#"))
    world.publish("m1")
    world.publish("m2", topic="open/a")
    world.join("a", "#")
    for _ in range(3):
        world.tick()
    world.publish("m3")
    world.publish("m4", topic="open/a")
    assert world.hand_over() == [("a", "m2"), ("a", "m4")]


def test_new_rules_decide_at_once_whether_a_wildcard_is_served() -> None:
    world = a_queue()
    world.join("a", "queue/#")
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")]
    new_rules(world, given.queue(wildcards="ignore"))
    world.publish("m2")
    world.tick()
    assert world.take() == []
    new_rules(world, given.queue())
    for _ in range(3):
        world.tick()
    world.publish("m3")
    assert world.hand_over() == [("a", "m2"), ("a", "m3")]
