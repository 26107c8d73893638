"""What the commands share: options, settings, questions to the user, and output as JSON, text or tables.

Answers go to stdout through `console`. Errors, questions and progress go to stderr through `errors`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.settings import STACK_FILE, Settings, load
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.rules import Rules

DEFAULT_DATA: Final = Path(".millpond")
PIPED_WIDTH: Final = 1_000  # columns of a table in a pipe: grep finds a row on one line
ID_LENGTH: Final = (
    40  # a message id up to this length is not folded, so it can be copied; EMQX's have 32
)

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="A millpond.toml or an emqx_backend_redis.conf.", show_default=False
    ),
]
DataOption = Annotated[
    Path, typer.Option("--data", file_okay=False, help="The data directory of `millpond up`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


# -- arguments ---------------------------------------------------------------------------------------------------------


def load_settings(
    config: Path | None, data: Path, warn: Callable[[str], None] = lambda _: None
) -> tuple[Settings, Rules]:
    """Load `--config`, else the settings of the stack in `--data`, else the defaults and the environment.

    `warn` gets a sentence for each thing that the user wrote and that has no effect.

    Raises:
        ConfigError: `--data` is given, and holds no stack. Defaults would lead to another one.
    """
    if config is not None:
        return load(config, warn=warn)
    of_stack = data / STACK_FILE
    if of_stack.exists():
        return load(of_stack, warn=warn)
    if data != DEFAULT_DATA:
        raise no_stack(data)
    return load(None, warn=warn)


def no_stack(data: Path) -> ConfigError:
    """The error about a `--data` in which `millpond up` never ran."""
    return ConfigError(f"--data: {data} holds no stack: `millpond up --data {data}` makes one")


def agent_named(name: str, *others: str) -> AgentName:
    """Find an agent by its name.

    Raises:
        ConfigError: no agent has this name. The message lists the agents, and `others` that the command accepts.
    """
    for agent in AGENT_NAMES:
        if agent == name:
            return agent
    raise ConfigError(f"no agent {name!r}: there are {', '.join((*AGENT_NAMES, *others))}")


# -- questions ---------------------------------------------------------------------------------------------------------


def can_ask() -> bool:
    """True if stdin is a terminal, where a user can answer."""
    return sys.stdin.isatty()


def cannot_ask(command: str) -> ConfigError:
    """The error of a command that needs a confirmation and has no terminal."""
    return ConfigError(f"{command} needs a confirmation, and stdin is no terminal: add --yes")


def confirm(question: str) -> None:
    """Ask on the terminal, and return if the answer is yes.

    Raises:
        MillpondError: the answer is anything else.
    """
    # typer.confirm writes a part of its prompt to stdout, and a script may read that.
    errors.print(f"{question} [y/N]", end=" ", markup=False, soft_wrap=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise MillpondError("not confirmed: nothing was changed")


# -- output ------------------------------------------------------------------------------------------------------------


def print_json(answer: Any, *, indent: bool = False) -> None:
    """Print JSON: one line, or many lines with `indent`. Structs become objects."""
    option = orjson.OPT_INDENT_2 if indent else None
    sys.stdout.buffer.write(
        orjson.dumps(answer, default=msgspec.to_builtins, option=option) + b"\n"
    )
    sys.stdout.buffer.flush()


def say(line: str = "") -> None:
    """Print one line of text, however long."""
    console.print(printable(line), markup=False, soft_wrap=True)


def printable(text: str, kept: str = "") -> str:
    """Escape characters that could move the terminal's cursor, except those in `kept`.

    Publishers choose topics, client ids and payloads. None of them may rewrite what the terminal shows.
    """
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )


def cell(text: object) -> str:
    """Text from outside, as a cell of a table: no control characters, no markup."""
    return escape(printable(str(text)))


def utc_time(at_ms: int) -> str:
    """A time in UTC, to the second."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%SZ}"


def facts_table() -> Table:
    """An empty table of names and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def listing(*columns: str) -> Table:
    """An empty table with these columns, which fold long values."""
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    return table


def show(table: Table) -> None:
    """Print a table. In a pipe it is so wide that each row is one line."""
    to = console if console.is_terminal else Console(width=PIPED_WIDTH, highlight=False)
    to.print(table)
