"""The time for an acknowledgement starts when it is the consumer's turn: slow, frozen, late and absent consumers of a queue.

Each of the first tests is a case that was seen: what it counts was many times as much.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from millpond.agents.delivery import silence
from millpond.agents.delivery.members import Member
from millpond.schemas import keys
from millpond.schemas.commands import COMMAND_VALID_FOR_S, Deliver
from millpond.schemas.events import MembersActive
from tests.support import given
from tests.support.delivery import AT, Delivering
from tests.unit.agents.queue.test_machine import ACK_TIMEOUT_MS, a_queue
from tests.unit.agents.queue.test_members import new_rules

VALID_MS = COMMAND_VALID_FOR_S * 1000


class Consumer:
    """Works through its copies in order, `work_ms` for each, and acknowledges each; 0 is a frozen one."""

    def __init__(self, world: Delivering, client_id: str, work_ms: int) -> None:
        self.world, self.client_id, self.work_ms = world, client_id, work_ms
        self.copies: deque[Deliver] = deque()
        self.got: Counter[str] = Counter()
        self.done_at = 0

    def take(self, commands: Sequence[Deliver]) -> None:
        """What its broker has written to it."""
        if not self.copies:
            self.done_at = self.world.now_ms + self.work_ms
        mine = [each for each in commands if each.client_id == self.client_id]
        self.copies += mine
        self.got.update(each.message_id for each in mine)

    def work(self) -> None:
        """Acknowledge what is done by now."""
        while self.work_ms and self.copies and self.done_at <= self.world.now_ms:
            copy = self.copies.popleft()
            self.world.ack(self.client_id, copy.message_id, topic=copy.topic)
            self.done_at += self.work_ms


def consume(world: Delivering, for_ms: int, *consumers: Consumer, step_ms: int = 100) -> None:
    """The bridge hands over at once what it gets; the consumers work."""
    for _ in range(for_ms // step_ms):
        commands = world.take()
        if commands:
            world.sent(commands)
        for each in consumers:
            each.take(commands)
        for each in consumers:
            each.work()
        world.at(world.now_ms + step_ms)


def names(count: int) -> list[str]:
    return [f"m{number:03}" for number in range(count)]


def member(world: Delivering, name: str) -> Member:
    return msgspec.json.decode(world.table("members")[name], type=Member)


# -- slow


@pytest.mark.parametrize(
    ("work_ms", "count", "settings"),
    [(120, 300, {"ack_timeout_s": 3}), (200, 300, {"ack_timeout_s": 3}), (1_200, 100, {})],
)
def test_a_slow_consumer_that_acknowledges_each_message_gets_each_once(
    work_ms: int, count: int, settings: dict[str, Any]
) -> None:
    """Seen: 954 copies of 300, 1,229 with ten dead letters, 216 of 100."""
    world = a_queue(**settings)
    world.join("a")
    world.publish(*names(count))
    slow = Consumer(world, "a", work_ms)
    consume(world, work_ms * count + 2_000, slow)
    assert slow.got == Counter(names(count))
    assert world.stored("queue/a") == []
    assert world.table("dead") == {}


def test_a_slow_consumer_gets_each_message_once_beside_others_who_could_take_them() -> None:
    world = a_queue(ack_timeout_s=3)
    for client in ("a", "b"):
        world.join(client)
    world.publish(*names(60))
    slow, fast = Consumer(world, "a", 200), Consumer(world, "b", 10)
    consume(world, 20_000, slow, fast)
    assert slow.got + fast.got == Counter(names(60))


# -- frozen


def test_a_client_that_is_frozen_gets_each_message_once_and_makes_no_dead_letters() -> None:
    """Seen: ten messages in dead letters, of which it had acknowledged none."""
    world = a_queue(max_deliveries=2, max_inflight=5)
    world.join("a")
    world.publish(*names(10))
    frozen = Consumer(world, "a", 0)
    consume(world, 10 * ACK_TIMEOUT_MS, frozen, step_ms=10_000)
    assert frozen.got == Counter(names(5))
    assert world.table("dead") == {}
    assert world.stored("queue/a") == names(10)
    # When it goes on, all comes right
    frozen.work_ms = 100
    consume(world, 5_000, frozen)
    assert frozen.got == Counter(names(10))
    assert world.stored("queue/a") == []


def test_what_a_frozen_client_has_goes_to_another_once_and_its_room_stays_taken() -> None:
    world = a_queue(max_inflight=5)
    world.join("a")
    world.publish(*names(20))
    frozen, other = Consumer(world, "a", 0), Consumer(world, "b", 10)
    consume(world, 1_000, frozen)
    world.join("b")
    consume(world, 3 * ACK_TIMEOUT_MS, frozen, other, step_ms=1_000)
    assert frozen.got == Counter(names(5))
    assert other.got == Counter(names(20))
    assert world.stored("queue/a") == []
    assert len(member(world, "a").left) == 5
    world.publish("n1")
    assert world.hand_over() == [("b", "n1")]
    # When it acknowledges after all, there is room for as many
    world.ack("b", "n1")
    world.ack("a", *names(2))
    world.leave("b")
    world.publish("n2", "n3", "n4")
    assert world.hand_over() == [("a", "n2"), ("a", "n3")]


def test_what_nobody_has_room_for_stays_with_its_holder_until_somebody_has() -> None:
    world = a_queue(max_inflight=2)
    for client in ("a", "b"):
        world.join(client)
    world.publish(*names(8))
    assert len(world.hand_over()) == 4
    world.at(world.now_ms + 3 * ACK_TIMEOUT_MS)
    assert world.take() == []
    # Older than the backlog, they come first; the holder gets none of its own
    world.ack("b", "m001")
    assert world.hand_over() == [("b", "m000")]
    world.ack("b", "m000")
    assert world.hand_over() == [("b", "m002")]
    world.ack("a", "m000")
    assert world.hand_over() == [("a", "m004")]
    assert world.stored("queue/a") == names(8)[2:]


@pytest.mark.parametrize("topic_filter", ["queue/a", "queue/+", "$share/g/queue/a"])
def test_silent_leases_wait_for_who_joins(topic_filter: str) -> None:
    world = a_queue(max_inflight=3)
    world.join("a")
    world.publish(*names(5))
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b", topic_filter)
    assert world.hand_over() == [("b", name) for name in names(3)]


def test_a_client_does_not_take_over_from_itself() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("a", "$share/g/queue/a")
    world.publish("m2")
    assert {name for _, name in world.hand_over()} == {"m2"}


def test_a_holder_that_acknowledges_something_is_alive_again() -> None:
    world = a_queue(max_inflight=2)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.at(world.now_ms + 2 * ACK_TIMEOUT_MS)
    world.ack("a", "m1")
    world.join("b")
    assert world.take() == []
    world.at(world.now_ms + ACK_TIMEOUT_MS - 1)
    assert world.take() == []
    world.at(world.now_ms + 1)
    assert world.hand_over() == [("b", "m2")]


def test_a_message_that_returns_is_not_written_again_to_a_connection_that_has_it() -> None:
    world = a_queue(max_inflight=2)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b")
    assert world.hand_over() == [("b", "m1")]
    world.leave("b")
    assert world.take() == []
    world.leave("a", reason="disconnected")
    world.join("a")
    (again,) = world.take()
    assert (again.client_id, again.message_id, again.attempt) == ("a", "m1", 3)


def test_a_silent_message_that_was_delivered_too_often_is_dead_when_it_is_anothers_turn() -> None:
    world = a_queue(max_deliveries=1, max_inflight=1)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.at(world.now_ms + 5 * ACK_TIMEOUT_MS)
    assert world.table("dead") == {}
    world.join("b")
    assert list(world.table("dead")) == ["m1"]
    assert world.hand_over() == [("b", "m2")]
    # Its holder has done it after all
    world.ack("a", "m1")
    assert world.table("dead") == {}
    assert keys.message_body("m1") not in world.server.values
    world.requeue("m1")
    assert world.take() == []


def test_one_that_was_delivered_too_often_stays_where_it_is_if_its_holder_is_at_work_again() -> (
    None
):
    world = a_queue(max_deliveries=1, max_inflight=2)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.ack("a", "m2")
    world.join("b")
    world.at(world.now_ms + ACK_TIMEOUT_MS - 1)
    assert world.table("dead") == {}
    world.at(world.now_ms + 1)
    assert list(world.table("dead")) == ["m1"]


def test_one_that_was_delivered_too_often_stays_with_a_holder_that_is_said_to_be_active() -> None:
    world = a_queue(max_deliveries=1)
    world.join("a")
    world.join("c")
    world.publish("m1", "m2")
    world.hand_over()
    world.leave("c", reason="disconnected")
    world.at(world.now_ms + VALID_MS - 1)
    world.tell(MembersActive(**AT, agent="queue", client_ids=("a",)))
    world.at(world.now_ms + 1)
    assert list(world.table("dead")) == ["m2"]


def test_a_session_that_comes_back_when_no_rule_delivers_its_topic_keeps_its_copies() -> None:
    world = a_queue()
    world.join("a", "queue/+")
    world.publish("m1")
    world.hand_over()
    new_rules(world, given.queue("queue/other"))
    world.leave("a", "queue/+", "disconnected")
    world.join("a", "queue/+")
    world.at(world.now_ms + 2 * VALID_MS)
    new_rules(world, given.queue())
    assert world.take() == []
    world.ack("a", "m1")
    assert world.stored("queue/a") == []


def test_a_silent_message_that_is_superseded_is_its_holders_alone() -> None:
    world = a_queue(max_inflight=1, max_length=1)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.publish("m2")
    world.join("b")
    assert world.hand_over() == [("b", "m2")]
    assert list(world.table("windows")) == ["queue/a"]
    world.ack("b", "m2")
    world.ack("a", "m1")
    world.publish("m3")
    assert len(world.hand_over()) == 1


def test_a_copy_that_its_broker_lost_after_its_message_was_done_makes_room() -> None:
    world = a_queue(max_inflight=1)
    world.join("a")
    world.publish("m1")
    copies = world.take()
    world.sent(copies)
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b")
    world.hand_over()
    world.ack("b", "m1")
    world.leave("b")
    world.publish("m2")
    assert world.take() == []
    world.fail(copies, "stale")
    world.fail(copies, "stale")
    assert world.hand_over() == [("a", "m2")]


def test_whoever_acknowledges_first_the_other_still_has_a_copy() -> None:
    world = a_queue(max_inflight=1)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b")
    world.hand_over()
    world.ack("a", "m1")
    assert world.stored("queue/a") == []
    world.publish("m2", "m3")
    assert world.hand_over() == [("a", "m2")]
    world.ack("b", "m1")
    assert world.hand_over() == [("b", "m3")]


@pytest.mark.parametrize("qos", [0, 1])
def test_a_copy_whose_message_is_done_before_it_is_sent_takes_its_room(qos: int) -> None:
    """Found by the worlds of consumers: who had it before acknowledged it, and the other got one too many."""
    world = a_queue(max_inflight=1)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b", qos=qos)
    under_way = world.take()
    world.ack("a", "m1")
    world.leave("a")
    world.publish("m2")
    assert world.take() == []
    world.sent(under_way, "x")
    if qos:
        assert world.take() == []
        world.sent(under_way, "y")
        world.ack("b", "xm1")
    assert world.hand_over() == [("b", "m2")]
    assert member(world, "b").unconfirmed == 0


def test_the_state_of_silent_leases_and_left_copies_survives_a_restart() -> None:
    world = a_queue(max_inflight=2)
    world.join("a")
    world.publish("m1", "m2", "m3")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b")
    assert world.hand_over() == [("b", "m1"), ("b", "m2")]
    world.ack("b", "m1")
    assert world.hand_over() == [("b", "m3")]
    world.restart()
    world.take()
    assert len(member(world, "a").left) == 2
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.restart()
    world.join("c")
    assert world.hand_over() == [("c", "m2"), ("c", "m3")]


# -- active, as a bridge says


def test_a_client_that_works_on_copies_of_another_partition_is_said_to_be_active() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.join("b")
    for _ in range(3):
        world.at(world.now_ms + ACK_TIMEOUT_MS - 1)
        world.tell(MembersActive(**AT, agent="queue", client_ids=("a", "b", "stranger")))
    assert world.take() == []
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert world.hand_over() == [("b", "m1")]


# -- late


@pytest.mark.parametrize("alias", [None, "copy of "])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_late_acknowledgement_takes_the_dead_letter_back(
    alias: str | None, *, restarted: bool
) -> None:
    """Seen: the dead letter stayed, and `requeue` did the job twice."""
    world = a_queue(max_deliveries=1)
    world.join("a")
    world.publish("m1", "m2")
    world.sent(world.take(), alias)
    world.leave("a", reason="disconnected")
    world.at(world.now_ms + VALID_MS)
    assert sorted(world.table("dead")) == ["m1", "m2"]
    if restarted:
        world.restart()
    world.ack("b", f"{alias or ''}m1")
    world.ack("a", f"{alias or ''}m1", topic="queue/other")
    assert sorted(world.table("dead")) == ["m1", "m2"]
    world.ack("a", f"{alias or ''}m1")
    assert list(world.table("dead")) == ["m2"]
    assert keys.message_body("m1") not in world.server.values
    world.requeue("m1")
    world.drop("m2")
    assert world.table("dead") == {}
    assert world.table("aliases") == {}
    assert world.stored("queue/a") == []


def test_who_had_a_message_that_is_dead_by_overflow_may_still_have_done_it() -> None:
    world = a_queue(max_length=1, overflow="dead_letter")
    world.join("a")
    world.publish("m1", "m2")
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]
    assert list(world.table("dead")) == ["m1"]
    world.ack("a", "m1")
    assert world.table("dead") == {}
    assert keys.message_body("m1") not in world.server.values


# -- away


def test_what_an_offline_client_has_in_hand_stays_while_a_bridge_may_deliver_it() -> None:
    """Seen: after 29 s, and again after 39 s, another client did the job a second time."""
    world = a_queue()
    world.join("a")
    world.publish("m1")
    copies = world.take()
    leased_at = world.now_ms
    assert copies[0].valid_until == leased_at + VALID_MS
    world.at(leased_at + 9_000)
    world.leave("a", reason="disconnected")
    world.sent(copies)  # told late
    world.join("b")
    for after_ms in (29_000, 39_000, VALID_MS - 1):
        world.at(leased_at + after_ms)
        assert world.take() == []
    world.at(leased_at + VALID_MS)
    assert world.hand_over() == [("b", "m1")]


def test_a_session_that_comes_back_keeps_its_copies_and_their_clock_starts_again() -> None:
    world = a_queue()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + 20_000)
    world.leave("a", reason="disconnected")
    world.at(world.now_ms + 20_000)
    world.join("a")
    world.join("b")
    world.at(world.now_ms + ACK_TIMEOUT_MS - 1)
    assert world.take() == []
    world.at(world.now_ms + 1)
    assert world.hand_over() == [("b", "m1")]


def test_a_session_that_was_away_for_longer_gets_its_messages_over_the_new_connection() -> None:
    world = a_queue(ack_timeout_s=600)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + VALID_MS)
    world.leave_unticked("a", reason="disconnected")
    world.join("a")
    (again,) = world.take()
    assert (again.message_id, again.attempt) == ("m1", 2)


def test_what_an_offline_client_has_in_hand_and_another_has_done_takes_no_room() -> None:
    """Found by the properties: it was remembered for a member that was to be forgotten."""
    world = a_queue(max_inflight=1)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    world.join("b")
    world.hand_over()
    world.leave("b", reason="disconnected")
    world.ack("a", "m1")
    assert not member(world, "b").in_hand
    world.leave("a")
    world.join("b")
    world.publish("m2")
    assert world.hand_over() == [("b", "m2")]


def test_a_client_that_only_gives_up_its_filter_may_end_its_work() -> None:
    world = a_queue(ack_timeout_s=120)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.at(world.now_ms + VALID_MS)
    world.leave("a", reason="unsubscribed")
    world.join("b")
    world.at(world.now_ms + 100_000)
    world.ack("a", "m1")
    world.at(world.now_ms + 120_000 - 1)
    assert world.take() == []
    world.at(world.now_ms + 1)
    assert world.hand_over() == [("b", "m2")]


def test_an_acknowledgement_that_is_told_after_its_client_went_offline_is_no_sign_of_life() -> None:
    world = a_queue(ack_timeout_s=120)
    world.join("a")
    world.publish("m1", "m2")
    world.hand_over()
    world.leave("a", reason="disconnected")
    world.join("b")
    world.ack("a", "m1")
    world.at(world.now_ms + VALID_MS)
    assert world.hand_over() == [("b", "m2")]


# -- brokers that drop copies from a queue of their own


def test_where_a_broker_may_drop_copies_one_that_a_later_one_overtook_is_sent_again() -> None:
    world = a_queue(max_deliveries=2)
    world.join("a")
    world.publish("m1", "m2", "m3")
    world.sent(world.take(), "x")
    world.at(world.now_ms + 20_000)
    world.ack("a", "xm2")
    world.at(world.now_ms + VALID_MS - 20_000)
    assert world.take() == []
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    (again,) = world.take()
    assert (again.client_id, again.message_id, again.attempt) == ("a", "m1", 1)
    world.sent([again], "y")
    world.ack("a", "ym1")
    assert world.stored("queue/a") == ["m3"]
    assert world.table("dead") == {}


def test_where_a_broker_may_drop_copies_a_silent_tail_is_probed_more_and_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silence, "PROBE_MS_MAX", 8 * ACK_TIMEOUT_MS)
    world = a_queue(max_deliveries=2)
    world.join("a")
    world.publish("m1", "m2", "m3")
    world.sent(world.take(), "x")
    probes = []
    for second in range(1, 1_800):
        world.at(world.now_ms + 1_000)
        commands = world.take()
        if commands:
            assert [(each.message_id, each.attempt) for each in commands] == [("m1", 1)]
            world.sent(commands, f"{second} ")
            probes.append(second)
    pauses = [after - before for before, after in pairwise(probes)]
    assert probes[0] == 61
    assert pauses == sorted(pauses)
    assert pauses[-1] == 8 * 30 + 30
    assert len(probes) <= 12
    # When the probe is acknowledged, all that was dropped comes again
    world.ack("a", f"{probes[-1]} m1")
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert world.hand_over() == [("a", "m2"), ("a", "m3")]
    assert world.table("dead") == {}


def test_where_a_broker_may_drop_copies_one_that_is_stored_no_more_does_not_take_room_for_ever() -> (
    None
):
    world = a_queue(max_length=1, max_inflight=1)
    world.join("a")
    world.publish("m1")
    world.sent(world.take(), "x")
    world.publish("m2")
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert world.take() == []
    world.at(world.now_ms + VALID_MS)
    assert world.hand_over() == [("a", "m2")]
