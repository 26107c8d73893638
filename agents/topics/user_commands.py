"""User commands: the Redis commands in the rules, as effects."""

from __future__ import annotations

from collections.abc import Sequence

from millpond.agents.effects import DeadLetter, RunCommand
from millpond.schemas.events import Event
from millpond.schemas.rules.user_commands import command_values, forbidden_key, substitute


def run_commands(
    commands: Sequence[Sequence[str]], offset: int, event: Event
) -> list[RunCommand | DeadLetter]:
    """Substitute the event's values into each command. One with a key of Millpond's own becomes a dead letter."""
    if not commands:
        return []
    values = command_values(event)
    effects: list[RunCommand | DeadLetter] = []
    for fields in commands:
        arguments = substitute(fields, values)
        error = forbidden_key(fields, arguments)
        if error is None:
            effects.append(RunCommand(offset, tuple(arguments)))
        else:
            effects.append(DeadLetter(offset, error))
    return effects
