"""The table of read offsets: where a subscriber begins, what moves it, what it is shown as. See `test_pubsub_machine.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from millpond.agents.delivery import leasing
from millpond.agents.effects import Refusal
from millpond.agents.pubsub.machine import PubsubMachine
from millpond.agents.pubsub.state import Reader, unpack_reader, unpack_subscriber
from millpond.pipeline.stores.memory.server import Hash
from millpond.schemas import keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S
from millpond.schemas.events import DeliveriesSent, RulesChanged, Sent
from tests.simulation import pubsub_judge as judge
from tests.support import given
from tests.support.delivery import AT
from tests.support.partition import run
from tests.unit.agents.pubsub.test_machine import ACK_TIMEOUT_MS, TOPIC, Pubsub

SHARED = f"$share/g/{TOPIC}"


def reader(world: Pubsub, key: str = f"a\0{TOPIC}") -> Reader:
    return judge.readers(world.server)[key]


def read_all(world: Pubsub, client: str = "a") -> list[str]:
    """All that a client is handed, acknowledged at once."""
    got = []
    while new := world.hand_over():
        got += [name for whose, name in new if whose == client]
        for whose, name in new:
            world.ack(whose, name)
    return got


def test_changing_the_view_of_an_offset_changes_nothing() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.ack("a", "m1")
    world.server.keep(keys.read_offset("a", TOPIC), b"m2")
    world.leave("a", TOPIC, "disconnected")
    world.at(world.now_ms + 61_000)
    world.restart()
    world.join("a")
    assert world.hand_over() == [("a", "m2")]
    world.ack("a", "m2")
    assert world.shown("a") == "m2"


@pytest.mark.parametrize(("subscribed", "first"), [(-1, "m1"), (0, "m1"), (1, "m2"), (2, "m3")])
def test_latest_skips_nothing_that_is_published_after_the_subscription(
    subscribed: int, first: str
) -> None:
    world = Pubsub(start="latest")
    start = world.now_ms
    for name in ("m1", "m2", "m3"):
        world.publish(name)
        world.now_ms += 1
    world.join("a", subscribed_at=start + subscribed)
    assert read_all(world)[0] == first


def test_latest_passes_nothing_that_is_published_after_the_join_though_the_clients_clock_is_ahead() -> (
    None
):
    world = Pubsub(start="latest")
    world.publish("m1")
    world.join("a", subscribed_at=world.now_ms + 5_000)
    world.leave("a", TOPIC, "disconnected")
    world.restart()
    world.publish("m2", "m3")
    world.restart()
    world.join("a", subscribed_at=world.now_ms + 5_000)
    assert read_all(world) == ["m2", "m3"]


def test_latest_without_a_time_of_subscription_begins_at_the_join() -> None:
    world = Pubsub(start="latest")
    world.publish("m1")
    world.join("a")
    world.publish("m2")
    assert read_all(world) == ["m2"]


def test_who_is_known_reads_on_whatever_the_rule_says_of_new_ones() -> None:
    world = Pubsub(start="latest")
    world.join("a", subscribed_at=world.now_ms)
    world.leave("a", TOPIC, "disconnected")
    world.publish("m1")
    world.now_ms += 10
    world.join("a", session=2, subscribed_at=world.now_ms)
    assert read_all(world) == ["m1"]


def test_a_topic_born_while_a_wildcard_subscriber_was_away_starts_at_its_beginning() -> None:
    world = Pubsub(start="latest")
    world.join("a", "pubsub/#", subscribed_at=world.now_ms)
    world.leave("a", "pubsub/#", "disconnected")
    world.now_ms += 10
    world.publish("m1", "m2")
    world.now_ms += 10
    world.join("a", "pubsub/#", subscribed_at=world.now_ms)
    assert read_all(world) == ["m1", "m2"]


def test_several_filters_of_one_client_are_one_reader() -> None:
    world = Pubsub()
    for topic_filter in (TOPIC, "pubsub/+", "#"):
        world.join("a", topic_filter)
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")]
    assert list(judge.readers(world.server)) == [f"a\0{TOPIC}"]


def test_a_groups_offset_survives_all_of_its_members() -> None:
    world = Pubsub()
    world.publish("m1", "m2")
    world.join("a", SHARED)
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", SHARED)
    world.join("b", SHARED)
    assert world.hand_over() == [("b", "m2")]
    world.ack("b", "m2")
    assert world.shown(SHARED) == "m2"


def test_a_client_that_is_in_a_group_too_gets_a_copy_for_each_and_acknowledges_each() -> None:
    world = Pubsub()
    world.join("a")
    world.join("a", SHARED)
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")] * 2
    world.ack("a", "m1")
    assert (world.shown("a"), world.shown(SHARED)) == ("m1", None)
    world.ack("a", "m1")
    assert world.shown(SHARED) == "m1"


def test_nobody_acknowledges_for_somebody_else() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.ack("b", "m1")
    world.ack("a", "other")
    assert world.shown("a") is None


def test_the_window_of_a_subscriber_is_its_own() -> None:
    world = Pubsub(max_inflight=2)
    world.join("a")
    world.join("b")
    world.publish("m1", "m2", "m3")
    assert world.hand_over() == [("a", "m1"), ("b", "m1"), ("a", "m2"), ("b", "m2")]
    world.ack("a", "m2")
    assert world.hand_over() == [("a", "m3")]


def test_a_copy_of_qos_0_is_acknowledged_by_being_sent() -> None:
    world = Pubsub()
    world.join("a", qos=0)
    world.publish("m1")
    world.hand_over()
    assert world.shown("a") == "m1"


def test_a_publish_of_qos_0_is_handed_once_to_those_with_room_and_not_stored() -> None:
    world = Pubsub(max_inflight=1)
    for client in "abc":
        world.join(client)
    world.leave("c", TOPIC, "disconnected")
    world.publish("m1")
    world.ack("b", "m1")
    commands = world.take()
    world.sent(commands)
    world.ack("b", "m1")
    world.publish("q", qos=0)
    assert [(each.client_id, each.lease) for each in world.take()] == [("b", "")]
    assert world.stored(TOPIC) == ["m1"]
    world.publish("r", qos=0, topic="other")
    assert world.take() == []


def test_a_message_is_known_by_the_id_that_the_broker_gave_the_copy() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1")
    world.sent(world.take(), alias="copy-")
    world.ack("a", "copy-m1")
    assert world.shown("a") == "m1"


def test_what_has_come_back_may_still_be_acknowledged() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.leave("a", TOPIC, "disconnected")
    world.at(world.now_ms + 61_000)
    assert [each.message_id for each in reader(world).returned] == ["m1"]
    world.ack("a", "m1")
    assert world.shown("a") == "m1"


def test_a_member_that_was_not_reached_rests_and_nobody_else_does() -> None:
    world = Pubsub()
    world.join("a")
    world.join("b")
    world.publish("m1")
    world.fail([each for each in world.take() if each.client_id == "a"], "no_client")
    world.publish("m2")
    assert world.hand_over() == [("b", "m2")]
    world.at(world.now_ms + leasing.REST_MS)
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]


def test_what_is_gone_from_the_store_is_passed() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1", "m2")
    first, second = world.take()
    world.fail([first], "gone")
    world.sent([second])
    world.ack("a", "m2")
    assert world.shown("a") == "m2"


def test_too_much_under_way_pauses_and_goes_on_also_where_nobody_was_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leasing, "UNCONFIRMED_MAX", 2)
    world = Pubsub()
    for number in range(3):
        world.publish(f"m{number}", topic=f"pubsub/{number}")
    world.join("a", "pubsub/0")
    world.join("b", "pubsub/1")
    world.join("w", "pubsub/+")  # goes through all there is, and has to stop at once
    commands = world.take()
    assert len(commands) == 2
    world.publish("q", qos=0, topic="pubsub/0")
    assert world.take() == []
    world.sent(commands)
    assert world.hand_over() == [("w", "m0"), ("w", "m1")]
    assert world.hand_over() == [("w", "m2")]


def test_a_stray_report_changes_nothing() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1")
    (command,) = world.take()
    before = reader(world)
    for lease, client, name in (
        (command.lease, "b", "m1"), (command.lease, "a", "m2"), ("pubsub/0/99", "a", "m1"),
    ):  # fmt: skip
        world.tell(DeliveriesSent(**AT, agent="pubsub", sent=(Sent(lease, client, name),)))
    assert reader(world) == before


def test_new_rules_are_for_what_waits_too() -> None:
    world = Pubsub(max_inflight=1)
    world.join("a")
    world.publish("m1", "m2")
    assert world.hand_over() == [("a", "m1")]
    world.rules = given.rules(given.pubsub(max_inflight=2))
    world.restart()
    assert world.hand_over() == [("a", "m2")]


def test_messages_that_new_rules_make_too_old_do_not_stand_in_the_way() -> None:
    world = Pubsub(max_inflight=1)
    world.join("a")
    world.publish("m1", "m2")
    world.now_ms += 10_000
    rules = given.rules(given.pubsub(max_inflight=1, expired_time=5)).canonical()
    world.tell(RulesChanged(**AT, agent="pubsub", rules=rules))
    world.publish("m3")
    (command,) = world.take()
    world.sent([command])
    world.ack("a", "m1")
    assert world.hand_over() == [("a", "m3")]
    assert world.stored(TOPIC) == ["m3"]


def test_what_is_not_pubsub_any_more_is_delivered_no_more() -> None:
    world = Pubsub()
    world.join("a")
    rules = given.rules(given.pubsub("other/#")).canonical()
    world.tell(RulesChanged(**AT, agent="pubsub", rules=rules))
    machine = world.driver.machine
    assert isinstance(machine, PubsubMachine)
    world.publish("m1")
    assert world.take() == []
    event = given.published("q", TOPIC, qos=0)
    assert not any(machine.step(99, event, world.now_ms, 99 * 10**9))


def test_a_topic_that_is_none_is_a_dead_letter() -> None:
    world = Pubsub()
    world.tell(given.published("m1", "pubsub/+"))
    assert len(world.dead_letters) == 1


def test_commands_receipts_and_retained_messages_are_kept_like_everywhere() -> None:
    world = Pubsub()
    world.rules = given.rules(
        given.pubsub(), given.command("INCR seen:${msgid}"), given.receipt(), given.retain()
    )
    world.restart()
    world.join("a")
    world.publish("m1", retain=True)
    world.publish("m1", retain=True)
    world.hand_over()
    world.ack("a", "m1")
    assert world.counted_once("m1")
    assert world.server.of(keys.receipt("m1"), Hash) == {"acked:a": b"5"}
    assert keys.retained(TOPIC) in world.server.values


def test_a_foreign_key_in_the_place_of_a_message_is_passed() -> None:
    world = Pubsub()
    world.join("a")
    world.server.keep(keys.message_body("m1"), b"somebody else's")
    world.publish("m1", "m2")
    world.hand_over()
    assert world.stored(TOPIC) == ["m2"]
    assert judge.logs(world.server)[TOPIC].length == 1
    machine = world.driver.machine
    assert not machine.refused(given.acked("m1", TOPIC), Refusal(9, "receipt", ""))


@pytest.mark.parametrize(
    ("unpack", "packed"),
    [
        (unpack_reader, b'[0,[],{},"",null,false,5,"m1",[],1,0,5,[]]'),
        (unpack_subscriber, b'[{"pubsub/a":5},null,{}]'),
    ],
)
def test_a_state_of_the_format_before_is_refused_and_not_misread(
    unpack: Callable[[bytes], Any], packed: bytes
) -> None:
    with pytest.raises(msgspec.ValidationError):
        unpack(packed)


def test_a_restart_in_every_state_changes_nothing() -> None:
    world = Pubsub(max_inflight=2)
    world.join("a")
    world.join("b", "pubsub/+")
    world.publish("m1", "m2", "m3")
    world.restart()
    commands = world.take()
    world.sent(commands[:3])
    world.restart()
    world.ack("a", "m2")
    world.restart()
    world.leave("a", TOPIC, "disconnected")
    world.restart()
    world.at(world.now_ms + 61_000)
    world.take()
    world.restart()
    world.join("a")
    assert [name for client, name in world.taken() if client == "a"] == ["m1", "m3"]
    run(world.driver.close())


def test_what_a_client_of_a_group_has_in_hand_goes_to_another_when_no_bridge_delivers_it_any_more() -> (
    None
):
    world = Pubsub(max_inflight=1)
    for client in "ab":
        world.join(client, SHARED)
    world.publish("m1", "m2")
    world.hand_over()
    world.ack("b", "m2")
    world.leave("a", SHARED, "disconnected")
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert world.take() == []
    world.at(world.now_ms + COMMAND_VALID_FOR_S * 1000 - ACK_TIMEOUT_MS)
    assert world.hand_over() == [("b", "m1")]


def test_a_wildcard_that_the_rule_ignores_has_no_reader() -> None:
    world = Pubsub(wildcards="ignore")
    world.publish("m1")
    world.join("explorer", "#", qos=0)
    world.join("b", "$share/g/pubsub/#")
    for _ in range(3):
        world.tick()
    world.publish("m2")
    assert world.hand_over() == [("b", "m1"), ("b", "m2")]
    assert not [key for key in world.server.values if "mqtt:acked:explorer" in key]
    world.join("explorer")
    assert world.hand_over() == [("explorer", "m1"), ("explorer", "m2")]


def test_one_wildcard_may_be_served_by_one_pubsub_rule_and_ignored_by_another() -> None:
    world = Pubsub(wildcards="ignore")
    world.rules = given.rules(given.pubsub(wildcards="ignore"), given.pubsub("open/#"))
    world.restart()
    world.publish("m1")
    world.publish("m2", topic="open/a")
    world.join("a", "#")
    for _ in range(3):
        world.tick()
    world.publish("m3")
    world.publish("m4", topic="open/a")
    assert world.hand_over() == [("a", "m2"), ("a", "m4")]
    readers: Any = world.server.values[keys.index(world.partition, "readers")]
    assert list(readers) == ["a\0open/a"]
