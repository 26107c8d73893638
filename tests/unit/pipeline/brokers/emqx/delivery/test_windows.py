"""Delivery windows: order and room of each client, as single cases and as a random walk against a model."""

from __future__ import annotations

from typing import Any

from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.brokers.emqx.delivery.windows import (
    BULK_BYTES_MAX,
    BULK_MAX,
    BULK_MIN,
    WINDOW,
    Accepted,
    BulkShare,
    CopyOutcome,
    DeliveryCopy,
    DeliveryWindows,
    QueuedItem,
    SubscriptionChange,
)
from millpond.schemas.commands import Deliver, Subscribe
from millpond.schemas.leases import LeaseName

NOW, END = 1_000, 60_000


def a_pending_command(client: str, number: int, until: int = END) -> PendingCommand:
    return PendingCommand(
        client, LeaseName("queue", 0, number), 1, f"m{number}", until, lambda: None, lambda: False
    )


def a_copy(
    client: str, number: int, *, qos: int = 1, until: int = END, payload: str = ""
) -> DeliveryCopy:
    pending = a_pending_command(client, number, until)
    command = Deliver(
        client_id=client, lease=str(pending.lease), valid_for_s=60, attempt=1,
        message_id=pending.message_id, topic="queue/a", qos=qos, retain=False, payload=payload,
    )  # fmt: skip
    return DeliveryCopy(pending, command)


def a_change(client: str) -> SubscriptionChange:
    return SubscriptionChange(
        a_pending_command(client, 0), Subscribe(client_id=client, topic_filters=(("a", 1),))
    )


def windows(*items: QueuedItem) -> DeliveryWindows:
    made = DeliveryWindows()
    for item in items:
        made.put(item)
    return made


def copies(client: str, *numbers: int, **fields: Any) -> list[DeliveryCopy]:
    return [a_copy(client, number, **fields) for number in numbers]


def bulk(made: DeliveryWindows, now: int = NOW, slots: int = 1) -> list[BulkShare]:
    step = made.next(slots, now)
    if step is None:
        return []
    assert isinstance(step, list)
    return step


def numbers(part: BulkShare) -> list[int]:
    return [int(copy.command.message_id[1:]) for copy in part.copies]


def shown(parts: list[BulkShare]) -> dict[str, list[int]]:
    return {part.client_id: numbers(part) for part in parts}


def accept(made: DeliveryWindows, part: BulkShare) -> list[str]:
    aliases = [f"{part.client_id}/{number}" for number in numbers(part)]
    made.settle(part, [Accepted(alias) for alias in aliases])
    return aliases


def test_a_bulk_holds_copies_of_several_clients_each_in_order() -> None:
    made = windows(*copies("a", 1, 2), *copies("b", 3), *copies("a", 4))
    assert shown(bulk(made)) == {"a": [1, 2, 4], "b": [3]}
    assert bulk(made) == []


def test_a_client_has_one_bulk_under_way() -> None:
    made = windows(*copies("a", 1))
    (first,) = bulk(made)
    made.put(a_copy("a", 2))
    made.put(a_copy("b", 3))
    assert shown(bulk(made)) == {"b": [3]}
    accept(made, first)
    assert shown(bulk(made)) == {"a": [2]}


def test_a_window_is_never_exceeded_and_an_acknowledgement_makes_room() -> None:
    made = windows(*copies("a", *range(WINDOW + 5)))
    (part,) = bulk(made)
    aliases = accept(made, part)
    assert len(part.copies) == WINDOW
    assert bulk(made) == []
    assert made.acked("a", aliases[7])
    assert shown(bulk(made)) == {"a": [WINDOW]}


def test_the_copies_that_a_client_has_not_acknowledged_are_known_by_their_leases() -> None:
    made = windows(*copies("a", 1, 2, 3))
    (part,) = bulk(made)
    aliases = accept(made, part)
    acked = made.acked("a", aliases[1])
    assert acked is part.copies[1].pending
    assert [lease.number for lease in made.unacknowledged("a")] == [1, 3]
    assert made.unacknowledged("stranger") == []


def test_a_full_window_does_not_delay_other_clients() -> None:
    made = windows(*copies("a", *range(WINDOW + 1)), *copies("b", 900))
    (part,) = bulk(made)
    accept(made, part)
    assert shown(bulk(made)) == {"b": [900]}


def test_qos_0_needs_no_room() -> None:
    made = windows(*copies("a", *range(WINDOW)))
    accept(made, bulk(made)[0])
    made.put(a_copy("a", 500, qos=0))
    made.put(a_copy("a", 501))
    assert shown(bulk(made)) == {"a": [500]}


def test_an_expired_copy_leaves_the_window() -> None:
    made = windows(*copies("a", *range(WINDOW), until=5_000), a_copy("a", 900))
    accept(made, bulk(made)[0])
    assert bulk(made, 5_000) == []
    made.drop_stale(1_000, 5_001, lambda pending: False)
    assert shown(bulk(made, 5_001)) == {"a": [900]}


def test_an_acknowledgement_before_the_answer_of_rest_frees_room() -> None:
    made = windows(*copies("a", *range(WINDOW + 1)))
    (part,) = bulk(made)
    assert not made.acked("a", "a/3")  # it may be another process's
    accept(made, part)
    assert shown(bulk(made)) == {"a": [WINDOW]}


def test_unsent_copies_are_repeated_before_later_ones() -> None:
    made = windows(*copies("a", 1, 2))
    (part,) = bulk(made)
    made.put(a_copy("a", 3))
    made.settle(part, ["unsent", "unsent"])
    assert shown(bulk(made)) == {"a": [1, 2, 3]}


def test_only_the_failed_copy_of_a_bulk_is_repeated() -> None:
    made = windows(*copies("a", 1, 2, 3))
    (part,) = bulk(made)
    made.settle(part, [Accepted("x"), "unsent", "no_subscriber"])
    assert shown(bulk(made)) == {"a": [2]}


def test_unclear_copies_are_repeated_one_by_one_and_take_room_twice() -> None:
    made = windows(*copies("a", *range(60)))
    (part,) = bulk(made)
    made.settle(part, ["unknown"] * 60)
    (one,) = bulk(made)
    assert numbers(one) == [0]
    accept(made, one)
    (rest,) = bulk(made)
    assert numbers(rest) == list(range(1, WINDOW - 60))


def test_an_acknowledgement_of_an_unclear_copy_frees_room() -> None:
    made = windows(*copies("a", *range(WINDOW)))
    (part,) = bulk(made)
    made.settle(part, ["unknown"] * WINDOW)
    assert bulk(made) == []
    assert not made.acked("a", "unknown alias")
    assert shown(bulk(made)) == {"a": [0]}


def test_a_change_keeps_its_place_among_the_copies() -> None:
    change = a_change("a")
    made = windows(a_copy("a", 1), change, a_copy("a", 2))
    (part,) = bulk(made)
    assert numbers(part) == [1]
    accept(made, part)
    assert made.next(1, NOW) is change
    assert made.next(1, NOW) is None
    made.settle_change(change, again=True)
    assert made.next(1, NOW) is change
    made.settle_change(change, again=False)
    assert shown(bulk(made)) == {"a": [2]}


def test_the_end_of_a_session_frees_its_room_and_returns_what_waits() -> None:
    made = windows(*copies("a", *range(WINDOW + 2)))
    accept(made, bulk(made)[0])
    ended = made.session_ended("a")
    assert [copy.command.message_id for copy in ended if isinstance(copy, DeliveryCopy)] == [
        f"m{WINDOW}", f"m{WINDOW + 1}",
    ]  # fmt: skip
    assert len(made) == 0
    assert made.session_ended("a") == []


def test_copies_that_are_accepted_after_the_end_of_their_session_take_no_room() -> None:
    made = windows(*copies("a", 1, 2))
    (part,) = bulk(made)
    assert made.session_ended("a") == []
    accept(made, part)
    assert len(made) == 0


def test_an_acknowledgement_during_a_change_frees_the_room_of_an_unclear_copy() -> None:
    made = windows(*copies("a", *range(WINDOW)))
    (part,) = bulk(made)
    made.settle(part, ["unknown"] * WINDOW)
    made.drop_stale(WINDOW + 1, NOW, lambda pending: True)
    change = a_change("a")
    made.put(change)
    made.put(a_copy("a", 900))
    assert made.next(1, NOW) is change
    made.acked("a", "an earlier attempt")
    made.settle_change(change, again=False)
    assert shown(bulk(made)) == {"a": [900]}


def test_a_bulk_is_limited_in_copies_and_in_bytes() -> None:
    many = windows(*(a_copy(f"c{number}", number) for number in range(BULK_MAX + 1)))
    assert len(bulk(many)) == BULK_MAX
    large = "x" * (BULK_BYTES_MAX - 10)
    made = windows(a_copy("a", 1, payload=large), *copies("b", 2, 3, payload="x" * 8))
    assert shown(bulk(made)) == {"a": [1], "b": [2]}
    huge = windows(*copies("a", 1, 2, payload=large * 2))
    assert shown(bulk(huge)) == {"a": [1]}


def test_ready_copies_are_shared_among_the_slots() -> None:
    made = windows(*(a_copy(f"c{number}", number) for number in range(64)))
    assert len(bulk(made, slots=2)) == 32
    assert len(bulk(made, slots=8)) == BULK_MIN


def test_stale_commands_are_removed_and_idle_clients_are_forgotten() -> None:
    made = windows(*copies("a", 1, 2), a_copy("b", 3))
    made.drop_stale(1_000, NOW, lambda pending: pending.message_id != "m2")
    assert len(made) == 1
    (part,) = bulk(made)
    assert numbers(part) == [2]
    made.settle(part, ["no_subscriber"])
    assert len(made) == 0
    assert not made.acked("a", "x")


def test_the_search_for_stale_commands_goes_in_rounds_of_limited_calls() -> None:
    made = windows(*(a_copy(f"c{number}", number) for number in range(10)))
    asked: list[str] = []

    def stale(pending: PendingCommand) -> bool:
        asked.append(pending.client_id)
        return False

    for _ in range(3):
        made.drop_stale(8, NOW, stale)
    assert asked == [f"c{number}" for number in range(10)]
    made.drop_stale(8, NOW, stale)
    assert asked[10:] == ["c0", "c1", "c2", "c3"]


OUTCOMES = st.sampled_from(
    ["accept", "accept", "accept", "no_subscriber", "refused", "unsent", "unknown"]
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "send", "send", "ack", "ack", "stray", "end"]),
        st.integers(0, 2), st.integers(1, 70), st.lists(OUTCOMES, min_size=1, max_size=8),
    ), max_size=60,
)  # fmt: skip


@given_any(STEPS)
@settings(max_examples=300, deadline=None)
def test_order_and_window_hold_in_any_sequence_of_events(
    steps: list[tuple[str, int, int, list[str]]],
) -> None:
    """The first attempts of a client's copies are in order, and EMQX holds at most a window of them."""
    made, last = DeliveryWindows(), 0
    tried: dict[str, list[int]] = {}
    held: dict[str, set[str]] = {}
    for kind, which, count, outcomes in steps:
        client = f"c{which}"
        if kind == "put":
            for _ in range(count):
                last += 1
                made.put(a_copy(client, last))
        elif kind == "ack" and held.get(client):
            alias = min(held[client])
            held[client].discard(alias)
            made.acked(client, alias)
        elif kind == "stray":
            made.acked(client, "stray") if not held.get(client) else None
        elif kind == "end":
            made.session_ended(client)
            held.pop(client, None)
        elif kind == "send":
            for part in bulk(made):
                came: list[CopyOutcome] = []
                before = tried.setdefault(part.client_id, [0])
                for at, number in enumerate(numbers(part)):
                    outcome = outcomes[at % len(outcomes)]
                    alias = f"{number}/{len(held.get(part.client_id, ()))}/{last}"
                    assert number in before or number > max(before)
                    before.append(number)
                    if outcome in ("accept", "unknown"):
                        held.setdefault(part.client_id, set()).add(alias)
                    came.append(Accepted(alias) if outcome == "accept" else outcome)  # type: ignore[arg-type]
                assert numbers(part) == sorted(numbers(part))
                assert len(held.get(part.client_id, ())) <= WINDOW
                made.settle(part, came)
