"""`millpond lag`: how far each agent is behind."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import msgspec
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
)
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain import sentences
from millpond.pipeline.operate.lag import AgentLag, LagReader, lags
from millpond.pipeline.settings import Settings
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Rules


def lag(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    every: Annotated[
        bool, typer.Option("--partitions", "-p", help="Each partition, not only the agents.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, help="Seconds between looks, with --watch.")
    ] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, and with --watch one per look.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """How many records each agent has yet to apply, and how old the oldest of them is."""
    settings, rules = load_settings(config, data)
    if watch and not (as_json or console.is_terminal):
        raise ConfigError("--watch needs a terminal, or --json")
    try:
        asyncio.run(_look(settings, rules, watch, every, interval, as_json))
    except KeyboardInterrupt:
        if not watch:
            raise


async def _look(
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
        with Live(tables(found, every), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                found = await lags(offsets, settings, rules)
                live.update(tables(found, every), refresh=True)


def _print(found: list[AgentLag], every: bool, as_json: bool) -> None:
    if not as_json:
        console.print(tables(found, every))
        return
    sys.stdout.buffer.write(msgspec.json.encode(described(found)) + b"\n")
    sys.stdout.buffer.flush()


def described(found: list[AgentLag]) -> dict[str, Any]:
    """All of it, for scripts; times are ms since the epoch."""
    return {
        "at": now_ms(),
        "agents": [
            {
                "agent": each.agent,
                "behind": each.behind,
                "uncommitted": each.uncommitted,
                "oldest_at": each.oldest_at,
                "partitions": [
                    {**msgspec.to_builtins(one), "behind": one.behind} for one in each.partitions
                ],
            }
            for each in found
        ],
    }


def tables(found: list[AgentLag], every: bool) -> Table | Group:
    """The agents; and each of their partitions, if that is wanted."""
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
