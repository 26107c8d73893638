"""The user's own commands, as effects."""

from __future__ import annotations

from collections.abc import Sequence

from millpond.agents.effects import DeadLetter, RunCommand
from millpond.schemas.events import Event
from millpond.schemas.rules.user_commands import command_values, forbidden_key, substitute


def run_commands(
    commands: Sequence[Sequence[str]], offset: int, event: Event
) -> list[RunCommand | DeadLetter]:
    """Each command with the event's values; one that would touch our own keys is given up on."""
    if not commands:
        return []
    values = command_values(event)
    effects: list[RunCommand | DeadLetter] = []
    for fields in commands:
        arguments = substitute(fields, values)
        error = forbidden_key(arguments)
        if error is None:
            effects.append(RunCommand(offset, tuple(arguments)))
        else:
            effects.append(DeadLetter(offset, error))
    return effects
