"""`millpond replay`: recorded events into another Redis, compared with the live one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, TypeVar

import orjson
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
    console,
    errors,
    load_settings,
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
from millpond.schemas.errors import ConfigError
from millpond.schemas.events import AgentName

SHOWN_MAX: Final = 200  # differences in the table; --json has all
VALUE_LENGTH: Final = 60
WATCH_INTERVAL_S: Final = 0.2

Result = TypeVar("Result")

IntoOption = Annotated[
    str, typer.Option("--into", help="redis://[user@]host[:port][/database] of another store.")
]


def replay(
    agent: Annotated[str, typer.Argument(help=f"One of: {', '.join(AGENT_NAMES)}, all.")],
    into: IntoOption,
    begins: Annotated[str, typer.Option("--from", help="earliest, or an ISO time.")] = EARLIEST,
    ends: Annotated[str, typer.Option("--to", help="latest, or an ISO time.")] = LATEST,
    diff: Annotated[
        str | None, typer.Option("--diff", help="Compare with this Redis, as live has it now.")
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option("--password-file", help="Of --into, if not the pool's; empty for none."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Fold recorded events into another Redis; nothing is delivered, and live is not disturbed."""
    agents = agents_named(agent)
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
        f"interrupted: {into} is marked as incomplete; the same command goes on where it was",
    )
    _tell(outcome, as_json=as_json)
    if outcome.compared is not None and outcome.compared.differences:
        raise typer.Exit(1)


def agents_named(name: str) -> tuple[AgentName, ...]:
    """The agents that an argument names.

    Raises:
        ConfigError: there is none of that name.
    """
    found = tuple(each for each in AGENT_NAMES if name in (each, "all"))
    if not found:
        raise ConfigError(f"no agent {name!r}: there are {', '.join(AGENT_NAMES)}, all")
    return found


class Rate(ProgressColumn):
    """Records per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


class Watched(Protocol):
    """What has a position."""

    @property
    def agent(self) -> str:
        """Whose log is being folded."""
        ...

    @property
    def total(self) -> int:
        """How many offsets there are to go by; 0 while that is not known."""
        ...

    @property
    def folded(self) -> int:
        """How many have gone by."""
        ...


async def watched(work: Callable[[], Awaitable[Result]], run: Watched, *, as_json: bool) -> Result:
    """Do the work, with rate, position and time left on a terminal."""
    # What lives here is a batch, or for ever: see `pipeline/worker/worker.py`.
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


def _tell(outcome: ReplayResult, *, as_json: bool) -> None:
    compared = outcome.compared
    if as_json:
        told: dict[str, Any] = {"records": outcome.records, "notes": outcome.notes}
        if compared is not None:
            told["diff"] = {
                "keys": compared.keys, "equal": not compared.differences and not compared.more,
                "more": compared.more, "differences": [described(each) for each in compared.differences],
            }  # fmt: skip
        typer.echo(orjson.dumps(told).decode())
        return
    for note in outcome.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"replayed {outcome.records} records", soft_wrap=True)
    if compared is not None:
        _tell_differences(compared)


def _tell_differences(compared: Comparison) -> None:
    found = compared.differences
    if not found:
        console.print(f"no difference in {compared.keys} keys", soft_wrap=True)
        return
    console.print(difference_table(found[:SHOWN_MAX]))
    if len(found) > SHOWN_MAX:
        console.print(f"and {len(found) - SHOWN_MAX} more: --json shows them all")
    counts = {
        kind: sum(each.what == kind for each in found) for kind in ("added", "missing", "changed")
    }
    summed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    more = ", and more that was not looked at" if compared.more else ""
    console.print(f"differences in {compared.keys} keys: {summed}{more}", soft_wrap=True)


def difference_table(found: Sequence[Difference]) -> Table:
    """A line for each."""
    table = Table("", "key", "field", "live", "replayed", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for each in found:
        told = described(each)
        cells = (told["what"], told["key"], told["field"] or "", told["live"], told["replayed"])
        table.add_row(*(Text(_cut(cell)) for cell in cells))
    return table


def _cut(value: str | None) -> str:
    shown = "" if value is None else value
    return shown if len(shown) <= VALUE_LENGTH else f"{shown[: VALUE_LENGTH - 1]}…"


def described(difference: Difference) -> dict[str, Any]:
    """In JSON; bytes that are no text are escaped."""
    item = difference.item
    field = "(lifetime)" if item.kind == "lifetime" else _text(item.field) or None
    return {
        "what": difference.what, "key": _text(item.key), "field": field,
        "live": _text(difference.live), "replayed": _text(difference.replayed),
    }  # fmt: skip


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace").replace("\0", "\\0")
