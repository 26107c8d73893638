"""Lines of a log: for people, and for programs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from millpond.pipeline.process.logs import LIBRARIES, JsonLines, log_to_stderr
from millpond.pipeline.settings import LogSettings


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The root logger, and those of the libraries, as they were."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_json_line_says_when_how_bad_who_and_what(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(LogSettings(format="json"), "worker queue")
    logging.getLogger("millpond.x").warning('%s: two\nlines of "text" ü', "queue/3")
    (text,) = capsys.readouterr().err.splitlines()
    line = json.loads(text)
    assert line["time"].endswith("Z")
    assert line.items() >= {
        "level": "warning", "logger": "millpond.x", "process": "worker queue",
        "message": 'queue/3: two\nlines of "text" ü',
    }.items()  # fmt: skip
    assert line.keys() == {"time", "level", "logger", "message", "process", "pid"}


def test_an_error_keeps_its_traceback_on_its_one_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        found = sys.exc_info()
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, found)
    line = json.loads(JsonLines("bridge emqx").format(record))
    assert "ValueError: wrong" in line["traceback"]
    assert "\n" not in JsonLines("bridge emqx").format(record)


def test_the_console_has_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(LogSettings(), "worker queue")
    logging.getLogger("millpond.x").info("ready")
    assert capsys.readouterr().err.endswith(" INFO millpond.x ready\n")


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [("debug", 10, 30), ("info", 20, 30), ("warning", 30, 30), ("error", 40, 40)],
)
def test_libraries_are_heard_from_warnings_on(level: str, ours: int, theirs: int) -> None:
    log_to_stderr(LogSettings(level=level), "p")  # type: ignore[arg-type]  # each of them is one
    assert logging.getLogger("millpond.x").getEffectiveLevel() == ours
    for name in LIBRARIES:
        assert logging.getLogger(f"{name}.inside").getEffectiveLevel() == theirs
