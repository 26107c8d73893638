"""The command `millpond`: parses arguments, prints answers; everything else is done elsewhere."""

from __future__ import annotations

from millpond.pipeline.cli.main import main

__all__ = ["main"]
