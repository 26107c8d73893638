"""The log of a long-running process, on stderr: one line for each notable moment, as text or as JSON."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from millpond.pipeline.settings import LogSettings

CONSOLE_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
# Their lines below WARNING are for their own developers. Some of those lines show payloads.
LIBRARIES: Final = (
    "aiokafka", "faust", "mode", "amqtt", "transitions", "websockets", "aiohttp", "asyncio", "grpc",
    "opentelemetry", "urllib3",
)  # fmt: skip


class JsonLines(logging.Formatter):
    """Format a record as one JSON object on one line. docs/reference/metrics.md lists the fields."""

    def __init__(self, process: str) -> None:
        """`process` is the name of this process, for example `worker queue`."""
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
    """Start the log. Libraries log from WARNING on, or from `settings.level` on if that is higher."""
    handler = logging.StreamHandler(sys.stderr)
    json = settings.format == "json"
    handler.setFormatter(JsonLines(process) if json else logging.Formatter(CONSOLE_FORMAT))
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    logging.basicConfig(level=level, handlers=[handler], force=True)
    quiet_libraries(max(level, logging.WARNING))


def quiet_libraries(level: int) -> None:
    """Drop the libraries' lines below this level."""
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(level)
