"""Readiness of a process: a line in its log, and a file for its parent process."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from millpond.pipeline.settings import READY_FILE

logger = logging.getLogger(__name__)


def report_ready(what: str) -> None:
    """Log that `what` is ready, and touch the ready file. May be called again, for example after a rebalance."""
    logger.info("%s is ready", what)
    ready_file = os.environ.get(READY_FILE)
    if ready_file:
        Path(ready_file).touch()
