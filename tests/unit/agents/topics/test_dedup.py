"""Seen ids are recognised for a window, in bounded memory, whatever the borders of batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.agents.effects import WriteSeen
from millpond.agents.topics import dedup
from millpond.agents.topics.dedup import DEDUP_WINDOW_MS, SeenIds


class StoredIds:
    """A ten-line model of the store: two lists of ids, by parity."""

    def __init__(self) -> None:
        self.ids: list[list[str]] = [[], []]

    def write(self, writes: list[WriteSeen]) -> None:
        for write in writes:
            parity = write.generation & 1
            before = [] if write.fresh else self.ids[parity]
            self.ids[parity] = [*before, *write.message_ids]


def test_an_id_is_new_once() -> None:
    ids = SeenIds()
    assert ids.add("a", 0)
    assert not ids.add("a", 0)


def test_an_id_is_recognised_within_the_window_across_two_generations() -> None:
    ids = SeenIds()
    ids.add("a", 0)
    ids.add("b", DEDUP_WINDOW_MS - 1)
    assert not ids.add("b", DEDUP_WINDOW_MS)
    assert ids.add("c", DEDUP_WINDOW_MS)
    assert not ids.add("b", 2 * DEDUP_WINDOW_MS - 2)


def test_an_id_is_forgotten_after_two_generations() -> None:
    ids = SeenIds()
    ids.add("a", 1)
    ids.add("b", DEDUP_WINDOW_MS + 1)
    ids.add("c", 2 * DEDUP_WINDOW_MS + 1)
    assert ids.add("a", 2 * DEDUP_WINDOW_MS + 1)


def test_an_id_is_forgotten_after_a_long_silence() -> None:
    ids = SeenIds()
    ids.add("a", DEDUP_WINDOW_MS)
    ids.add("b", 5 * DEDUP_WINDOW_MS)
    assert ids.add("a", 5 * DEDUP_WINDOW_MS)


def test_never_more_than_two_full_generations_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dedup, "GENERATION_IDS_MAX", 3)
    ids, stored = SeenIds(), StoredIds()
    for number in range(20):
        ids.add(str(number), 1)
        stored.write(ids.finish())
        assert sum(map(len, stored.ids)) <= 6
    assert not ids.add("19", 1)
    assert ids.add("0", 1)


steps = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),
        st.sampled_from(
            [
                0,
                0,
                0,
                1,
                DEDUP_WINDOW_MS - 1,
                DEDUP_WINDOW_MS,
                DEDUP_WINDOW_MS + 1,
                2 * DEDUP_WINDOW_MS,
            ]
        ),
        st.sampled_from(["continue", "continue", "end batch", "restart"]),
    ),
    max_size=40,
)


@given(steps)
def test_borders_of_batches_and_restarts_change_no_answer(log: list[tuple[str, int, str]]) -> None:
    live, batched, stored, now_ms = SeenIds(), SeenIds(), StoredIds(), 1
    for message_id, later, then in log:
        now_ms += later
        assert batched.add(message_id, now_ms) == live.add(message_id, now_ms)
        if then != "continue":
            stored.write(batched.finish())
        if then == "restart":
            state = batched.partition_state()
            batched = SeenIds()
            batched.restore(state, stored.ids)
