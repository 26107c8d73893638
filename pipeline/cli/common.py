"""What all commands share: options, settings, consoles, and how an error is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from millpond.pipeline.settings import Settings, load
from millpond.schemas.rules import Rules

DEFAULT_DATA = Path(".millpond")

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="A millpond.toml or an emqx_backend_redis.conf.", show_default=False
    ),
]
DataOption = Annotated[Path, typer.Option("--data", help="The directory of a `millpond up`.")]


def load_settings(config: Path | None, data: Path) -> tuple[Settings, Rules]:
    """From --config; else from the stack in --data; else the defaults and the environment."""
    running = data / "millpond.toml"
    return load(config or (running if running.exists() else None))
