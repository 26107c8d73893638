"""The parts that stand alone in production: `worker`, `bridge`, `kafka`, `config`."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.table import Table

from agents.registry import AGENT_NAMES
from pipeline import topics
from pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    console,
    errors,
    load_settings,
)
from pipeline.logs import log_to_stderr
from schemas.errors import ConfigError

kafka = typer.Typer(help="Kafka's topics.", no_args_is_help=True)
config = typer.Typer(help="Settings and rules.", no_args_is_help=True)


def worker(
    agent: Annotated[str, typer.Argument(help=f"One of: {', '.join(AGENT_NAMES)}.")],
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Run one agent until SIGTERM; start more to share its partitions."""
    from pipeline.worker import run  # noqa: PLC0415  Faust is slow to import

    for name in AGENT_NAMES:
        if name == agent:
            settings, rules = load_settings(config, data)
            log_to_stderr(settings.log, f"worker {name}")
            run(name, settings, rules)
            return
    raise ConfigError(f"no agent {agent!r}: there are {', '.join(AGENT_NAMES)}")


def bridge(
    broker: Annotated[str, typer.Argument(help="One of: embedded.")],
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Connect one MQTT broker to Kafka until SIGTERM; `embedded` brings its own."""
    if broker != "embedded":
        raise ConfigError(f"no bridge {broker!r}: there is embedded")
    from pipeline.bridge import run_embedded  # noqa: PLC0415  needs the extra [local]

    settings, rules = load_settings(config, data)
    log_to_stderr(settings.log, f"bridge {broker}")
    run_embedded(settings, rules)


@kafka.command("init")
def kafka_init(config: ConfigOption = None, data: DataOption = DEFAULT_DATA) -> None:
    """Create the topics that are missing."""
    settings, _ = load_settings(config, data)
    created = asyncio.run(topics.create(settings.kafka))
    console.print(f"created {', '.join(created)}" if created else "all topics exist")


@kafka.command("check")
def kafka_check(config: ConfigOption = None, data: DataOption = DEFAULT_DATA) -> None:
    """Compare the topics with the settings; exit code 1 if anything differs."""
    settings, _ = load_settings(config, data)
    deviations = asyncio.run(topics.check(settings.kafka))
    for deviation in deviations:
        errors.print(deviation, markup=False, soft_wrap=True)
    if deviations:
        raise typer.Exit(1)
    console.print("all topics are as they should be")


@config.command("check")
def config_check(config: ConfigOption = None, data: DataOption = DEFAULT_DATA) -> None:
    """Read settings and rules as every part would, and show what they come to."""
    from pipeline.weaknesses import weaknesses  # noqa: PLC0415

    settings, rules = load_settings(config, data)
    table = Table("hook", "topic", "action", "expires", "agent", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for rule in rules.rules:
        agents = [
            name
            for name in ("sessions", "messages", "queue", "pubsub")
            if rule in rules.run_by(name)
        ]
        table.add_row(
            rule.hook,
            rule.topic or "",
            rule.action or "; ".join(" ".join(command) for command in rule.commands),
            "" if rule.expired_time is None else f"{rule.expired_time} s",
            ", ".join(agents),
        )
    console.print(table)
    for line in asyncio.run(weaknesses(settings, rules)):
        console.print(f"note: {line}", markup=False, soft_wrap=True)
    console.print("the configuration is valid")
