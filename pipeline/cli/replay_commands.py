"""`millpond replay`: fold the log into another Redis, and compare that with the live one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, TypeVar

import typer
from msgspec import structs
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    JsonOption,
    agent_named,
    console,
    errors,
    load_settings,
    print_json,
    say,
)
from millpond.pipeline.compare.differences import Comparison, Difference
from millpond.pipeline.replay.run import (
    EARLIEST,
    LATEST,
    Replay,
    ReplayRequest,
    ReplayResult,
    run_until_done,
)
from millpond.pipeline.settings import pool_at, read_secret
from millpond.schemas.events import AgentName

SHOWN_MAX: Final = 200  # differences in the table; --json has all
VALUE_LENGTH: Final = 60  # characters of a value in the table
ALL_AGENTS: Final = "all"
WATCH_INTERVAL_S: Final = 0.2

Result = TypeVar("Result")

IntoOption = Annotated[
    str, typer.Option("--into", help="The other store: redis://[user@]host[:port][/database].")
]


def replay(
    agent: Annotated[str, typer.Argument(help=f"One of: {', '.join(AGENT_NAMES)}, {ALL_AGENTS}.")],
    into: IntoOption,
    begins: Annotated[str, typer.Option("--from", help="earliest, or an ISO time.")] = EARLIEST,
    ends: Annotated[str, typer.Option("--to", help="latest, or an ISO time.")] = LATEST,
    diff: Annotated[
        str | None, typer.Option("--diff", help="The live Redis to compare the result with.")
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(
            "--password-file",
            help="The password file of --into, if it is not the pool's. An empty file is no password.",
        ),
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Fold the log into another Redis. Nothing is delivered, and the live store is not affected."""
    agents = _agents_named(agent)
    settings, rules = load_settings(config, data)
    pool = rules.pool(agents[0])
    target = pool_at(pool, into, "--into")
    if password_file is not None:
        secret = read_secret(str(password_file), "--password-file")
        target = structs.replace(target, password=secret or None, password_file=None)
    live = None if diff is None else pool_at(pool, diff, "--diff")
    run = Replay(settings, rules, ReplayRequest(agents, target, begins, ends, live))
    outcome = run_until_done(
        lambda: watched(run.run, run, as_json=as_json),
        f"interrupted: {into} is marked as incomplete; the same command continues",
    )
    _print_result(outcome, as_json=as_json)
    if outcome.compared is not None and outcome.compared.differences:
        raise typer.Exit(1)


def _agents_named(name: str) -> tuple[AgentName, ...]:
    """The agent of this name, or all agents.

    Raises:
        ConfigError: no agent has this name.
    """
    return AGENT_NAMES if name == ALL_AGENTS else (agent_named(name, ALL_AGENTS),)


class Rate(ProgressColumn):
    """Records per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


class Watched(Protocol):
    """A run with a position in the log."""

    @property
    def agent(self) -> str:
        """The agent whose log is being folded."""
        ...

    @property
    def total(self) -> int:
        """How many offsets there are to fold; 0 while that is unknown."""
        ...

    @property
    def folded(self) -> int:
        """How many offsets are folded."""
        ...


async def watched(work: Callable[[], Awaitable[Result]], run: Watched, *, as_json: bool) -> Result:
    """Run `work`, and show rate, position and time left on a terminal."""
    # Objects live for one batch or for ever, so frequent collections find little: see `pipeline/worker/worker.py`.
    gc.set_threshold(50_000, 20, 50)
    working = asyncio.ensure_future(work())
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(),
    )  # fmt: skip
    shown = errors.is_terminal and not as_json
    try:
        with Progress(*columns, console=errors, transient=True, disable=not shown) as progress:
            bar = progress.add_task("replay", total=None)
            while not working.done():
                await asyncio.wait((working,), timeout=WATCH_INTERVAL_S)
                progress.update(
                    bar, description=run.agent, completed=run.folded, total=run.total or None
                )
        return await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def _print_result(outcome: ReplayResult, *, as_json: bool) -> None:
    compared = outcome.compared
    if as_json:
        answer: dict[str, Any] = {"records": outcome.records, "notes": outcome.notes}
        if compared is not None:
            answer["diff"] = {
                "keys": compared.keys, "equal": not compared.differences and not compared.more,
                "more": compared.more, "differences": [described(each) for each in compared.differences],
            }  # fmt: skip
        print_json(answer)
        return
    for note in outcome.notes:
        say(f"note: {note}")
    say(f"replayed {outcome.records} records")
    if compared is not None:
        _print_differences(compared)


def _print_differences(compared: Comparison) -> None:
    found = compared.differences
    if not found:
        say(f"no difference in {compared.keys} keys")
        return
    console.print(_difference_table(found[:SHOWN_MAX]))
    if len(found) > SHOWN_MAX:
        say(f"and {len(found) - SHOWN_MAX} more: --json shows all")
    counts = {
        kind: sum(each.what == kind for each in found) for kind in ("added", "missing", "changed")
    }
    total = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    more = "; too many differ to compare all of them again" if compared.more else ""
    say(f"differences in {compared.keys} keys: {total}{more}")


def _difference_table(found: Sequence[Difference]) -> Table:
    table = Table("", "key", "field", "live", "replayed", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for each in found:
        row = described(each)
        cells = (row["what"], row["key"], row["field"] or "", row["live"], row["replayed"])
        table.add_row(*(Text(_cut(cell)) for cell in cells))
    return table


def _cut(value: str | None) -> str:
    shown = "" if value is None else value
    return shown if len(shown) <= VALUE_LENGTH else f"{shown[: VALUE_LENGTH - 1]}…"


def described(difference: Difference) -> dict[str, Any]:
    """One difference for JSON. Bytes that are no UTF-8 are escaped."""
    item = difference.item
    field = "(lifetime)" if item.kind == "lifetime" else _text(item.field) or None
    return {
        "what": difference.what, "key": _text(item.key), "field": field,
        "live": _text(difference.live), "replayed": _text(difference.replayed),
    }  # fmt: skip


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace").replace("\0", "\\0")
