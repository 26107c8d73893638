"""`millpond rebuild`: an agent's state made anew from the log, in place."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    console,
    errors,
    load_settings,
)
from millpond.pipeline.cli.dead_letter_commands import someone_is_there
from millpond.pipeline.cli.replay_commands import watched
from millpond.pipeline.rebuild.rebuild import RebuildPlan, rebuilding
from millpond.pipeline.replay.run import run_until_done
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName


def rebuild(
    agent: Annotated[str, typer.Argument(help=f"One of: {', '.join(AGENT_NAMES)}.")],
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Also if the log is younger than what is kept.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Make an agent's state in Redis anew from the log; its workers have to be stopped."""
    names = [each for each in AGENT_NAMES if each == agent]
    if not names:
        raise ConfigError(f"no agent {agent!r}: there are {', '.join(AGENT_NAMES)}")
    if not (yes or someone_is_there()):
        raise ConfigError("nobody is at a terminal to confirm what rebuild shall do: add --yes")
    name: AgentName = names[0]
    settings, rules = load_settings(config, data)

    async def work() -> None:
        async with rebuilding(name, settings, rules) as run:
            plan = await run.plan()
            _tell(name, plan)
            if plan.losses and not accept_loss:
                raise MillpondError(
                    f"the log does not bring all of it back: {'; '.join(plan.losses)}; --accept-loss goes on all the same"
                )
            if not yes:
                _confirm(f"Rebuild {name}?")
            await watched(run.run, run, as_json=False)
        console.print(f"{name} is rebuilt: its workers may start", soft_wrap=True)

    run_until_done(
        work, f"interrupted: if it had begun, workers of {name} do not start until it is finished"
        f" by another `millpond rebuild {name}`",
    )  # fmt: skip


def _tell(agent: AgentName, plan: RebuildPlan) -> None:
    """What it is about to do."""
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(
        f"removes what {agent} keeps in {plan.partitions} partitions ({plan.messages} stored messages), and folds"
        f" {plan.records} records; commands of yours are not run again",
        soft_wrap=True,
    )


def _confirm(question: str) -> None:
    errors.print(f"{question} [y/N]", end=" ", markup=False, soft_wrap=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise MillpondError("not confirmed, so nothing was changed")
