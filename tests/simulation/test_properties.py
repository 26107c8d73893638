"""Properties of logs of the messages agent: the content depends on neither batches nor owners, and equals a short model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from millpond.agents.ports import Record
from millpond.agents.topics import dedup, state_cache, storage
from millpond.agents.topics.dedup import SeenIds
from millpond.pipeline.stores.memory.server import MemoryServer, Zset
from millpond.schemas import keys
from millpond.schemas.events import Event, MessagePublished, RulesChanged, Tick
from tests.simulation import judge
from tests.support import given as given_
from tests.support.partition import PARTITION

LIMIT_MS = 2_000  # lifetime of an index entry; a retained entry lives a second longer
WINDOW_MS = 3_000
START_MS = 100_000
RULES = given_.rules(
    given_.store("t/#", expired_time=2), given_.retain("t/#", expired_time=3),
    given_.clear_retained(), given_.retain("kept"), given_.store("kept"),
    given_.command("INCR seen:${msgid}"), given_.receipt(expired_time=2),
)  # fmt: skip
OTHER_RULES = given_.rules(
    given_.a_rule(hook="session.subscribed", topic="t/1", action="on_message_fetch_for_queue"),
    given_.store("t/#"),
    given_.retain("t/#", expired_time=1),
    given_.store("kept", expired_time=1),
)
Kind = Literal["publish", "tick", "ack", "other rules", "rules", "poison"]
# As in a broker, an id always names the same message.
MESSAGES: dict[str, dict[str, object]] = {
    "a": {"topic": "t/0", "retain": True},
    "b": {"topic": "t/0", "retain": True, "qos": 0},
    "c": {"topic": "t/0"},
    "d": {"topic": "t/0", "retain": True, "payload": ""},
    "e": {"topic": "t/0", "retain": True, "expires": 0},
    "f": {"topic": "t/1", "expires": LIMIT_MS},
    "g": {"topic": "t/1"},
    "h": {"topic": "kept", "retain": True},
    "i": {"topic": "kept", "retain": True, "qos": 0},
}


class Step(NamedTuple):
    kind: Kind
    message_id: str
    later_ms: int


steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(
            ["publish"] * 12 + ["tick"] * 4 + ["ack", "other rules", "rules", "poison"]
        ),
        st.sampled_from("aaabbbccdeefghi"),
        st.sampled_from([0, 0, 0, 0, 1, LIMIT_MS - 1, LIMIT_MS, LIMIT_MS + 1, WINDOW_MS, -1]),
    ),
    max_size=30,
)
cuts = st.lists(st.integers(1, 5), min_size=1, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "DEDUP_WINDOW_MS", WINDOW_MS)
        patch.setattr(dedup, "GENERATION_IDS_MAX", 3)
        patch.setattr("millpond.agents.topics.due_times.SWEEP_DUE_MAX", 2)
        patch.setattr(storage, "SWEEP_ENTRIES_MAX", 3)
        patch.setattr(state_cache, "STATES_HELD_MAX", 1)
        yield


def expand(log: Sequence[Step]) -> list[tuple[int, Event | bytes]]:
    """Return the events of a log with their timestamps."""
    now_ms, events, known = START_MS, list[tuple[int, Event | bytes]](), dict[str, Event]()
    for kind, message_id, later_ms in log:
        now_ms += later_ms
        event: Event | bytes
        match kind:
            case "publish":
                event = known.setdefault(message_id, message(message_id, now_ms))
            case "tick":
                event = Tick(at=0, node="n", agent="messages")
            case "ack":
                event = given_.acked(message_id)
            case "poison":
                event = b"poison"
            case _:
                rules = (OTHER_RULES if kind == "other rules" else RULES).canonical()
                event = RulesChanged(at=0, node="n", agent="messages", rules=rules)
        events.append((now_ms, event))
    return events


def message(message_id: str, now_ms: int) -> MessagePublished:
    fields = dict(MESSAGES[message_id])
    expires = fields.pop("expires", None)
    if isinstance(expires, int):
        fields["expires_at"] = now_ms + expires
    return given_.published(message_id, **fields)  # type: ignore[arg-type]


def records(events: Sequence[tuple[int, Event | bytes]]) -> list[Record]:
    pairs = [
        (b"t", event) if isinstance(event, bytes) else given_.key_and_value(event)
        for _, event in events
    ]
    times = [at for at, _ in events]
    return (
        [
            Record(at, *rest)
            for at, rest in enumerate(zip(times, *zip(*pairs, strict=True), strict=True))
        ]
        if pairs
        else []
    )


@given(steps, cuts)
@settings(deadline=None)
def test_the_content_does_not_depend_on_batches_and_owners(
    log: list[Step], sizes: list[int]
) -> None:
    log_records = records(expand(log))
    assume(log_records)
    at_once = judge.clean_fold(log_records, RULES)
    judge.check_equal(judge.clean_fold(log_records, RULES, run_records_max=1), at_once)
    for owners in (False, True):
        folded = judge.fold_with_restarts(log_records, RULES, sizes, owners=owners, again=2)
        judge.check_equal(folded, at_once)


@given(steps)
@settings(deadline=None)
def test_the_invariants_hold_after_every_prefix_of_a_log(log: list[Step]) -> None:
    log_records = records(expand(log))
    for end in range(len(log_records) + 1):
        judge.check_conservation(judge.clean_fold(log_records[:end], RULES))


def with_final_ticks(events: list[tuple[int, Event | bytes]]) -> list[tuple[int, Event | bytes]]:
    """Append enough ticks, at the last timestamp, to finish all work that is due."""
    latest_ms = max((at for at, _ in events), default=START_MS)
    return events + [(latest_ms, Tick(at=0, node="n", agent="messages"))] * (2 * len(events) + 2)


@given(steps)
@settings(deadline=None)
def test_nothing_is_overdue_after_enough_ticks(log: list[Step]) -> None:
    events = with_final_ticks(expand(log))
    server = judge.clean_fold(records(events), RULES)
    judge.check_nothing_overdue(server, max(at for at, _ in events))


@given(steps)
@settings(deadline=None)
def test_a_repeated_publish_changes_nothing(log: list[Step]) -> None:
    once = expand(log)
    twice = [event for event in once for _ in range(1 + isinstance(event[1], MessagePublished))]
    assert without_scores(judge.clean_fold(records(twice), RULES)) == without_scores(
        judge.clean_fold(records(once), RULES)
    )


def without_scores(server: MemoryServer) -> dict[str, object]:
    """Return the content without scores and states: a repeat can move later scores by a microsecond."""
    left_out = {keys.applied(PARTITION), keys.journal(PARTITION), keys.table(PARTITION, "states")}
    return {
        name: list(value) if isinstance(value, Zset) else value
        for name, value in sorted(server.values.items())
        if name not in left_out
    }


class Model:
    """The model: index entries and retained entries, each with its end. A body exists while one of them does."""

    def __init__(self) -> None:
        self.index: dict[str, dict[str, int | None]] = {}
        self.retained: dict[str, tuple[str, int | None]] = {}
        self.now_ms = self.score = 0
        self.seen = SeenIds()

    def fold(self, at: int, event: Event | bytes) -> None:
        self.now_ms = max(self.now_ms, at)
        if not isinstance(event, bytes):
            self.score = max(at * 1000, self.score + 1)
        if isinstance(event, MessagePublished) and self.seen.add(event.message_id, self.now_ms):
            if event.expires_at is None or event.expires_at > self.now_ms:
                self.publish(event, expires="kept" not in event.topic)
        elif isinstance(event, Tick):
            self.tick()

    def publish(self, event: MessagePublished, expires: bool) -> None:
        topic, own = event.topic, event.expires_at

        def end(lifetime_ms: int) -> int | None:
            ends = [
                x
                for x in (self.score // 1000 + lifetime_ms if expires else None, own)
                if x is not None
            ]
            return min(ends, default=None)

        if event.qos:
            self.index.setdefault(topic, {}).setdefault(event.message_id, end(LIMIT_MS))
        if event.retain and event.payload:
            self.retained[topic] = event.message_id, end(LIMIT_MS + 1_000)
        elif event.retain:
            self.retained.pop(topic, None)

    def tick(self) -> None:
        def over(end: int | None) -> bool:
            return end is not None and end <= self.now_ms

        for topic, entries in self.index.items():
            self.index[topic] = {name: end for name, end in entries.items() if not over(end)}
        self.retained = {
            topic: entry for topic, entry in self.retained.items() if not over(entry[1])
        }

    @property
    def bodies(self) -> set[str]:
        retained = {message_id for message_id, _ in self.retained.values()}
        return retained.union(*self.index.values())


@given(steps)
@settings(deadline=None)
def test_the_store_has_the_content_of_the_model(log: list[Step]) -> None:
    fixed = [step for step in log if step.kind not in ("other rules", "rules", "tick")]
    events, model = with_final_ticks(expand(fixed)), Model()
    for at, event in events:
        model.fold(at, event)
    server = judge.clean_fold(records(events), RULES)
    for topic in ("t/0", "t/1", "kept"):
        index = server.of(keys.message_index(topic), Zset)
        assert [name for name, _ in index.ordered()] == list(model.index.get(topic, {}))
        retained = server.of(keys.retained(topic), Zset)
        assert list(retained) == [
            message_id for message_id, _ in [model.retained.get(topic, ("", 0))] if message_id
        ]
    bodies = {name for name in MESSAGES if keys.message_body(name) in server.values}
    assert bodies == model.bodies
