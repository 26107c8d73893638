"""Presence, from connections whose events arrive late, twice, in another order, or never."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from millpond.agents.sessions.connections import (
    ENDED_IDS_MAX,
    LIVE_MAX,
    Connections,
    LiveConnection,
    Presence,
)

A, B = "a@1", "b@1"


def fold(*events: Any) -> Connections:
    """Fold events, each at the next offset: `("+", id, connected_at[, node])` opens, `("-", id, at[, reason])` ends."""
    connections = Connections()
    for offset, (kind, connection_id, at, *more) in enumerate(events):
        if kind == "+":
            connections.opened(connection_id, LiveConnection(more[0] if more else A, at, offset))
        else:
            connections.ended(connection_id, at, more[0] if more else "normal")
    return connections


def presence_after(*events: Any) -> Presence | None:
    return fold(*events).presence()


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], None),
        ([("+", "1", 10)], (True, 10, None, A)),
        ([("+", "1", 10), ("-", "1", 20)], (False, 10, 20, None)),
        # The end of another connection ends nothing.
        ([("+", "1", 10), ("-", "0", 20)], (True, 10, None, A)),
        # A reconnect keeps the time when the client last went offline.
        ([("+", "1", 10), ("-", "1", 20), ("+", "2", 30)], (True, 30, 20, A)),
        # The end of a connection arrives after the next connect.
        ([("+", "1", 10), ("+", "2", 30), ("-", "1", 20)], (True, 30, 20, A)),
        # The end of a connection arrives before its connect.
        ([("-", "1", 20), ("+", "1", 10)], (False, 10, 20, None)),
        # The late end of an earlier connection from the same address.
        ([("+", "1", 10), ("+", "1", 30), ("-", "1", 20)], (True, 30, None, A)),
        # A later connection from the same peer address.
        ([("+", "1", 10), ("-", "1", 20), ("+", "1", 30)], (True, 30, 20, A)),
        # A takeover: the client is never offline, whichever event arrives first.
        ([("+", "1", 10), ("-", "1", 20, "takenover")], (True, 10, None, None)),
        ([("+", "1", 10), ("-", "1", 20, "discarded"), ("+", "2", 20)], (True, 20, None, A)),
        ([("+", "1", 10), ("+", "2", 20, B), ("-", "1", 21, "takenover")], (True, 20, None, B)),
        (
            [("+", "1", 10), ("-", "1", 20, "takenover"), ("+", "2", 20, B), ("-", "2", 30)],
            (False, 20, 30, None),
        ),
        # A takeover by another node, whose clock is behind.
        (
            [("+", "1", 100), ("+", "2", 20, B), ("-", "1", 101, "takenover"), ("-", "2", 30)],
            (False, 20, 30, None),
        ),
        (
            [("+", "1", 100), ("-", "1", 101, "takenover"), ("+", "2", 20, B), ("-", "2", 30)],
            (False, 20, 30, None),
        ),
        # The connect of an old connection is repeated, while the successor of a newer one is missing.
        (
            [
                ("+", "1", 10),
                ("-", "1", 20),
                ("+", "2", 30),
                ("-", "2", 40, "takenover"),
                ("+", "1", 10),
            ],
            (True, 30, 20, None),
        ),
        # Connect and end of the successor arrive before the old connection's end.
        (
            [("+", "1", 10), ("+", "2", 20), ("-", "2", 30), ("-", "1", 20, "takenover")],
            (False, 20, 30, None),
        ),
        # The connect is repeated after the end: the connection stays ended.
        ([("+", "1", 10), ("-", "1", 20), ("+", "1", 10)], (False, 10, 20, None)),
        ([("+", "2", 30), ("-", "2", 40), ("+", "1", 10)], (False, 30, 40, None)),
    ],
)
def test_the_newest_connection_decides(events: list[Any], expected: Any) -> None:
    assert presence_after(*events) == expected


def test_every_order_that_keeps_each_connections_own_order_gives_the_same_presence() -> None:
    lives = [
        [("+", "1", 10), ("-", "1", 20, "takenover")],
        [("+", "2", 20), ("-", "2", 30, "discarded")],
        [("+", "3", 30), ("-", "3", 40, "normal")],
    ]
    for order in set(permutations([0, 0, 1, 1, 2, 2])):
        left = [iter(life) for life in lives]
        assert presence_after(*(next(left[which]) for which in order)) == (False, 30, 40, None), (
            order
        )


def test_opened_and_ended_are_true_only_for_a_change() -> None:
    connections = Connections()
    live = LiveConnection(A, 10, 0)
    assert connections.opened("1", live)
    assert not connections.opened("1", LiveConnection(A, 10, 5))
    assert connections.ended("1", 20, "normal")
    assert not connections.ended("1", 20, "normal")
    assert not connections.opened("1", live)


def test_connections_that_a_snapshot_does_not_show_end() -> None:
    connections = fold(("+", "1", 10), ("+", "2", 20, B))
    assert connections.seen_on() == {A: 0, B: 1}
    assert not connections.close_unseen(A, 0, 90)
    assert connections.close_unseen(B, 2, 90)
    assert connections.presence() == Presence(False, 20, 90, None)
    assert connections.close_unseen(A, 2, 95)
    assert connections.presence() == Presence(False, 20, 90, None)
    assert connections.seen_on() == {}


def test_a_snapshot_ends_what_it_does_not_show_though_its_clock_is_behind_that_of_the_connection() -> (
    None
):
    connections = fold(("+", "1", 10))
    assert connections.close_unseen(A, 1, 5)
    assert connections.presence() == Presence(False, 10, 10, None)
    assert connections.seen_on() == {}
    assert not connections.opened("1", LiveConnection(A, 10, 0)), "a repeat of its connect"


def test_a_snapshot_ends_the_wait_for_a_successor_that_never_came() -> None:
    connections = fold(("+", "1", 10), ("-", "1", 20, "takenover"))
    assert connections.seen_on() == {A: 0}
    assert connections.close_unseen(A, 2, 90)
    assert connections.presence() == Presence(False, 10, 90, None)


def test_the_memory_for_one_client_is_bounded() -> None:
    many = [("+", str(number), number) for number in range(50)]
    connections = fold(*many, *(("-", str(number), 100) for number in range(50)))
    assert len(connections.ended_ids) == ENDED_IDS_MAX
    assert len(fold(*many).live) == LIVE_MAX
    assert fold(*many).presence() == Presence(True, 49, None, A)


def test_a_copy_is_independent() -> None:
    connections = fold(("+", "1", 10))
    connections.copy().ended("1", 20, "normal")
    assert connections.live
