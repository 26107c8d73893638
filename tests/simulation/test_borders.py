"""However a log is folded, the same comes of it: logs of many seeds, and those that once showed a difference.

Bugs planted by hand, with the first seed that showed each:

| planted | seed |
|---|---|
| the needs of one tick are not added up | 32 |
| reports of leases that the batch is yet to make are not counted | 128 |
| the room that an acknowledgement makes is not counted | 7 |
| members take turns in the order in which they were loaded | 10 |
| interrupted rounds continue in the order in which members were loaded | 14 |
| a window is evicted while its batch is on its way | 0 |
| an index is read while a batch is on its way | 2 |
| a message's place is read while a batch is on its way | 741 |
| a window is trimmed, and not how far it was read | 3 |
| a step stops before the last message that was read | 5 |
| a round ends where memory does | 273 |
| a pause is noticed by a member without room | 36 |
| a member that a batch was told of is forgotten before it is in the store | 84 |
| a member on its way through everything is taken for idle | 3 |
| what overflows is not read | 1 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import pytest

from millpond.agents.ports import Record
from millpond.schemas.events import (
    AgentName,
    DeliveriesSent,
    DeliveryFailed,
    Event,
    OperatorRequeue,
    RulesChanged,
    Sent,
)
from millpond.schemas.rules import Rules
from tests.simulation import borders
from tests.simulation.borders import Scene, differs, judge_seed
from tests.support import given
from tests.support.delivery import AT

SEEDS, CHUNK = 240, 40
WAYS_TRIED = 2 * len(borders.WAYS)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_neither_batches_nor_owners_nor_memory_decide(first: int) -> None:
    for seed in range(first, first + CHUNK):
        print(f"seed {seed}")  # shown if it fails
        judge_seed(seed)


class Found(NamedTuple):
    """A log of two kinds of folding that once did not agree; each event has its time in ms."""

    agent: AgentName
    rules: str
    log: Sequence[tuple[int, Event]]
    limits: Mapping[str, int] = MappingProxyType({})

    @property
    def scene(self) -> Scene:
        return Scene(self.agent, given.rules(self.rules), self.limits)

    @property
    def records(self) -> list[Record]:
        return [given.record(event, at, ms) for at, (ms, event) in enumerate(self.log)]


def stored(*names: str, at: int, topic: str = "t/0") -> list[tuple[int, Event]]:
    return [(at, given.published(name, topic)) for name in names]


def too_large(lease: str, client: str, name: str) -> Event:
    return DeliveryFailed(
        **AT, agent="pubsub", lease=lease, client_id=client, message_id=name, reason="too_large"
    )


LATEST: Rules = given.rules(given.pubsub("t/#", max_inflight=2, start="latest"))
WIDER: Rules = given.rules(given.queue("t/#", max_inflight=2))
SHARED = "$share/g/t/+"
FOUND: dict[str, Found] = {
    "two members on their round in one tick took from what was read for one of them": Found(
        "queue", given.queue("t/#", max_inflight=2), [
            *stored("m1", "m2", "m3", "m4", "m5", at=10_000),
            (10_000, given.joined("a", "#", source_offset=1)),
            (10_000, given.joined("b", SHARED, source_offset=2)),
            (10_000, given.tick("queue")),
        ],
    ),
    "a member on its round took from what was read for a window that was due in the same tick": Found(
        "queue", given.queue("t/#", max_inflight=2, max_deliveries=1, ack_timeout_s=2), [
            *stored("m1", "m2", "m3", "m4", "m5", "m6", "m7", at=10_000),
            (10_000, given.joined("c", "t/0", source_offset=1)),
            (10_000, DeliveriesSent(**AT, agent="queue", sent=(
                Sent("queue/0/1", "c", "m1", None, 1), Sent("queue/0/2", "c", "m2", None, 1),
            ))),
            (12_000, given.joined("a", "#", source_offset=2)),
            (12_000, given.tick("queue")),
        ],
    ),
    "a retained message of a pubsub topic expired when its topic was not in memory": Found(
        "pubsub", given.pubsub("t/#") + given.retain("t/#", expired_time=1), [
            (10_000, given.published("m1", "t/0", retain=True)),
            (12_000, given.tick("pubsub")),
        ],
    ),
    "a group that had never joined was gone in memory alone": Found(
        "pubsub", given.pubsub("t/#", offset_retention_s=60), [
            (10_000, given.left("b", "$share/h/t/1", source_offset=1)),
            (80_000, given.tick("pubsub")),
        ],
    ),
    "a reader was read ahead for where it did not begin after all": Found(
        "pubsub", given.pubsub("t/#", max_inflight=2), [
            *stored("m1", "m2", at=10_000),
            (10_000, given.acked("m9", "t/0", client_id="b")),
            *stored("m3", "m4", at=30_000),
            (30_000, RulesChanged(**AT, agent="pubsub", rules=LATEST.canonical())),
            (30_000, given.joined("b", "t/0", source_offset=1, subscribed_at=29_999)),
        ],
    ),
    "what was trimmed while its reader was away counted as read ahead": Found(
        "pubsub", given.pubsub("t/#", max_inflight=2, max_length=4), [
            *stored("m1", "m2", at=10_000),
            (17_000, given.joined("c", SHARED, qos=0, source_offset=1)),
            *stored("m3", at=18_000),
            (20_000, given.left("c", SHARED, reason="disconnected", source_offset=2)),
            *stored("m4", "m5", "m6", at=21_000),
            (21_000, given.joined("c", SHARED, source_offset=3)),
            (21_000, given.tick("pubsub")),
        ],
    ),
    "an acknowledgement shared its batch with the join of a group that was not in memory": Found(
        "pubsub", given.pubsub("t/#", max_inflight=2), [
            *stored("m1", "m2", "m3", "m4", at=10_000),
            (10_000, given.joined("b", "$share/g/t/0", source_offset=1)),
            (10_000, given.acked("m1", "t/0", client_id="b")),
            (10_000, given.acked("m2", "t/0", client_id="b")),
        ],
    ),
    "a member that came back was served at once from where its room was not read for": Found(
        "queue", given.queue("t/#", max_inflight=2, max_length=4), [
            (10_000, given.joined("a", "t/0", source_offset=1)),
            *stored("m1", "m2", "m3", "m4", at=10_000),
            (10_000, DeliveriesSent(**AT, agent="queue", sent=(
                Sent("queue/0/1", "a", "m1", None, 1), Sent("queue/0/2", "a", "m2", None, 1),
            ))),
            *stored("m5", at=10_000),
            (80_000, given.left("a", "t/0", reason="unsubscribed", source_offset=2)),
            (80_000, given.joined("a", "t/+", source_offset=3)),
        ],
    ),
    "a new connection made room, and what waited elsewhere was not looked for": Found(
        "queue", given.queue("t/#", max_inflight=1), [
            (10_000, given.joined("a", "t/1", source_offset=1)),
            (10_000, given.joined("b", "#", source_offset=2)),
            (10_000, given.joined("b", "t/1", source_offset=3)),
            *((10_000, given.tick("queue")) for _ in range(3)),
            *stored("m1", at=10_000, topic="t/1"),
            (10_000, DeliveryFailed(
                **AT, agent="queue", lease="queue/0/1", client_id="a", message_id="m1", reason="no_client",
            )),
            (10_000, DeliveriesSent(**AT, agent="queue", sent=(Sent("queue/0/2", "b", "m1", None, 1),))),
            (10_000, given.acked("m1", "t/1", client_id="a")),
            *stored("m2", at=10_000),
            (10_000, given.joined("b", "t/1", source_offset=4)),
            *stored("m3", at=10_000),
        ],
    ),
    "a reader was read ahead for from the earlier of two joins, and began at the later": Found(
        "pubsub", given.pubsub("t/#", max_inflight=3, start="latest"), [
            *stored("m1", "m2", "m3", "m4", "m5", at=10_000),
            *stored("m6", "m7", "m8", at=24_000),
            (24_000, given.joined("c", "$share/h/t/0", source_offset=1, subscribed_at=24_000)),
            (24_000, given.joined("c", "$share/h/t/0", source_offset=2)),
        ],
    ),
    "a resumption served a member whose round ended in the same tick": Found(
        "queue", given.queue("t/0", max_inflight=1) + given.queue("t/1", max_inflight=3), [
            *stored("m1", "m2", at=10_000),
            (10_000, given.joined("a", "t/+", source_offset=1)),
            (10_000, given.tick("queue")),
            (10_000, RulesChanged(**AT, agent="queue", rules=WIDER.canonical())),
            (10_000, given.tick("queue")),
        ], {f"{module}.PAGE_MAX": 1 for module in borders.PAGES},
    ),
    "a message was leased and died in one batch, and had been dead before": Found(
        "pubsub", given.pubsub("t/#", max_inflight=1), [
            *stored("m1", "m2", at=10_000),
            (10_000, given.joined("b", "$share/g/t/0", source_offset=1)),
            (10_000, too_large("pubsub/0/1", "b", "m1")),
            (10_000, OperatorRequeue(**AT, topic="t/0", message_id="m1")),
            (10_000, DeliveriesSent(**AT, agent="pubsub", sent=(Sent("pubsub/0/2", "b", "m2", None, 0),))),
            (10_000, too_large("pubsub/0/3", "b", "m1")),
        ],
    ),
    "a reader was forgotten by one event of a batch, and began anew by the next": Found(
        "pubsub", given.pubsub("t/#"), [
            *stored("m1", at=10_000),
            (10_000, given.joined("d", "#", source_offset=1)),
            (10_000, given.tick("pubsub")),
            (10_000, given.acked("m1", "t/0", client_id="d")),
            (10_000, given.left("d", "#", reason="unsubscribed", source_offset=2)),
            (10_000, given.acked("m1", "t/0", client_id="d")),
            (10_000, given.joined("d", "t/0", source_offset=3)),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once_stays_right(name: str) -> None:
    found = FOUND[name]
    assert differs(found.scene, found.records, 4 * WAYS_TRIED) is None


# A publish that is repeated after its id was forgotten. It needs another order of effects, or a place for each publish.
YOUNG_IDS = {"millpond.agents.topics.dedup.DEDUP_WINDOW_MS": 1_500}
OPEN: dict[str, Found] = {
    "a late repeat is ignored only in the batch in which its message left the queue": Found(
        "queue", given.queue("t/#", max_length=1), [
            *stored("m1", "m2", at=10_000),
            *stored("m3", at=20_000, topic="t/1"),
            *stored("m1", at=20_000),
        ], YOUNG_IDS,
    ),
    "a late repeat of what its topic log still has is at its new place in memory alone": Found(
        "pubsub", given.pubsub("t/#", max_inflight=1), [
            (10_000, given.joined("b", "$share/g/t/0", source_offset=1)),
            (10_000, given.joined("a", "$share/g/t/0", source_offset=2)),
            *stored("m1", at=10_000),
            *stored("m2", "m1", at=71_000),
            (71_000, given.tick("pubsub")),
        ], {**YOUNG_IDS, "millpond.agents.delivery.leasing.SEND_TIMEOUT_MS": borders.SEND_MS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.xfail(raises=AssertionError, reason="the seen ids alone make a repeat harmless")
def test_what_is_known_and_not_mended_yet(name: str) -> None:
    found = OPEN[name]
    assert differs(found.scene, found.records, 4 * WAYS_TRIED) is None
