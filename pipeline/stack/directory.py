"""The data directory of a stack: where its data, logs and state are, and what other commands learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import tomli_w
from msgspec import Struct

from millpond.pipeline.settings import Settings
from millpond.pipeline.stack.processes import Process


class ChildState(Struct):
    """One child as `millpond status` shows it."""

    name: str
    process: Process | None
    ready: bool
    restarts: int
    telemetry: str | None = None  # the URL of its metrics and health


class StackState(Struct):
    """What a running stack says of itself. `ready` turns true once everything has been ready."""

    supervisor: Process
    addresses: dict[str, str]
    children: list[ChildState]
    ready: bool = False


class DataDirectory:
    """Paths and files below `--data`."""

    def __init__(self, root: Path) -> None:
        """Made by `create`."""
        self.root = root.absolute()

    def create(self) -> None:
        """Readable by its owner only: it holds everybody's messages."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.root / "log").mkdir(exist_ok=True)

    @property
    def configuration(self) -> Path:
        """The settings that every part of the stack was started with."""
        return self.root / "millpond.toml"

    def log(self, name: str) -> Path:
        """The log of one child."""
        return self.root / "log" / f"{name.replace(' ', '-')}.log"

    def ready_file(self, name: str) -> Path:
        """Touched by a child when it is ready."""
        return self.root / f"{name.replace(' ', '-')}.ready"

    def write_configuration(self, settings: Settings) -> None:
        """Leave the settings for the children, and for every other command."""
        self.configuration.write_text(tomli_w.dumps(_without_none(msgspec.to_builtins(settings))))

    def write_state(self, state: StackState) -> None:
        """Replace the state at once: a reader sees the old or the new one."""
        partial = self.root / "stack.json.partial"
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
        partial.rename(self.root / "stack.json")

    def read_state(self) -> StackState | None:
        """The state of the stack that runs here, or ran last; None if there never was one."""
        try:
            return msgspec.json.decode((self.root / "stack.json").read_bytes(), type=StackState)
        except (OSError, msgspec.DecodeError):
            return None

    def forget_state(self) -> None:
        """Nothing runs here any more."""
        (self.root / "stack.json").unlink(missing_ok=True)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
