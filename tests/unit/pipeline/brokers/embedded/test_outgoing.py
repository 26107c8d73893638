"""What one MQTT session has yet to get: order, room, packet ids, and what a new connection sends again."""

from __future__ import annotations

import random
from typing import Any

import pytest

from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.embedded import outgoing as module
from millpond.pipeline.brokers.embedded.outgoing import (
    AWAY_BYTES_MAX,
    AWAY_MAX,
    DELIVERY_WINDOW,
    IN_FLIGHT_BYTES_MAX,
    Expired,
    Outgoing,
    OutgoingChange,
    OutgoingCopy,
    OutgoingMessage,
    Release,
)
from millpond.schemas.commands import Subscribe

NOW_MS = 1_000


def a_pending_command(valid_until_ms: int = NOW_MS) -> PendingCommand:
    return PendingCommand("c", None, 0, "m", valid_until_ms, lambda: None, lambda: False)


def a_copy(name: str = "m", qos: int = 1, payload: bytes = b"", **fields: Any) -> OutgoingCopy:
    """A commanded one."""
    values = {"pending": a_pending_command(), **fields}
    return OutgoingCopy(OutgoingMessage(name, "t", None), payload, qos, retain=False, **values)


def routed(name: str = "r", qos: int = 1, payload: bytes = b"") -> OutgoingCopy:
    return a_copy(name, qos, payload, pending=None)


def a_change() -> OutgoingChange:
    return OutgoingChange(a_pending_command(), Subscribe(client_id="c", topic_filters=(("f", 1),)))


def send_all(out: Outgoing) -> list[OutgoingCopy]:
    """What goes now, launched unless it was before."""
    went = []
    while (step := out.next(NOW_MS)) is not None:
        if isinstance(step, OutgoingCopy):
            if not step.packet_id:
                out.launch(step)
            went.append(step)
    return went


def put(out: Outgoing, *copies: OutgoingCopy) -> list[OutgoingCopy]:
    for copy in copies:
        out.put(copy)
    return [*copies]


def test_copies_go_in_order_with_packet_ids_of_their_own() -> None:
    out = Outgoing()
    copies = put(out, a_copy(), a_copy(qos=0), a_copy(qos=2))
    assert send_all(out) == copies
    assert [copy.packet_id for copy in copies] == [1, 0, 2]
    assert [copy.packet()[0] >> 4 for copy in copies] == [3, 3, 3]


def test_whoever_sends_is_woken_when_there_may_be_more() -> None:
    out, woken = Outgoing(), []
    out.wake = lambda: woken.append(len(woken))
    (one,) = put(out, a_copy(qos=2))
    send_all(out)
    out.pubrec(one.packet_id)
    out.entered(one)
    assert len(woken) == 2
    out.pubcomp(one.packet_id)
    assert len(woken) == 3
    out.keep(routed())
    assert len(woken) == 4


@pytest.mark.parametrize("lane", [a_copy, routed])
def test_no_more_than_the_window_is_in_flight_and_what_needs_no_room_keeps_its_place(
    lane: Any,
) -> None:
    out = Outgoing()
    copies = put(out, *(lane() for _ in range(DELIVERY_WINDOW)), lane(), lane(qos=0), lane())
    assert send_all(out) == copies[:DELIVERY_WINDOW]
    # An acknowledgement makes room when it is on its way to Kafka
    assert out.puback(copies[7].packet_id) is copies[7]
    assert send_all(out) == []
    out.entered(copies[7])
    assert send_all(out) == copies[DELIVERY_WINDOW : DELIVERY_WINDOW + 2]


def test_a_qos_2_copy_holds_its_room_until_pubcomp_and_until_its_ack_is_entered() -> None:
    for entered_first in (True, False):
        out = Outgoing()
        first = a_copy(qos=2)
        copies = put(out, first, *(a_copy() for _ in range(DELIVERY_WINDOW)))
        send_all(out)
        assert out.pubrec(first.packet_id) is first
        assert out.next(NOW_MS) == Release(first.packet_id)
        if entered_first:
            out.entered(first)
        else:
            out.pubcomp(first.packet_id)
        assert send_all(out) == []
        if entered_first:
            out.pubcomp(first.packet_id)
        else:
            out.entered(first)
        assert send_all(out) == copies[-1:]


def test_bytes_in_flight_are_bounded_but_one_copy_always_goes() -> None:
    out = Outgoing()
    large = bytes(IN_FLIGHT_BYTES_MAX)
    first, second = put(out, a_copy(payload=large), a_copy(payload=large))
    assert send_all(out) == [first]
    out.puback(first.packet_id)
    out.entered(first)
    assert send_all(out) == [second]


def test_commands_and_routed_messages_do_not_wait_for_each_other() -> None:
    out = Outgoing()
    full = put(out, *(a_copy() for _ in range(DELIVERY_WINDOW + 1)))
    others = put(out, *(routed() for _ in range(3)))
    went = send_all(out)
    assert went[:6] == [full[0], others[0], full[1], others[1], full[2], others[2]]
    assert len(went) == DELIVERY_WINDOW + 3
    assert len({copy.packet_id for copy in went}) == len(went)


def test_a_change_waits_for_its_turn_and_needs_no_room() -> None:
    out, change = Outgoing(), a_change()
    copies = put(out, *(a_copy() for _ in range(DELIVERY_WINDOW)))
    out.put(change)
    for copy in copies:
        assert out.next(NOW_MS) is copy
        out.launch(copy)
    assert out.next(NOW_MS) is change
    assert out.next(NOW_MS) is None
    out.put_back(change)
    assert out.next(NOW_MS) is change


def test_what_could_not_be_written_goes_first_next_time() -> None:
    out = Outgoing()
    first, second = put(out, a_copy(), a_copy())
    assert out.next(NOW_MS) is first
    out.launch(first)
    out.recall(first)
    out.put_back(first)
    assert not out.is_open(first)
    assert send_all(out) == [first, second]
    zero = a_copy(qos=0)
    out.launch(zero)
    out.recall(zero)
    assert zero.packet_id == 0


@pytest.mark.parametrize(("qos", "ack"), [(1, "pubrec"), (2, "puback")])
def test_an_acknowledgement_of_the_wrong_kind_or_of_nothing_is_none(qos: int, ack: str) -> None:
    out = Outgoing()
    (copy,) = put(out, a_copy(qos=qos))
    send_all(out)
    assert getattr(out, ack)(copy.packet_id) is None
    assert out.is_open(copy)
    assert out.puback(99) is None
    out.pubcomp(99)


def test_a_pubrec_of_nothing_is_answered_so_that_the_client_lets_go_of_the_id() -> None:
    out = Outgoing()
    assert out.pubrec(7) is None
    assert out.pubrec(7) is None
    assert out.next(NOW_MS) == Release(7)
    assert out.next(NOW_MS) is None


def test_packet_ids_in_use_are_passed_over_and_65_535_is_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PACKET_ID_MAX", 5)
    out = Outgoing()
    copies = put(out, *(a_copy() for _ in range(3)), a_copy(qos=2))
    send_all(out)
    out.puback(2)
    out.pubrec(4)
    more = put(out, a_copy(), a_copy())
    send_all(out)
    assert [copy.packet_id for copy in copies + more] == [1, 2, 3, 4, 5, 2]


def test_a_new_connection_sends_again_what_is_not_acknowledged_first_and_in_order() -> None:
    out = Outgoing()
    one, two, three, other = put(out, a_copy(), a_copy(qos=2), a_copy(qos=2), routed())
    sent = {copy.packet_id for copy in send_all(out)}
    ids = [one.packet_id, two.packet_id, three.packet_id, other.packet_id]
    out.pubrec(two.packet_id)
    assert out.next(NOW_MS) == Release(two.packet_id)
    out.withdraw()
    (new,) = put(out, a_copy())
    out.resume()
    assert out.next(NOW_MS) == Release(two.packet_id)
    again = send_all(out)
    assert set(again) == {one, three, other, new}
    assert again[-1] is new
    assert [copy.packet_id for copy in (one, two, three, other)] == ids
    assert [copy.packet()[0] >> 3 & 1 for copy in again] == [1, 1, 1, 0]
    assert new.packet_id not in sent


def test_what_is_acknowledged_before_it_is_sent_again_is_not() -> None:
    out = Outgoing()
    one, two = put(out, a_copy(), a_copy())
    send_all(out)
    out.resume()
    assert out.puback(one.packet_id) is one
    assert send_all(out) == [two]


@pytest.mark.parametrize("qos", [1, 2])
def test_a_copy_past_its_validity_is_not_sent_again_and_gives_its_room_back(qos: int) -> None:
    out = Outgoing()
    copies = put(out, *(a_copy(qos=qos) for _ in range(DELIVERY_WINDOW + 1)))
    send_all(out)
    out.resume()
    late = NOW_MS + 1
    assert out.next(NOW_MS) is copies[0]
    expired = [out.next(late) for _ in copies[1:-1]]
    assert [step.pending for step in expired if isinstance(step, Expired)] == [
        copy.pending for copy in copies[1:-1]
    ]
    assert out.next(late) is copies[-1]
    out.launch(copies[-1])
    assert not out.is_open(copies[1])
    assert out.is_open(copies[0])


def test_a_dropped_qos_2_packet_id_is_not_used_again_before_the_client_lets_go_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PACKET_ID_MAX", 4)
    monkeypatch.setattr(module, "BURNT_IDS_MAX", 2)
    out = Outgoing()
    put(out, *(a_copy(qos=2) for _ in range(3)))
    send_all(out)
    out.resume()
    assert all(isinstance(out.next(NOW_MS + 1), Expired) for _ in range(3))  # two are remembered
    assert out.next(NOW_MS + 1) is None
    again = put(out, a_copy(), a_copy())
    send_all(out)
    assert [copy.packet_id for copy in again] == [4, 1]
    assert out.pubrec(2) is None
    (one,) = put(out, a_copy())
    send_all(out)
    assert one.packet_id == 2


def test_at_the_end_of_a_connection_commands_are_given_back_and_routed_messages_kept() -> None:
    out = Outgoing()
    copies = put(out, *(a_copy() for _ in range(DELIVERY_WINDOW + 2)))
    kept = put(out, *(routed() for _ in range(DELIVERY_WINDOW + AWAY_MAX + 5)))
    change = a_change()
    out.put(change)
    send_all(out)
    assert out.withdraw() == [*copies[DELIVERY_WINDOW:], change]
    assert out.ordered.waiting_bytes == 0
    out.resume()
    again = send_all(out)
    assert len(again) == 2 * DELIVERY_WINDOW
    assert [*out.routed.waiting] == kept[-AWAY_MAX:]


def test_what_is_kept_for_a_client_that_is_away_is_bounded_and_the_oldest_go() -> None:
    out = Outgoing()
    copies = [routed(payload=b"") for _ in range(AWAY_MAX + 3)]
    for copy in copies:
        out.keep(copy)
    assert [*out.routed.waiting] == copies[3:]
    large = [routed(payload=bytes(AWAY_BYTES_MAX // 3)) for _ in range(4)]
    for copy in large:
        out.keep(copy)
    assert [*out.routed.waiting] == large[-2:]


def test_commands_that_wait_in_vain_go_and_the_others_keep_their_order() -> None:
    out = Outgoing()
    waiting = put(out, *(a_copy(pending=a_pending_command(number)) for number in range(5)))
    asked: list[int] = []

    def stale(pending: PendingCommand) -> bool:
        asked.append(pending.valid_until_ms)
        return pending.valid_until_ms in {1, 3}

    out.drop_stale(stale)
    assert asked == [*range(5)]
    assert [*out.ordered.waiting] == [waiting[0], waiting[2], waiting[4]]
    assert out.ordered.waiting_bytes == 3 * waiting[0].size
    woken: list[bool] = []
    out.wake = lambda: woken.append(True)
    out.drop_stale(lambda _: True)
    assert woken
    assert not out.ordered.waiting


class World:
    """A session and a client that does anything, with little room and few packet ids."""

    def __init__(self, seed: int) -> None:
        self.chance, self.out = random.Random(seed), Outgoing()
        self.put_in: dict[bool, list[OutgoingCopy]] = {
            True: [],
            False: [],
        }  # by whether it is routed
        self.started: dict[bool, list[OutgoingCopy]] = {True: [], False: []}
        self.open: dict[int, OutgoingCopy] = {}  # between launch and the end of the packet id
        self.acknowledged: list[OutgoingCopy] = []  # and not entered

    def put(self) -> None:
        make = self.chance.choice((a_copy, routed))
        (copy,) = put(self.out, make(qos=self.chance.choice((0, 1, 2))))
        self.put_in[copy.pending is None].append(copy)

    def step(self) -> None:
        step = self.out.next(NOW_MS)
        if not isinstance(step, OutgoingCopy):
            return
        if step.packet_id:
            assert self.open[step.packet_id] is step
            assert step.repeated
            return
        self.out.launch(step)
        self.started[step.pending is None].append(step)
        if step.qos:
            assert step.packet_id not in self.open
            self.open[step.packet_id] = step

    def ack(self) -> None:
        if not self.open:
            return
        packet_id = self.chance.choice([*self.open])
        copy = self.out.puback(packet_id) or self.out.pubrec(packet_id)
        self.acknowledged += filter(None, [copy])
        if self.open[packet_id].qos == 1:
            del self.open[packet_id]
        elif self.chance.random() < 0.5:
            self.out.pubcomp(packet_id)
            del self.open[packet_id]

    def enter(self) -> None:
        if self.acknowledged:
            at = self.chance.randrange(len(self.acknowledged))
            self.out.entered(self.acknowledged.pop(at))

    def resume(self) -> None:
        self.out.resume()

    def check(self) -> None:
        held = {*self.open.values(), *self.acknowledged}
        for lane in (True, False):
            assert self.started[lane] == self.put_in[lane][: len(self.started[lane])]
            assert sum((copy.pending is None) == lane for copy in held) <= 3


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_copies_start_in_order_and_ids_and_room_are_kept(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DELIVERY_WINDOW", 3)
    monkeypatch.setattr(module, "PACKET_ID_MAX", 9)
    world = World(seed)
    acts = [world.put] * 2 + [world.step] * 3 + [world.ack] * 2 + [world.enter, world.resume]
    for _ in range(600):
        world.chance.choice(acts)()
        world.check()
    # When everything is acknowledged, Then everything has gone
    for _ in range(3_000):
        for act in (world.step, world.ack, world.enter):
            act()
            world.check()
    assert world.started == world.put_in
    assert not world.open
