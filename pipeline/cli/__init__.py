"""The command `millpond`. It parses arguments and prints answers; other packages do the work."""

from __future__ import annotations

from millpond.pipeline.cli.main import main

__all__ = ["main"]
