"""How a process of ours shows that it is ready: a line in its log, and a file for who started it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

READY_FILE: Final = "MILLPOND_READY_FILE"  # the environment's name for the file to touch


def say_ready(what: str) -> None:
    """Say it; as often as it is true anew."""
    logger.info("%s is ready", what)
    ready_file = os.environ.get(READY_FILE)
    if ready_file:
        Path(ready_file).touch()
