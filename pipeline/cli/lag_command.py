"""`millpond lag`: how many records each agent has not applied."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    console,
    load_settings,
    print_json,
)
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain import sentences
from millpond.pipeline.operate.lag import AgentLag, LagReader, lags
from millpond.pipeline.process.signals import run
from millpond.pipeline.settings import Settings
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Rules


def lag(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat until Ctrl-C.")] = False,
    every: Annotated[
        bool, typer.Option("--partitions", "-p", help="Show each partition, too.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, help="Seconds between two readings of --watch.")
    ] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with --watch one per reading.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Show how many records each agent has not applied, and how old the oldest of them is."""
    settings, rules = load_settings(config, data)
    if watch and not (as_json or console.is_terminal):
        raise ConfigError("--watch needs a terminal, or --json")
    try:
        run(_run(settings, rules, watch, every, interval, as_json))
    except KeyboardInterrupt:
        if not watch:
            raise


async def _run(
    settings: Settings, rules: Rules, watch: bool, every: bool, interval: float, as_json: bool
) -> None:
    async with LagReader(settings.kafka, settings.app) as offsets:
        found = await lags(offsets, settings, rules)
        if not watch:
            _print(found, every, as_json)
            return
        if as_json:
            while True:
                _print(found, every, as_json)
                await asyncio.sleep(interval)
                found = await lags(offsets, settings, rules)
        with Live(_tables(found, every), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                found = await lags(offsets, settings, rules)
                live.update(_tables(found, every), refresh=True)


def _print(found: list[AgentLag], every: bool, as_json: bool) -> None:
    if as_json:
        answer: dict[str, Any] = {
            "at": now_ms(),
            "agents": [each.describe() for each in found],
        }
        print_json(answer)
    else:
        console.print(_tables(found, every))


def _tables(found: list[AgentLag], every: bool) -> Table | Group:
    """The agents, and their partitions if `every` asks for them."""
    now = now_ms()
    agents = _table("agent", "partitions", "behind", "oldest", "uncommitted")
    for each in found:
        agents.add_row(
            each.agent, str(len(each.partitions)), str(each.behind), _age(each.oldest_at, now),
            str(each.uncommitted),
        )  # fmt: skip
    if not every:
        return agents
    partitions = _table("agent", "partition", "committed", "applied", "end", "behind", "oldest")
    for each in found:
        for one in each.partitions:
            partitions.add_row(
                one.agent, str(one.partition), _offset(one.committed), _offset(one.applied),
                str(one.end), str(one.behind), _age(one.oldest_at, now),
            )  # fmt: skip
    return Group(agents, "", partitions)


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _offset(offset: int | None) -> str:
    return "none" if offset is None else str(offset)


def _age(at: int | None, now: int) -> str:
    return "" if at is None else sentences.age(now - at)
