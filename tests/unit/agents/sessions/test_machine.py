"""The sessions machine, under the real driver, over a log and a store in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec import structs

from millpond.agents.sessions import machine as sessions
from millpond.agents.sessions.state import unpack
from millpond.pipeline.stores.memory.server import Hash, Zset
from millpond.schemas import codec, events, keys
from millpond.schemas.commands import Command, Deliver, Subscribe, Unsubscribe
from millpond.schemas.errors import StoreDown
from millpond.schemas.events import Event, SubscriberJoined, SubscriberLeft
from millpond.schemas.keys import Partition
from tests.support import given
from tests.support.partition import Driver, World, run

SESSIONS = Partition("millpond", "sessions", 0)
PRESENCE = (
    given.a_rule(hook="client.connected", action="on_client_connected"),
    given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
)
QUEUE = given.a_rule(
    hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue"
)
LOOKUP = given.a_rule(hook="client.connected", action="on_subscribe_lookup")
RETAIN_LOOKUP = given.a_rule(hook="session.subscribed", action="on_retain_lookup")
NODE, OTHER = "n@1", "n@2"
TRACE = Path(__file__).parents[3] / "fixtures" / "emqx-5.5.1-exhook.jsonl"


class Sessions(World):
    """A partition of the sessions agent with its owner, and short ways to make the events of clients."""

    def __init__(self, *tables: str) -> None:
        super().__init__(*tables, partition=SESSIONS)
        self.log.partition_count = 3
        self.driver: Driver = self.started()
        self.at = count(20_000, 1_000)

    def fold(self, *events_: Event) -> None:
        """Append events and fold them, with all sweeps that follow."""
        self.append(*events_)
        self.settle()

    def settle(self) -> None:
        """Fold the rest of the log, and tick until nothing is due now."""
        self.feed(self.driver)
        while (due := self.driver.machine.next_due_ms) is not None and due <= self.now_ms:
            self.now_ms += 1_000
            self.append_tick(self.driver, self.now_ms)
            self.feed(self.driver)

    def event(self, kind: Any, client_id: str, node: str = NODE, **fields: Any) -> Event:
        event: Event = kind(at=next(self.at), node=node, client_id=client_id, **fields)
        return event

    def connected(self, client_id: str = "c", peer: str = "p1", **fields: Any) -> Event:
        node, at = fields.get("node", NODE), fields.pop("connected_at", next(self.at))
        return self.event(
            events.ClientConnected, client_id, connection_id=f"{node}/{peer}", connected_at=at,
            **fields,
        )  # fmt: skip

    def disconnected(
        self, client_id: str = "c", peer: str = "p1", reason: str = "normal", node: str = NODE
    ) -> Event:
        return self.event(
            events.ClientDisconnected, client_id, node, connection_id=f"{node}/{peer}",
            reason=reason,
        )  # fmt: skip

    def created(self, client_id: str = "c", node: str = NODE) -> Event:
        return self.event(events.SessionCreated, client_id, node)

    def subscribed(
        self, topic_filter: str, client_id: str = "c", qos: int = 1, node: str = NODE, **marks: bool
    ) -> Event:
        return self.event(
            events.SessionSubscribed, client_id, node, topic_filter=topic_filter, qos=qos, **marks
        )

    def of_node(self, kind: Any, node: str = NODE, **fields: Any) -> Event:
        event: Event = kind(at=next(self.at), node=node, **fields)
        return event

    def snapshot(self, *events_: Event, node: str = NODE) -> None:
        """Fold a snapshot of a node with these events."""
        self.fold(self.of_node(events.NodeSyncStarted, node, sync_id="s"), *events_)
        self.fold(self.of_node(events.NodeSyncCompleted, node, sync_id="s"))

    def presence(self, client_id: str = "c") -> dict[str, str] | None:
        shown = self.server.values.get(keys.presence(client_id))
        if not isinstance(shown, Hash):
            return None
        return {name: value.decode() for name, value in shown.items()}

    def state(self, client_id: str = "c") -> str | None:
        shown = self.presence(client_id)
        return None if shown is None else shown["state"]

    def remembered(self, client_id: str) -> list[str]:
        """Return the keys that have something of a client. No node has it online."""
        of_clients = [keys.due(SESSIONS), keys.table(SESSIONS, "states")]
        indexes = (sessions.ANNOUNCED, *map(sessions.seen_index, (NODE, OTHER)))
        of_clients += [keys.index(SESSIONS, name) for name in indexes]
        found = [
            name for name in of_clients if self._names(name) & {client_id, f"client\0{client_id}"}
        ]
        shown = keys.presence(client_id)
        return [*found, shown] if shown in self.server.values else found

    def _names(self, key: str) -> set[str]:
        return set(self.server.values.get(key, ()))  # type: ignore[arg-type]

    def pass_time(self, ms: int) -> None:
        """Let the log's time pass, with the ticks that are due."""
        self.now_ms += ms
        self.settle()

    def at_node(self, node: str = NODE) -> dict[str, str]:
        clients = self.server.of(keys.node(node), Hash)
        return {client_id: at.decode() for client_id, at in clients.items()}

    @property
    def commands(self) -> list[Command]:
        sent = [each for each in self.log.produced if each.topic == keys.DELIVERIES_TOPIC]
        return [codec.decode_command(each.value) for each in sent]

    @property
    def announced(self) -> list[tuple[int | None, SubscriberJoined | SubscriberLeft]]:
        announced = []
        for each in self.log.produced:
            if each.topic == keys.MESSAGES_TOPIC:
                event = codec.decode(each.value)
                assert isinstance(event, SubscriberJoined | SubscriberLeft)
                assert each.key == keys.record_key(event).encode()
                announced.append((each.partition, event))
        return announced

    def changes(self) -> list[tuple[Any, ...]]:
        """Return joins as `("+", filter, qos)` and leaves as `("-", filter, reason)`.

        One with a wildcard goes to each partition, and counts once.
        """
        short: list[tuple[Any, ...]] = []
        for partition, event in self.announced:
            if partition in (None, 0):
                joined = isinstance(event, SubscriberJoined)
                what = event.qos if isinstance(event, SubscriberJoined) else event.reason
                short.append(("+" if joined else "-", event.topic_filter, what))
        return short


# -- presence ---------------------------------------------------------------------------------------------


def test_a_client_that_connects_is_online_and_one_that_disconnects_is_not() -> None:
    world = Sessions(*PRESENCE)
    world.fold(world.created(), world.connected(connected_at=21_500))
    assert world.presence() == {"state": "1", "online_at": "21", "offline_at": "undefined"}
    assert world.at_node() == {"c": "21"}
    world.fold(world.disconnected())
    shown = world.presence()
    assert shown is not None
    assert (shown["state"], shown["online_at"]) == ("0", "21")
    assert shown["offline_at"].isdigit()
    assert world.at_node() == {}


def test_a_client_taken_over_by_another_node_moves_there_and_is_never_offline() -> None:
    world = Sessions(*PRESENCE)
    world.fold(world.connected())
    world.fold(world.disconnected(reason="takenover"))
    assert (world.state(), world.at_node()) == ("1", {})
    world.fold(world.connected(peer="p2", node=OTHER))
    assert (world.state(), world.at_node(), list(world.at_node(OTHER))) == ("1", {}, ["c"])


def test_no_presence_is_written_without_a_presence_rule() -> None:
    world = Sessions(QUEUE)
    world.fold(world.connected())
    assert world.presence() is None


def test_a_node_that_started_or_stopped_has_no_connections_but_keeps_sessions() -> None:
    for kind in (events.NodeStarted, events.NodeStopped):
        world = Sessions(*PRESENCE, QUEUE)
        world.fold(world.created(), world.connected(), world.subscribed("queue/a"))
        world.fold(world.connected("other", node=OTHER))
        world.fold(world.of_node(kind))
        assert (world.state("c"), world.state("other")) == ("0", "1")
        assert world.changes() == [("+", "queue/a", 1), ("-", "queue/a", "disconnected")]
        world.fold(world.event(events.SessionResumed, "c"), world.connected(peer="p2"))
        assert world.changes()[2:] == [("+", "queue/a", 1)]


def test_a_snapshot_ends_what_it_does_not_show_and_adds_what_was_missed() -> None:
    world = Sessions(*PRESENCE, QUEUE)
    world.fold(world.connected("gone"), world.subscribed("queue/a", "gone"))
    there = world.connected("there")
    world.fold(there, world.subscribed("queue/b", "there"))
    world.fold(world.subscribed("queue/c", "there"), world.connected("far", node=OTHER))
    world.snapshot(there, world.subscribed("queue/b", "there"), world.connected("new", "p9"))
    assert [world.state(name) for name in ("gone", "there", "far", "new")] == ["0", "1", "1", "1"]
    assert world.changes()[3:] == [
        ("-", "queue/a", "session_ended"),
        ("-", "queue/c", "unsubscribed"),
    ]


def test_what_appeared_just_before_a_snapshot_and_is_missing_in_it_ends() -> None:
    world = Sessions(*PRESENCE, QUEUE)
    world.settle()
    world.fold(world.connected(), world.subscribed("queue/a"))
    world.snapshot()
    assert world.state() == "0"
    assert world.changes()[1:] == [("-", "queue/a", "session_ended")]
    connected = world.connected(peer="p2")
    world.fold(connected, world.subscribed("queue/b"))
    world.snapshot(connected)
    assert world.changes()[3:] == [("-", "queue/b", "unsubscribed")]


def test_a_snapshot_that_did_not_complete_ends_nothing() -> None:
    world = Sessions(*PRESENCE)
    world.fold(world.connected())
    world.fold(world.of_node(events.NodeSyncStarted, sync_id="1"))
    world.fold(world.of_node(events.NodeSyncStarted, sync_id="2"))
    world.fold(world.of_node(events.NodeSyncCompleted, sync_id="1"))
    assert world.state() == "1"
    world.fold(world.of_node(events.NodeSyncCompleted, sync_id="2"))
    assert world.state() == "0"


def test_a_sweep_over_many_clients_is_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SWEEP_CLIENTS_MAX", 4)
    world = Sessions(*PRESENCE)
    world.fold(*(world.connected(f"c{number}", f"p{number}") for number in range(10)))
    ticks = len(world.log.produced)
    world.fold(world.of_node(events.NodeStopped))
    assert len(world.log.produced) - ticks == 3
    assert {world.state(f"c{number}") for number in range(10)} == {"0"}


def test_a_new_owner_finishes_a_sweep_that_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "SWEEP_CLIENTS_MAX", 4)
    world = Sessions(*PRESENCE)
    world.fold(*(world.connected(f"c{number}", f"p{number}") for number in range(10)))
    world.append(world.of_node(events.NodeStopped))
    world.feed(world.driver)
    run(world.driver.close())
    world.driver = world.started()
    world.settle()
    assert {world.state(f"c{number}") for number in range(10)} == {"0"}


# -- clients that have gone -------------------------------------------------------------------------------

DAY_MS = 86_400_000


def gone_after(expired_time: int | str) -> tuple[str, ...]:
    """Rules that keep presence, with this lifetime of it."""
    action = "on_client_disconnected"
    rule = given.a_rule(hook="client.disconnected", action=action, expired_time=expired_time)
    return PRESENCE[0], rule


SHORT = gone_after(5)


def gone(world: Sessions, client_id: str = "c") -> None:
    """Fold the whole life of a client with a clean session."""
    world.fold(world.created(client_id), world.connected(client_id))
    world.fold(
        world.disconnected(client_id),
        world.event(events.SessionTerminated, client_id, reason="normal"),
    )


def test_a_client_with_a_clean_session_is_forgotten_a_day_after_it_has_gone() -> None:
    world = Sessions(*PRESENCE, QUEUE)
    gone(world)
    assert world.driver.machine.next_due_ms == world.now_ms + DAY_MS
    world.pass_time(DAY_MS - 1)
    assert world.state() == "0"
    world.pass_time(1)
    assert world.remembered("c") == []
    assert world.driver.machine.next_due_ms is None


def test_the_lifetime_is_that_of_the_rule_and_may_have_no_end() -> None:
    world = Sessions(*SHORT)
    gone(world)
    world.pass_time(5_000)
    assert world.remembered("c") == []
    # Given rules without an end
    world = Sessions(*gone_after("never"))
    gone(world)
    world.pass_time(100 * DAY_MS)
    assert (world.state(), world.driver.machine.next_due_ms) == ("0", None)


def test_presence_that_no_rule_ends_is_kept_and_without_presence_a_client_is_remembered_a_day() -> (
    None
):
    world = Sessions(PRESENCE[0])
    gone(world)
    world.pass_time(2 * DAY_MS)
    assert world.state() == "0"
    world = Sessions(QUEUE)
    gone(world)
    assert world.remembered("c") != []
    world.pass_time(DAY_MS)
    assert world.remembered("c") == []


def test_a_client_that_comes_back_is_remembered_and_its_time_begins_anew() -> None:
    world = Sessions(*SHORT)
    gone(world)
    world.pass_time(3_000)
    world.fold(world.created(), world.connected(peer="p2"))
    world.pass_time(60_000)
    assert world.state() == "1"
    # When it goes again, and more news of its end arrives a little later
    world.fold(
        world.disconnected(peer="p2"), world.event(events.SessionTerminated, "c", reason="normal")
    )
    world.pass_time(3_000)
    world.fold(world.event(events.SessionTerminated, "c", reason="normal"))
    world.pass_time(2_000)
    assert world.remembered("c") == []


def test_a_client_whose_session_continues_is_remembered_until_the_session_has_ended() -> None:
    world = Sessions(*SHORT)
    world.fold(world.created(), world.connected(), world.disconnected())
    world.pass_time(60_000)
    assert world.state() == "0"
    world.fold(world.event(events.SessionTerminated, "c", reason="expired"))
    world.pass_time(5_000)
    assert world.remembered("c") == []


def test_a_client_that_a_snapshot_misses_is_forgotten_as_well() -> None:
    world = Sessions(*SHORT)
    world.fold(world.created(), world.connected())
    world.snapshot()
    assert world.state() == "0"
    world.pass_time(5_000)
    assert world.remembered("c") == []


def test_a_client_that_is_handed_over_has_not_gone() -> None:
    world = Sessions(*SHORT)
    world.fold(world.created(), world.connected(), world.disconnected(reason="takenover"))
    world.fold(world.event(events.SessionTerminated, "c", reason="takenover"))
    world.pass_time(60_000)
    assert world.state() == "1"


def test_nothing_is_kept_of_a_client_of_which_nothing_is_known() -> None:
    world = Sessions(*PRESENCE, QUEUE)
    world.fold(
        world.event(events.SessionTerminated, "x", reason="normal"),
        world.event(events.SessionUnsubscribed, "x", topic_filter="queue/a"),
    )
    # Given a session whose connection was not reported
    world.fold(world.created(), world.subscribed("queue/a"))
    assert world.remembered("c") != []
    world.fold(world.event(events.SessionTerminated, "c", reason="normal"))
    assert world.remembered("x") == world.remembered("c") == []
    assert world.driver.machine.next_due_ms is None


def test_many_clients_are_forgotten_by_several_ticks_and_a_new_owner_continues() -> None:
    world = Sessions(*SHORT)
    names = [f"c{number}" for number in range(70)]
    for name in names:
        gone(world, name)
    world.now_ms += 5_000
    world.append_tick(world.driver, world.now_ms)
    world.feed(world.driver)
    left = [name for name in names if world.remembered(name)]
    assert len(left) == 70 - 32
    run(world.driver.close())
    world.driver = world.started()
    world.settle()
    assert not any(world.remembered(name) for name in names)


def test_a_tick_before_its_time_forgets_nobody_and_a_sweep_comes_first() -> None:
    world = Sessions(*SHORT)
    gone(world)
    world.fold(given.tick("sessions"))
    assert world.state() == "0"
    world.fold(world.connected("other"))
    world.now_ms += 5_000
    world.fold(world.of_node(events.NodeStopped))
    assert (world.state("other"), world.remembered("c")) == ("0", [])


# -- the registry -----------------------------------------------------------------------------------------


def test_only_subscriptions_that_a_delivery_rule_can_match_are_announced() -> None:
    world = Sessions(QUEUE)
    world.fold(world.created(), world.connected())
    created_at = 1  # `rules.changed` has the offset 0
    world.fold(world.subscribed("sensors/#"), world.subscribed("queue/a"), world.subscribed("#"))
    assert world.changes() == [("+", "queue/a", 1), ("+", "#", 1)]
    assert [partition for partition, _ in world.announced] == [None, 0, 1, 2]
    assert {event.session for _, event in world.announced} == {created_at}


def test_a_client_that_the_bridge_cannot_reach_is_no_member() -> None:
    world = Sessions(QUEUE)
    world.fold(world.connected(), world.subscribed("queue/a", reachable=False))
    assert world.changes() == []
    # When the client subscribes over a listener where the bridge can reach it, Then it is a member
    world.fold(world.subscribed("queue/a"), world.subscribed("queue/a", reachable=False))
    assert world.changes() == [("+", "queue/a", 1), ("-", "queue/a", "disconnected")]


def test_a_shared_subscription_is_announced_under_its_filter() -> None:
    world = Sessions(QUEUE)
    world.fold(world.connected(), world.subscribed("$share/g/queue/a"))
    ((partition, event),) = world.announced
    assert partition is None
    assert event.topic_filter == "$share/g/queue/a"


def test_a_leave_has_the_reason_unsubscribed_disconnected_or_session_ended() -> None:
    world = Sessions(QUEUE)
    world.fold(world.created(), world.connected(), world.subscribed("queue/a"))
    world.fold(world.subscribed("queue/b"))
    world.fold(world.event(events.SessionUnsubscribed, "c", topic_filter="queue/a"))
    world.fold(world.disconnected())
    world.fold(world.event(events.SessionResumed, "c"), world.connected(peer="p2"))
    world.fold(world.event(events.SessionTerminated, "c", reason="kicked"))
    assert world.changes() == [
        ("+", "queue/a", 1), ("+", "queue/b", 1), ("-", "queue/a", "unsubscribed"),
        ("-", "queue/b", "disconnected"), ("+", "queue/b", 1), ("-", "queue/b", "session_ended"),
    ]  # fmt: skip


def test_the_end_of_an_offline_clients_session_is_announced() -> None:
    world = Sessions(QUEUE)
    world.fold(world.created(), world.connected(), world.subscribed("queue/a"))
    world.fold(world.disconnected(), world.event(events.SessionTerminated, "c", reason="normal"))
    assert world.changes() == [
        ("+", "queue/a", 1), ("-", "queue/a", "disconnected"), ("-", "queue/a", "session_ended")
    ]  # fmt: skip
    assert len({event.session for _, event in world.announced}) == 1


def test_a_repeated_subscription_is_announced_only_if_its_qos_changed() -> None:
    world = Sessions(QUEUE)
    world.fold(world.connected(), world.subscribed("queue/a"), world.subscribed("queue/a"))
    world.fold(world.subscribed("queue/a", qos=2))
    assert world.changes() == [("+", "queue/a", 1), ("+", "queue/a", 2)]


def test_a_new_session_is_a_leave_and_a_join() -> None:
    world = Sessions(QUEUE)
    world.fold(world.created(), world.connected(), world.subscribed("queue/a"))
    world.fold(world.disconnected(reason="discarded"), world.event(events.SessionDiscarded, "c"))
    world.fold(world.created(), world.connected(peer="p2"), world.subscribed("queue/a"))
    assert world.changes() == [
        ("+", "queue/a", 1), ("-", "queue/a", "session_ended"), ("+", "queue/a", 1)
    ]  # fmt: skip
    first, last = world.announced[0][1], world.announced[-1][1]
    assert first.session < last.session
    assert first.source_offset < last.source_offset


def test_a_session_that_moved_to_another_node_survives_its_end_on_the_first() -> None:
    world = Sessions(QUEUE)
    world.fold(world.connected(), world.subscribed("queue/a"))
    world.fold(world.event(events.SessionResumed, "c", OTHER))
    world.fold(world.connected(peer="p2", node=OTHER))
    world.fold(world.event(events.SessionTerminated, "c", NODE, reason="takenover"))
    assert world.changes() == [("+", "queue/a", 1)] * 2


def test_a_takeover_is_no_leave_and_the_new_connection_a_join() -> None:
    world = Sessions(QUEUE)
    world.fold(world.created(), world.connected(), world.subscribed("queue/a"))
    world.fold(world.disconnected(reason="takenover"), world.event(events.SessionTakenOver, "c"))
    assert world.changes() == [("+", "queue/a", 1)]
    world.fold(world.event(events.SessionResumed, "c"), world.connected(peer="p2"))
    assert world.changes() == [("+", "queue/a", 1)] * 2
    first, second = (event for _, event in world.announced)
    assert first.session == second.session
    assert first.source_offset < second.source_offset


def test_a_late_end_of_a_discarded_session_does_not_end_its_successor() -> None:
    world = Sessions(*PRESENCE, QUEUE)
    world.fold(world.created(), world.connected(), world.subscribed("queue/1"))
    world.fold(world.created(), world.connected(peer="p2"), world.subscribed("queue/2"))
    world.fold(world.disconnected(reason="discarded"), world.event(events.SessionDiscarded, "c"))
    assert world.changes()[-2:] == [("-", "queue/1", "session_ended"), ("+", "queue/2", 1)]
    assert world.state() == "1"


def test_a_session_that_moves_to_a_node_during_its_snapshot_keeps_its_subscriptions() -> None:
    world = Sessions(*PRESENCE, QUEUE)
    world.fold(world.created(), world.connected(), world.subscribed("queue/a"))
    world.snapshot(
        world.disconnected(reason="takenover"), world.event(events.SessionResumed, "c", OTHER),
        world.connected(peer="p2", node=OTHER), node=OTHER,
    )  # fmt: skip
    assert [change[0] for change in world.changes()] == ["+", "+"]


def test_a_member_whose_rule_was_removed_has_left_when_the_rule_is_added_again() -> None:
    world = Sessions(QUEUE)
    world.fold(world.connected(), world.subscribed("queue/a"))
    for rules in ((), (QUEUE,)):
        run(world.driver.close())
        world.driver = world.started(given.rules(*rules))
        world.fold(world.event(events.SessionUnsubscribed, "c", topic_filter="queue/a"))
    assert [change[0] for change in world.changes()] == ["+", "-"]


def test_a_snapshot_writes_a_presence_again_that_redis_has_lost() -> None:
    world = Sessions(*PRESENCE)
    connected = world.connected()
    world.fold(connected)
    world.server.remove(keys.presence("c"))
    world.server.remove(keys.node(NODE))
    world.snapshot(connected)
    assert (world.state(), list(world.at_node())) == ("1", ["c"])


def test_several_snapshots_that_wait_are_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Sessions(*PRESENCE)
    world.settle()
    world.fold(world.connected())
    for sync_id in map(str, range(50)):
        world.append(world.of_node(events.NodeSyncStarted, sync_id=sync_id))
        world.append(world.of_node(events.NodeSyncCompleted, sync_id=sync_id))
    world.feed(world.driver)
    assert world.applied is not None
    assert len(world.applied.machine["sweeps"]) == 1
    world.settle()
    assert world.state() == "0"


def test_new_rules_that_wait_are_one_sweep() -> None:
    world = Sessions(*PRESENCE)
    world.settle()
    world.fold(world.connected(), world.subscribed("queue/a"))
    rules = given.rules(*PRESENCE, QUEUE).canonical()
    for _ in range(50):
        world.append(
            events.RulesChanged(at=next(world.at), node=NODE, agent="sessions", rules=rules)
        )
    world.feed(world.driver)
    assert world.applied is not None
    assert len(world.applied.machine["sweeps"]) == 1
    world.settle()
    assert world.changes() == [("+", "queue/a", 1)]


def test_snapshots_of_nodes_that_never_completed_them_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "SYNCS_MAX", 3)
    world = Sessions(*PRESENCE)
    world.fold(world.connected())
    world.fold(world.of_node(events.NodeSyncStarted, sync_id="1"))
    for node in ("gone@1", "gone@2"):
        world.fold(world.of_node(events.NodeSyncStarted, sync_id="1", node=node))
    world.fold(world.of_node(events.NodeSyncStarted, sync_id="2"))
    for node in ("gone@3", "gone@4"):
        world.fold(world.of_node(events.NodeSyncStarted, sync_id="1", node=node))
    assert world.applied is not None
    assert list(world.applied.machine["syncs"]) == [NODE, "gone@3", "gone@4"]
    world.fold(world.of_node(events.NodeSyncCompleted, sync_id="2"))
    assert world.state() == "0"


def test_a_tick_announces_a_bounded_number_of_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SWEEP_OUTPUTS_MAX", 2)
    world = Sessions(QUEUE)
    for number in range(6):
        client_id = f"c{number}"
        world.fold(world.connected(client_id, f"p{number}"), world.subscribed("queue/a", client_id))
    ticks = len(world.log.records[SESSIONS.topic, 0])
    world.fold(world.of_node(events.NodeStopped))
    assert len(world.log.records[SESSIONS.topic, 0]) - ticks >= 1 + 3
    assert sorted(change[0] for change in world.changes()) == ["+"] * 6 + ["-"] * 6


def test_new_rules_announce_the_members_of_all_clients() -> None:
    world = Sessions(*PRESENCE)
    world.fold(world.connected(), world.subscribed("queue/a"))
    world.fold(world.connected("d", "p2"), world.subscribed("queue/b", "d", node=OTHER))
    run(world.driver.close())
    world.driver = world.started(given.rules(*PRESENCE, QUEUE))
    world.fold(world.subscribed("queue/c"))
    assert sorted(world.changes()) == [
        ("+", "queue/a", 1),
        ("+", "queue/b", 1),
        ("+", "queue/c", 1),
    ]


def test_the_next_owner_sends_the_announcements_of_a_worker_that_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Sessions(QUEUE)
    world.fold(world.connected())
    world.append(world.subscribed("queue/a"))
    world.log.acknowledges = False
    with monkeypatch.context() as crash:
        crash.setattr(type(world.log), "produce", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            world.feed(world.driver)
    assert world.changes() == []
    world.log.acknowledges = True
    world.driver = world.started()
    world.settle()
    assert world.changes() == [("+", "queue/a", 1)]


def test_a_store_that_is_down_during_a_look_up_loses_neither_it_nor_the_dead_letter_of_a_refusal() -> (
    None
):
    world = Sessions(*PRESENCE, LOOKUP)
    world.server.keep(keys.presence("c"), b"foreign")
    world.server.keep(keys.subscriptions("c"), Hash({"a": b"1"}))
    world.server.keep(keys.subscriptions("d"), Hash({"b": b"1"}))
    world.append(world.connected(), world.connected("d", "p2"))
    reads = count()

    def fault(moment: str, _: Partition) -> None:
        if moment == "read" and next(reads) == 2:
            raise StoreDown("down in the middle")

    world.server.fault = fault
    world.settle()
    assert next(reads) > 3
    filters = {each.topic_filters for each in world.commands if isinstance(each, Subscribe)}
    assert filters == {(("a", 1),), (("b", 1),)}
    assert len(world.dead_letters) == 1


def test_a_subscription_above_the_limit_becomes_a_dead_letter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("millpond.agents.sessions.state.SUBSCRIPTIONS_MAX", 2)
    world = Sessions(QUEUE)
    world.fold(*(world.subscribed(f"queue/{number}") for number in range(3)))
    world.fold(world.subscribed("a/#/b"))
    world.snapshot(world.subscribed("queue/2", told_again=True))
    reasons = [dict(each.headers)["reason"].decode() for each in world.dead_letters]
    assert "2 subscriptions" in reasons[0]
    assert "'#' stands only at the end" in reasons[1]
    assert len(reasons) == 2


def test_a_filter_is_matched_again_when_the_memory_was_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("millpond.agents.sessions.session_rules.FILTERS_REMEMBERED_MAX", 1)
    world = Sessions(QUEUE)
    world.fold(world.connected(), *(world.subscribed(f"queue/{at}") for at in range(3)))
    assert len(world.changes()) == 3


def test_a_tick_with_nothing_to_do_does_nothing() -> None:
    world = Sessions(QUEUE)
    world.settle()
    tick = events.Tick(at=1, node="millpond", agent="sessions")
    world.fold(tick)
    assert world.driver.next_offset == len(world.log.records[SESSIONS.topic, 0])


def test_a_session_on_another_node_survives_a_nodes_restart_and_snapshot() -> None:
    world = Sessions(*PRESENCE, QUEUE)
    world.fold(world.connected(), world.subscribed("queue/a"))
    world.fold(world.event(events.SessionResumed, "c", OTHER))
    world.fold(world.connected(peer="p2", node=OTHER))
    world.fold(world.of_node(events.NodeStopped))
    world.snapshot()
    assert world.state() == "1"
    assert world.changes() == [("+", "queue/a", 1)] * 2


def test_a_subscription_stays_proxied_and_a_resumed_one_is_older_than_the_resumption() -> None:
    world = Sessions(QUEUE)
    proxied = events.SessionSubscribed(
        at=1, node=NODE, client_id="c", topic_filter="a", qos=1, proxied=True
    )
    world.fold(world.created(), world.connected(), proxied, world.subscribed("a"))
    world.fold(world.event(events.SessionResumed, "c"), world.subscribed("b"))
    states = world.server.of(keys.table(SESSIONS, "states"), Hash)
    state = unpack(states["c"])
    assert state.session is not None
    assert {name: each.proxied for name, each in state.subscriptions.items()} == {
        "a": True,
        "b": False,
    }
    assert state.subscriptions["a"].since < state.session.resumed < state.subscriptions["b"].since


# -- what the database and applications say ---------------------------------------------------------------


def test_a_client_that_connects_gets_the_subscriptions_in_redis() -> None:
    world = Sessions(LOOKUP)
    table = Hash({"a/+": b"1", "b": b"2", "c/#/d": b"1", "d": b"7", "$queue/f": b"1"})
    world.server.keep(keys.subscriptions("c"), table)
    connected = world.connected()
    world.fold(connected, connected)
    filters = (("$share/$queue/f", 1), ("a/+", 1), ("b", 2))
    assert world.commands == [Subscribe(client_id="c", topic_filters=filters)]
    (dead_letter,) = world.dead_letters
    reason = dict(dead_letter.headers)["reason"].decode()
    assert "'c/#/d' → '1' ('#' stands only at the end of a topic filter)" in reason
    assert "'d' → '7' (the QoS is not 0, 1 or 2)" in reason
    world.server.keep(keys.subscriptions("c"), Hash({"b": b"0"}))
    world.fold(world.disconnected(), world.connected(peer="p2"))
    assert world.commands[1:] == [Subscribe(client_id="c", topic_filters=(("b", 0),))]


def test_a_client_without_subscriptions_in_redis_gets_no_command() -> None:
    world = Sessions(LOOKUP)
    world.fold(world.connected())
    assert (world.commands, world.dead_letters) == ([], [])


def test_subscriptions_in_redis_of_another_type_are_a_dead_letter_and_not_none() -> None:
    world = Sessions(LOOKUP)
    world.server.keep(keys.subscriptions("c"), b"a string")
    connected = world.connected()
    world.fold(connected)
    assert world.commands == []
    (dead_letter,) = world.dead_letters
    reason = dict(dead_letter.headers)["reason"].decode()
    assert "mqtt:sub:c" in reason and "WRONGTYPE" in reason
    assert dead_letter.value == codec.encode(connected)


def test_filters_above_a_commands_limit_are_named_in_a_dead_letter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("millpond.agents.driver.outputs.SUBSCRIPTIONS_MAX", 1)
    world = Sessions(LOOKUP)
    world.server.keep(keys.subscriptions("c"), Hash({"a": b"1", "b": b"1"}))
    world.fold(world.connected())
    assert world.commands == [Subscribe(client_id="c", topic_filters=(("a", 1),))]
    assert "'b' is beyond the limit of 1" in dict(world.dead_letters[0].headers)["reason"].decode()


def test_an_applications_request_becomes_a_command() -> None:
    world = Sessions()
    world.fold(
        world.event(events.ControlSubscribe, "c", topic_filter="a/+", qos=2),
        world.event(events.ControlUnsubscribe, "c", topic_filter="b"),
        world.event(events.ControlSubscribe, "c", topic_filter="a/#/b", qos=2),
        world.event(events.ControlUnsubscribe, "c", topic_filter="$queue/c"),
    )
    assert world.commands == [
        Subscribe(client_id="c", topic_filters=(("a/+", 2),)),
        Unsubscribe(client_id="c", topic_filters=("b",)),
        Unsubscribe(client_id="c", topic_filters=("$share/$queue/c",)),
    ]
    assert len(world.dead_letters) == 1


def retaining(world: Sessions, *topics: str, agent: Any = "messages", number: int = 1) -> None:
    """Let these topics retain a message each, as their owner stores it."""
    name = keys.index(Partition("millpond", agent, number), keys.RETAINED_INDEX)
    world.server.keep(name, Zset({**world.server.of(name, Zset), **dict.fromkeys(topics, 0)}))
    for topic in topics:
        identifier = f"id:{topic}"
        world.server.keep(keys.retained(topic), Zset({identifier: 1}))
        body = {"id": identifier, "topic": topic, "qos": "1", "payload": f"of {topic}"}
        values = Hash({field: value.encode() for field, value in body.items()})
        world.server.keep(keys.message_body(identifier), values)


@pytest.mark.parametrize(
    ("topic_filter", "found"),
    [
        ("a/b", ["a/b"]),
        ("a/+", ["a/b", "a/c"]),
        ("a/#", ["a", "a/b", "a/b/c", "a/c"]),
        ("#", ["a", "a/b", "a/b/c", "a/c", "z"]),
        ("+/b", ["a/b"]),
        ("nothing/#", []),
        ("$share/g/a/+", []),
    ],
)
def test_a_new_subscription_gets_the_retained_messages_that_match(
    topic_filter: str, found: list[str]
) -> None:
    world = Sessions(RETAIN_LOOKUP)
    retaining(world, "a/b", "a/c", "a", "$SYS/x")
    retaining(world, "a/b/c", "z", agent="queue", number=2)
    world.server.remove(keys.message_body("id:gone"))
    world.fold(world.connected(), world.subscribed(topic_filter, qos=0))
    delivers = [each for each in world.commands if isinstance(each, Deliver)]
    assert [each.topic for each in delivers] == found
    assert {(each.qos, each.retain, each.lease) for each in delivers} <= {(0, True, "")}
    assert [each.payload for each in delivers] == [f"of {topic}" for topic in found]


def test_retained_keys_of_another_type_are_named_in_one_dead_letter() -> None:
    world = Sessions(RETAIN_LOOKUP)
    retaining(world, "a/b", "a/c", "a/d")
    for topic in ("a/b", "a/d"):
        world.server.keep(keys.retained(topic), b"a string")
    subscribed = world.subscribed("a/+")
    world.fold(world.connected(), subscribed)
    assert [each.topic for each in world.commands if isinstance(each, Deliver)] == ["a/c"]
    (dead_letter,) = world.dead_letters
    reason = dict(dead_letter.headers)["reason"].decode()
    assert "WRONGTYPE" in reason and "mqtt:retain:a/b, mqtt:retain:a/d" in reason
    assert dead_letter.value == codec.encode(subscribed)


@pytest.mark.parametrize(("handling", "found"), [(0, 2), (1, 1), (2, 0)])
def test_retained_messages_are_delivered_as_retain_handling_says(handling: int, found: int) -> None:
    world = Sessions(RETAIN_LOOKUP)
    retaining(world, "a/b")
    subscribed = world.event(
        events.SessionSubscribed, "c", topic_filter="a/b", qos=1, retain_handling=handling
    )
    world.fold(world.connected(), subscribed, subscribed)
    assert len(world.commands) == found


def test_retained_topics_are_searched_a_page_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.agents.driver.outputs.TOPICS_READ_MAX", 3)
    monkeypatch.setattr("millpond.agents.driver.outputs.BODIES_READ_MAX", 2)
    world = Sessions(RETAIN_LOOKUP)
    retaining(world, *(f"s/{number:02}/t" for number in range(20)))
    retaining(world, *(f"s/{number:02}/alarm" for number in range(15, 20)), agent="queue")
    world.fold(world.connected(), world.subscribed("s/+/alarm"))
    assert len(world.commands) == 5
    monkeypatch.setattr("millpond.agents.driver.outputs.RETAINED_MAX", 4)
    world.fold(world.subscribed("s/+/t"))
    assert len(world.commands) == 5 + 4
    monkeypatch.setattr("millpond.agents.driver.outputs.PAGES_MAX", 1)
    world.fold(world.subscribed("+/19/alarm"))
    assert len(world.commands) == 5 + 4


@pytest.mark.parametrize(
    "body",
    [
        {}, {"note": "x"}, {"id": "i", "topic": "a/b"}, {"id": "i", "topic": "a/b", "qos": "x"},
        {"id": "i", "topic": "a/b", "qos": "7"}, {"id": "i", "topic": "elsewhere", "qos": "1"},
    ],
)  # fmt: skip
def test_a_key_that_is_not_a_message_of_the_topic_is_not_delivered(body: dict[str, str]) -> None:
    world = Sessions(RETAIN_LOOKUP)
    retaining(world, "a/b")
    values = Hash({name: value.encode() for name, value in body.items()})
    world.server.keep(keys.message_body("id:a/b"), values)
    world.fold(world.connected(), world.subscribed("a/b"))
    assert world.commands == []


def test_a_large_look_up_is_produced_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.agents.driver.outbox.OUTGOING_BYTES_MAX", 500)
    world = Sessions(RETAIN_LOOKUP)
    retaining(world, *(f"a/{number}" for number in range(9)))
    world.fold(world.connected(), world.subscribed("a/+"))
    topics = [each.topic for each in world.commands if isinstance(each, Deliver)]
    assert topics == [f"a/{number}" for number in range(9)]


def test_a_retained_message_that_was_removed_since_is_not_delivered() -> None:
    world = Sessions(RETAIN_LOOKUP)
    retaining(world, "a/b", "a/c")
    world.server.remove(keys.message_body("id:a/b"))
    world.server.remove(keys.retained("a/c"))
    world.fold(world.connected(), world.subscribed("a/#"))
    assert world.commands == []


def test_a_subscription_in_a_snapshot_is_not_a_subscribe() -> None:
    world = Sessions(RETAIN_LOOKUP, LOOKUP)
    retaining(world, "a/b")
    connected = world.connected(connected_at=21_000)
    world.fold(connected, world.subscribed("a/b"))
    # The client subscribes again: [MQTT-3.8.4-3].
    world.fold(world.subscribed("a/b"))
    world.snapshot(connected, world.subscribed("a/b", told_again=True))
    assert len(world.commands) == 2


def test_a_snapshot_with_another_time_of_a_connection_is_not_a_new_connection() -> None:
    world = Sessions(given.a_rule(hook="client.connected", commands=["INCR connected:${clientid}"]))
    world.fold(world.connected(connected_at=21_000))
    world.snapshot(world.connected(connected_at=20_993, told_again=True))
    world.snapshot(world.connected(connected_at=21_007, told_again=True))
    assert world.text("connected:c") == "1"


# -- the user's commands ----------------------------------------------------------------------------------


def test_commands_run_once_for_each_event() -> None:
    hooks = (
        "client.connected", "client.disconnected", "session.created", "session.subscribed",
        "session.unsubscribed",
    )  # fmt: skip
    rules = [given.a_rule(hook=hook, commands=[f"INCR {hook}:${{clientid}}"]) for hook in hooks]
    world = Sessions(*rules)
    story = [
        world.created(), world.connected(), world.subscribed("a"), world.disconnected(),
        world.event(events.SessionUnsubscribed, "c", topic_filter="a"),
    ]  # fmt: skip
    world.fold(*story)
    # Repeated, and late.
    world.fold(story[3], story[4], story[1])
    assert {hook: world.text(f"{hook}:c") for hook in hooks} == dict.fromkeys(hooks, "1")


def test_a_foreign_key_in_the_place_of_a_presence_stays_and_the_event_becomes_a_dead_letter() -> (
    None
):
    world = Sessions(*PRESENCE)
    world.server.keep(keys.presence("c"), b"foreign")
    world.fold(world.connected(), world.connected("d", "p2"))
    assert world.text(keys.presence("c")) == "foreign"
    assert world.state("d") == "1"
    assert len(world.dead_letters) == 1


def test_an_event_that_this_agent_does_not_fold_changes_nothing() -> None:
    world = Sessions(*PRESENCE)
    record = world.append_raw(b"c", codec.encode(world.event(events.SessionTakenOver, "c")))
    world.feed(world.driver)
    assert world.driver.next_offset == record.offset + 1
    assert world.presence() is None


# -- a real broker's trace --------------------------------------------------------------------------------


def traced() -> Iterator[tuple[str, Event]]:
    """Yield the trace's events, each with its connection id."""
    kinds: dict[str, Any] = {
        "OnClientConnected": events.ClientConnected,
        "OnClientDisconnected": events.ClientDisconnected,
        "OnSessionCreated": events.SessionCreated,
        "OnSessionResumed": events.SessionResumed,
        "OnSessionDiscarded": events.SessionDiscarded,
        "OnSessionTakenover": events.SessionTakenOver,
        "OnSessionSubscribed": events.SessionSubscribed,
        "OnSessionUnsubscribed": events.SessionUnsubscribed,
        "OnSessionTerminated": events.SessionTerminated,
    }
    for line in TRACE.read_text().splitlines():
        call = json.loads(line)
        kind = kinds.get(call["call"])
        if kind is None:
            continue
        request, client = call["req"], call["req"]["clientinfo"]
        at, peer = int(call["t"] * 1000), f"{client['peerhost']}:{client['peerport']}"
        connection_id = f"{client['node']}/{peer}"
        fields: dict[str, Any] = {"at": at, "node": client["node"], "client_id": client["clientid"]}
        if kind is events.ClientConnected:
            fields |= {"connection_id": connection_id, "connected_at": at}
        if kind is events.ClientDisconnected:
            fields |= {"connection_id": connection_id, "reason": request["reason"]}
        if kind is events.SessionTerminated:
            fields["reason"] = request["reason"]
        if kind in (events.SessionSubscribed, events.SessionUnsubscribed):
            fields["topic_filter"] = request["topic"]
        if kind is events.SessionSubscribed:
            fields["qos"] = int(request["subopts"].get("qos", 0))
        yield connection_id, kind(**fields)


@pytest.mark.parametrize("seed", [None, *range(30)])
def test_all_clients_of_a_real_brokers_trace_end_offline_in_any_order_between_connections(
    seed: int | None,
) -> None:
    story = list(traced())
    clients = {event.client_id for _, event in story if isinstance(event, events.ClientConnected)}
    if seed is not None:
        random = Random(seed)
        by_connection: dict[str, list[Event]] = {}
        for connection_id, event in story:
            by_connection.setdefault(connection_id, []).append(event)
        order = [connection_id for connection_id, _ in story]
        random.shuffle(order)
        story = [(connection_id, by_connection[connection_id].pop(0)) for connection_id in order]
    world = Sessions(*PRESENCE)
    world.fold(*(event for _, event in story))
    assert {client_id: world.state(client_id) for client_id in clients} == dict.fromkeys(
        clients, "0"
    )
    assert world.at_node("emqx@127.0.0.1") == {}
    assert len(clients) == 7


# -- events that arrive late, or in another order -----------------------------------------------------------


def began(world: Sessions, began_at: int, **fields: Any) -> Event:
    return world.event(events.SessionCreated, "c", began_at=began_at, **fields)


def subscribed_at(world: Sessions, at: int, topic_filter: str, node: str = NODE) -> Event:
    event = world.subscribed(topic_filter, node=node)
    return structs.replace(event, at=at)


def subscriptions(world: Sessions) -> list[str]:
    states = world.server.of(keys.table(SESSIONS, "states"), Hash)
    return sorted(unpack(states["c"]).subscriptions)


def test_a_session_whose_start_arrives_late_keeps_its_own_subscriptions() -> None:
    world = Sessions(QUEUE)
    world.fold(subscribed_at(world, 50, "queue/old"), subscribed_at(world, 100, "queue/at-once"))
    world.fold(world.connected(connected_at=100), subscribed_at(world, 120, "queue/new"))
    world.fold(began(world, 100))
    assert subscriptions(world) == ["queue/at-once", "queue/new"]
    joined = {
        each.topic_filter for _, each in world.announced if isinstance(each, SubscriberJoined)
    }
    assert joined == {"queue/old", "queue/at-once", "queue/new"}
    (left,) = [
        each.topic_filter for _, each in world.announced
        if isinstance(each, SubscriberLeft) and each.topic_filter == "queue/old"
    ]  # fmt: skip
    assert left == "queue/old"


def test_the_start_of_a_session_that_is_repeated_or_follows_its_successors_changes_nothing() -> (
    None
):
    world = Sessions(
        QUEUE, given.a_rule(hook="session.created", commands=["INCR began:${clientid}"])
    )
    world.fold(began(world, 100), world.connected(), subscribed_at(world, 120, "queue/a"))
    world.fold(began(world, 200), subscribed_at(world, 220, "queue/b"))
    announced = len(world.announced)
    world.fold(began(world, 200), began(world, 100))
    assert subscriptions(world) == ["queue/b"]
    assert len(world.announced) == announced
    assert world.server.values["began:c"] == b"2"


def test_a_subscription_that_arrives_after_its_sessions_successor_is_ignored() -> None:
    world = Sessions(QUEUE, RETAIN_LOOKUP)
    world.fold(began(world, 200), world.connected())
    world.fold(subscribed_at(world, 150, "queue/a"), subscribed_at(world, 250, "queue/b"))
    assert subscriptions(world) == ["queue/b"]
    # Another node has another clock.
    world.fold(subscribed_at(world, 150, "queue/c", node=OTHER))
    assert subscriptions(world) == ["queue/b", "queue/c"]


def test_a_session_on_another_node_is_new_whatever_its_clock_shows() -> None:
    world = Sessions(QUEUE)
    world.fold(began(world, 200), world.connected(), subscribed_at(world, 250, "queue/a"))
    world.fold(began(world, 100, node=OTHER))
    assert subscriptions(world) == []


def test_a_session_without_began_at_ends_its_predecessor_whatever_the_clock_shows() -> None:
    world = Sessions(QUEUE)
    world.fold(began(world, 200), world.connected(), subscribed_at(world, 10**12, "queue/a"))
    world.fold(world.created())
    assert subscriptions(world) == []
