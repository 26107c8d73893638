"""The notes of `millpond config check` about messages that are stored longer than the log. No server is needed."""

from __future__ import annotations

import pytest

from millpond.pipeline.operate.config_warnings import _retention
from tests.support import given

WEEK_H = 168
WEEK_S = WEEK_H * 3_600


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ((given.store(expired_time=WEEK_S),), []),
        ((given.store(expired_time=WEEK_S + 1),), [f"messages are kept {WEEK_S + 1} s"]),
        ((given.store("a/#"),), ["messages of 'a/#' never expire"]),
        ((given.retain("a/#"), given.store("a/#")), ["messages of 'a/#' never expire"]),
        ((given.queue("q/#"),), ["messages of 'q/#' never expire"]),
        ((given.queue("q/#", expired_time=60),), []),
        ((given.queue("q/#"), given.store("#", expired_time=60)), []),
        ((given.queue("q/#"), given.store("q/a", expired_time=60)), ["messages of 'q/#' never"]),
        ((given.receipt(), given.clear_retained(), given.command("INCR n")), []),
        (
            tuple(given.store(f"t/{at}") for at in range(7)),
            ["of 't/0', 't/1', 't/2', 't/3', 't/4' and 2 more never expire"],
        ),
        (
            (given.store("a", expired_time=WEEK_S + 1), given.retain("b")),
            ["are kept", "of 'b' never expire"],
        ),
    ],
)
def test_rules_whose_messages_outlive_the_log_are_named(
    tables: tuple[str, ...], expected: list[str]
) -> None:
    found = _retention(WEEK_H, given.rules(*tables))
    assert len(found) == len(expected)
    for note, words in zip(found, expected, strict=True):
        assert note.startswith("[kafka] retention_hours is 168, but messages")
        assert words in note
        assert note.endswith(": Redis can be rebuilt only as far back as the log goes")
