"""`millpond rebuild`: make an agent's state again from the log, in its own Redis."""

from __future__ import annotations

from typing import Annotated

import typer

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.cli import common
from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    YesOption,
    agent_named,
    confirm,
    load_settings,
    say,
)
from millpond.pipeline.cli.replay_commands import watched
from millpond.pipeline.rebuild.rebuild import RebuildPlan, rebuilding
from millpond.pipeline.replay.run import run_until_done
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import AgentName


def rebuild(
    agent: Annotated[str, typer.Argument(help=f"One of: {', '.join(AGENT_NAMES)}.")],
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss", help="Rebuild even if the log no longer has all that Redis stores."
        ),
    ] = False,
    yes: YesOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Make an agent's state in Redis again from the log. Its workers must be stopped."""
    name = agent_named(agent)
    if not (yes or common.can_ask()):
        raise common.cannot_ask("rebuild")
    settings, rules = load_settings(config, data)

    async def work() -> None:
        async with rebuilding(name, settings, rules) as run:
            plan = await run.plan()
            _print_plan(name, plan)
            if plan.losses and not accept_loss:
                raise MillpondError(
                    f"the log does not have everything that Redis stores: {'; '.join(plan.losses)};"
                    " --accept-loss rebuilds all the same"
                )
            if not yes:
                confirm(f"Rebuild {name}?")
            await watched(run.run, run, as_json=False)
        say(f"{name} is rebuilt: its workers may start")

    run_until_done(
        work, f"interrupted: once a rebuild has begun, no worker of {name} starts"
        f" before another `millpond rebuild {name}` has finished it",
    )  # fmt: skip


def _print_plan(agent: AgentName, plan: RebuildPlan) -> None:
    for note in plan.notes:
        say(f"note: {note}")
    say(
        f"removes the state of {agent} in {plan.partitions} partitions ({plan.messages} stored messages), and folds"
        f" {plan.records} records; user commands are not run again"
    )
