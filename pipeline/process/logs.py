"""The log of a process that runs for long: one line for each notable moment, on stderr, for people or for programs."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from millpond.pipeline.settings import LogSettings

CONSOLE_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
# What these say below a warning is for their own developers, and some of it shows payloads.
LIBRARIES: Final = (
    "aiokafka", "faust", "mode", "amqtt", "transitions", "websockets", "aiohttp", "asyncio", "grpc",
    "opentelemetry", "urllib3",
)  # fmt: skip


class JsonLines(logging.Formatter):
    """One object per line: time (UTC), level, logger, message, process, pid, and the traceback of an error."""

    def __init__(self, process: str) -> None:
        """`process` is what runs here: `worker queue`."""
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": self._process,
            "pid": os.getpid(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_to_stderr(settings: LogSettings, process: str) -> None:
    """Begin to log. The libraries are heard from WARNING on, or from `settings.level` on if that is higher."""
    handler = logging.StreamHandler(sys.stderr)
    json = settings.format == "json"
    handler.setFormatter(JsonLines(process) if json else logging.Formatter(CONSOLE_FORMAT))
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    logging.basicConfig(level=level, handlers=[handler], force=True)
    quiet_libraries(max(level, logging.WARNING))


def quiet_libraries(level: int) -> None:
    """Let the libraries' logs through from this level on."""
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(level)
