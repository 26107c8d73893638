"""The data directory of a stack.

| path | content |
|---|---|
| `millpond.toml` | the settings of this run; other commands with the same `--data` use it, too |
| `stack.json` | the state: addresses, processes, readiness |
| `log/NAME.log` | the output of one process |
| `NAME.ready` | exists once a process is ready |
| `kafka/`, `redis/`, `spool/` | the data of Kafka, of Redis, and of an EMQX bridge |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import tomli_w
from msgspec import Struct

from millpond.pipeline.settings import Settings
from millpond.pipeline.stack.processes import Process


class ChildState(Struct):
    """One child process as `millpond status` shows it."""

    name: str
    process: Process | None
    ready: bool
    restarts: int
    telemetry: str | None = None  # the URL of its metrics and health, if it has them


class StackState(Struct):
    """The state of a running stack. `ready` becomes true when all children have been ready, and stays so."""

    supervisor: Process
    addresses: dict[str, str]
    children: list[ChildState]
    ready: bool = False


class DataDirectory:
    """The paths and files below `--data`."""

    def __init__(self, root: Path) -> None:
        """The directory need not exist yet: see `create`."""
        self.root = root.absolute()

    def create(self) -> None:
        """Create the directory. Only its owner may read it, since it holds all messages."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.root / "log").mkdir(exist_ok=True)

    @property
    def configuration(self) -> Path:
        """The file with the settings of every process of the stack."""
        return self.root / "millpond.toml"

    def log(self, name: str) -> Path:
        """The log file of one child."""
        return self.root / "log" / f"{name.replace(' ', '-')}.log"

    def ready_file(self, name: str) -> Path:
        """The file that a child touches when it is ready."""
        return self.root / f"{name.replace(' ', '-')}.ready"

    def write_configuration(self, settings: Settings) -> None:
        """Write the settings for the children and for other commands."""
        text = tomli_w.dumps(_without_none(msgspec.to_builtins(settings)))
        self.configuration.write_text(text, "utf-8")

    def write_state(self, state: StackState) -> None:
        """Replace the state atomically: a reader sees the old or the new one."""
        partial = self.root / "stack.json.partial"
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
        partial.rename(self.root / "stack.json")

    def read_state(self) -> StackState | None:
        """The state of the stack that runs here, or that was killed; None if there is none."""
        try:
            return msgspec.json.decode((self.root / "stack.json").read_bytes(), type=StackState)
        except (OSError, msgspec.DecodeError):
            return None

    def forget_state(self) -> None:
        """Delete the state after the stack has stopped."""
        (self.root / "stack.json").unlink(missing_ok=True)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
