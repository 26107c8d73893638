"""Clients that work through copies of one partition are reported as active to the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from millpond.pipeline.brokers.commands.active_members import ActiveMembers, report_interval_s
from millpond.pipeline.brokers.commands.reports import SENT_BYTES_MAX, SENT_MAX, Reports
from millpond.schemas.events import MembersActive
from millpond.schemas.leases import LeaseName
from millpond.schemas.rules import Rules
from tests.support import given


class Log:
    """An `EventSink` in memory."""

    node = "n"

    def __init__(self) -> None:
        self.reported: list[tuple[str, int | None, tuple[str, ...]]] = []

    async def enter(self, event: Any, partition: int | None = None) -> asyncio.Future[Any]:
        assert isinstance(event, MembersActive)
        self.reported.append((event.agent, partition, event.client_ids))
        stored: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        stored.set_result(None)
        return stored

    async def enter_alone(self, event: Any, partition: int | None = None) -> None:
        await self.enter(event, partition)


class Scene:
    """Clients with copies."""

    def __init__(self, **copies: list[str]) -> None:
        """`copies`: of each client, the places of what it has not acknowledged: `agent/partition`."""
        self._copies = copies
        self.log = Log()
        self.reports = Reports(self.log)
        self.active = ActiveMembers("n", self.reports)

    def unacknowledged(self, client_id: str) -> list[LeaseName]:
        return [a_lease(place) for place in self._copies.get(client_id, ())]

    async def round(self) -> list[tuple[str, int | None, tuple[str, ...]]]:
        self.log.reported.clear()
        self.active.report(self.unacknowledged)
        await self.reports.flush()
        return self.log.reported


def a_lease(place: str) -> LeaseName:
    agent, _, partition = place.partition("/")
    return LeaseName(agent, int(partition), 1)  # type: ignore[arg-type]


async def test_a_client_is_reported_where_it_has_copies_and_acknowledged_none() -> None:
    scene = Scene(a=["queue/0", "queue/1", "queue/1", "pubsub/2"], b=["queue/1"], idle=["queue/1"])
    scene.active.acked("a", a_lease("queue/0"))
    scene.active.acked("b", None)  # a message of the broker's own
    assert await scene.round() == [("queue", 1, ("a", "b")), ("pubsub", 2, ("a",))]


async def test_each_round_reports_what_was_acknowledged_since_the_last_one() -> None:
    scene = Scene(a=["queue/0", "queue/1"])
    scene.active.acked("a", a_lease("queue/0"))
    assert await scene.round() == [("queue", 1, ("a",))]
    assert await scene.round() == []
    scene.active.acked("a", a_lease("queue/1"))
    assert await scene.round() == [("queue", 0, ("a",))]


@pytest.mark.parametrize(
    ("length", "count"), [(1, SENT_MAX), (SENT_BYTES_MAX // 4, 4)], ids=["many", "long"]
)
async def test_a_record_is_bounded(length: int, count: int) -> None:
    clients = [f"{number:0{length}}" for number in range(count + 1)]
    scene = Scene(**{client: ["queue/0"] for client in clients})
    for client in clients:
        scene.active.acked(client, None)
    assert await scene.round() == [
        ("queue", 0, tuple(clients[:count])),
        ("queue", 0, tuple(clients[count:])),
    ]


def test_the_shortest_time_for_an_acknowledgement_decides_how_often() -> None:
    rules = given.rules(given.queue("a/#", ack_timeout_s=60), given.pubsub("b/#", ack_timeout_s=6))
    assert report_interval_s(rules) == 2
    assert report_interval_s(Rules()) == 10
