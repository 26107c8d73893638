"""`millpond logs`: the logs of a stack's processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from millpond.pipeline.cli.common import DEFAULT_DATA, DataOption, no_stack, say
from millpond.pipeline.settings import STACK_FILE
from millpond.schemas.errors import ConfigError

POLL_S: Final = 0.2


def logs(
    name: Annotated[
        str | None, typer.Argument(help="One process, as `millpond status` names it, or `up`.")
    ] = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="Show only the last lines of each log.")
    ] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show new lines, too, until Ctrl-C.")
    ] = False,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Show the logs of the processes of `millpond up`, of one or of all."""
    if not (data / STACK_FILE).exists():
        raise no_stack(data)
    files = {file.stem: file for file in sorted((data / "log").glob("*.log"))}
    if name is not None:
        wanted = name.replace(" ", "-")
        if wanted not in files:
            raise ConfigError(f"no log of {name!r}: there are {', '.join(files) or 'none'}")
        files = {wanted: files[wanted]}
    width = max(map(len, files), default=0)
    shown = [
        _Log(f"{each:{width}} | " if name is None else "", file) for each, file in files.items()
    ]
    for log in shown:
        log.show_last(lines)
    while follow:
        try:
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            return
        for log in shown:
            log.show_new()


class _Log:
    """A log file, and how much of it was shown."""

    def __init__(self, prefix: str, file: Path) -> None:
        self._prefix, self._file = prefix, file
        self._read = 0  # bytes

    def show_last(self, count: int) -> None:
        """Print the last lines."""
        found = list(self._complete_lines())
        for line in found[len(found) - min(count, len(found)) :]:
            say(self._prefix + line)

    def show_new(self) -> None:
        """Print the lines that were written since."""
        for line in self._complete_lines():
            say(self._prefix + line)

    def _complete_lines(self) -> Iterator[str]:
        """Read the lines that were not read. A line without its end is read later."""
        if self._file.stat().st_size < self._read:
            self._read = 0  # `up --detach` began its log again
        with self._file.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._read += len(complete)
        yield from complete.decode("utf-8", "replace").splitlines()
