"""`--help` of every command: it is printed, and with the whole text of each argument and option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from millpond.pipeline.cli.main import app


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and all of its subcommands, each with the words to type."""
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, *path, name)


COMMANDS = list(commands(get_command(app)))


def without_layout(text: str) -> str:
    """Only the characters of the words: a help screen breaks lines anywhere and draws boxes around them."""
    return "".join(each for each in text if each not in " \n\r`│╭╮╰╯─")


def test_subcommands_are_found() -> None:
    paths = [path for path, _ in COMMANDS]
    assert {(), ("replay",), ("dead-letters",), ("dead-letters", "drop")} <= set(paths)


@pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=[" ".join(path) for path, _ in COMMANDS]
)
def test_help_has_the_text_of_the_command_and_of_each_parameter(
    path: tuple[str, ...], command: Any
) -> None:
    # Given a terminal so wide that no text is cut into columns of other texts.
    done = CliRunner(env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).invoke(app, [*path, "--help"])
    assert (done.exit_code, done.exception) == (0, None), done.output
    shown = without_layout(done.stdout)
    # Brackets in a text must not be taken for markup.
    for text in (command.help, *(getattr(each, "help", None) for each in command.params)):
        assert without_layout(text or "") in shown
