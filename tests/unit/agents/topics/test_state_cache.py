"""The cache of states: what it forgets, and when."""

from __future__ import annotations

import pytest

from millpond.agents.topics import state_cache
from millpond.agents.topics.state_cache import StateCache


def unpack(packed: bytes | None) -> str:
    return "" if packed is None else packed.decode()


@pytest.fixture(autouse=True)
def _two_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_cache, "STATES_HELD_MAX", 2)


def batch(states: StateCache[str], *keys: str, changed: str = "") -> None:
    """One batch that asks for these states, and changes some; the store has it at once."""
    states.supply(dict.fromkeys(states.unknown(keys), b""))
    for key in changed:
        states.touch(1, key)
    list(states.finish())
    states.settled()


def test_beyond_the_limit_the_state_that_was_used_the_longest_ago_is_forgotten() -> None:
    states = StateCache(unpack)
    batch(states, "a", "b")
    batch(states, "a")
    batch(states, "c")
    assert states.unknown("abc") == ("b",)
    assert list(states.values()) == ["", ""]


def test_what_the_store_may_not_have_yet_stays_however_much_that_is() -> None:
    states = StateCache(unpack)
    states.supply(dict.fromkeys("abcd", b""))
    for key in "abc":
        states.touch(1, key)
    list(states.finish())
    assert states.unknown("abcd") == ("d",)
    states.supply({"d": b""})
    list(states.finish())
    assert states.unknown("abcd") == ("d",)
    states.settled()
    states.settled()
    batch(states, "e")
    assert states.unknown("abcde") == ("a", "b", "d")
