"""The log of a process, as text and as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from millpond.pipeline.process.logs import LIBRARIES, JsonLines, log_to_stderr
from millpond.pipeline.settings import LogSettings


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Restore the root logger and the libraries' loggers after the test."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_json_line_has_time_level_logger_message_process_and_pid(
    capsys: pytest.CaptureFixture[str],
) -> None:
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


def test_the_traceback_of_an_error_is_on_the_same_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        found = sys.exc_info()
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, found)
    line = json.loads(JsonLines("bridge emqx").format(record))
    assert "ValueError: wrong" in line["traceback"]
    assert "\n" not in JsonLines("bridge emqx").format(record)


def test_a_console_line_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(LogSettings(), "worker queue")
    logging.getLogger("millpond.x").info("ready")
    assert capsys.readouterr().err.endswith(" INFO millpond.x ready\n")


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [("debug", 10, 30), ("info", 20, 30), ("warning", 30, 30), ("error", 40, 40)],
)
def test_libraries_log_from_warning_on_or_from_a_higher_level(
    level: str, ours: int, theirs: int
) -> None:
    log_to_stderr(LogSettings(level=level), "p")  # type: ignore[arg-type]  # each of them is one
    assert logging.getLogger("millpond.x").getEffectiveLevel() == ours
    for name in LIBRARIES:
        assert logging.getLogger(f"{name}.inside").getEffectiveLevel() == theirs
