"""The commands of a production set-up: `worker`, `bridge`, `kafka init`, `kafka check` and `config check`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    agent_named,
    console,
    errors,
    load_settings,
    say,
)
from millpond.pipeline.kafka import topics as kafka_topics
from millpond.pipeline.process.extras import extra
from millpond.pipeline.process.logs import log_to_stderr
from millpond.pipeline.process.signals import run as run_command
from millpond.pipeline.settings import Settings
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

kafka = typer.Typer(help="Create and check the Kafka topics.", no_args_is_help=True)
config = typer.Typer(help="Check settings and rules.", no_args_is_help=True)


def worker(
    agent: Annotated[str, typer.Argument(help=f"One of: {', '.join(AGENT_NAMES)}.")],
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Run one worker of an agent until SIGTERM. Several workers of an agent share its partitions."""
    from millpond.pipeline.worker.worker import run  # noqa: PLC0415  Faust is slow to import

    name = agent_named(agent)
    settings, rules = _load_and_log(config, data, f"worker {name}")
    run(name, settings, rules)


def bridge(
    broker: Annotated[str, typer.Argument(help="One of: embedded, emqx, emqx-kafka.")],
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
    topics: Annotated[
        str | None,
        typer.Option(help="For emqx-kafka: the Kafka topics that EMQX writes events to, a,b,…"),
    ] = None,
) -> None:
    """Connect an MQTT broker to Kafka until SIGTERM.

    `embedded` runs a broker in this process. `emqx` serves EMQX's ExHook. `emqx-kafka` reads the events that EMQX's
    rules write to Kafka.
    """
    if (topics is not None) != (broker == "emqx-kafka"):
        raise ConfigError("the bridge emqx-kafka needs --topics, and no other bridge takes it")
    settings, rules = _load_and_log(config, data, f"bridge {broker}")
    if broker == "embedded":
        with extra("local", "`millpond bridge embedded`"):
            from millpond.pipeline.brokers.embedded.bridge import run_embedded  # noqa: PLC0415

        run_embedded(settings, rules)
    elif broker == "emqx":
        with extra("emqx", "`millpond bridge emqx`"):
            from millpond.pipeline.brokers.emqx.bridge import run_emqx  # noqa: PLC0415

        run_emqx(settings, rules)
    elif topics is not None:
        from millpond.pipeline.brokers.emqx.rule_events.bridge import run_emqx_kafka  # noqa: PLC0415  not for all

        run_emqx_kafka(settings, rules, _source_topics(topics))
    else:
        raise ConfigError(f"no bridge {broker!r}: there are embedded, emqx, emqx-kafka")


def _load_and_log(config: Path | None, data: Path, process: str) -> tuple[Settings, Rules]:
    """Load settings and rules, begin the log as they say, and log what in them has no effect."""
    warnings: list[str] = []
    settings, rules = load_settings(config, data, warnings.append)
    log_to_stderr(settings.log, process)
    for warning in warnings:
        logger.warning("%s", warning)
    return settings, rules


def _source_topics(text: str) -> list[str]:
    """Split `a,b,…` into Kafka topics, each once.

    Raises:
        ConfigError: the list is empty, or names a topic of Millpond.
    """
    names = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    own = sorted(set(names) & set(keys.TOPICS))
    if own:
        raise ConfigError(
            f"--topics: {', '.join(own)} is a topic of Millpond; name topics that EMQX writes"
        )
    if not names:
        raise ConfigError("--topics: the list is empty")
    return names


@kafka.command("init")
def kafka_init(config: ConfigOption = None, data: DataOption = DEFAULT_DATA) -> None:
    """Create the Kafka topics that do not exist."""
    settings, _ = load_settings(config, data)
    created = run_command(kafka_topics.create(settings.kafka))
    console.print(f"created {', '.join(created)}" if created else "all topics exist")


@kafka.command("check")
def kafka_check(config: ConfigOption = None, data: DataOption = DEFAULT_DATA) -> None:
    """Compare the Kafka topics with the settings. The exit code is 1 if a topic differs."""
    settings, _ = load_settings(config, data)
    deviations = run_command(kafka_topics.check(settings.kafka, settings.app))
    for deviation in deviations:
        errors.print(deviation, markup=False, soft_wrap=True)
    if deviations:
        raise typer.Exit(1)
    console.print("all topics match the settings")


@config.command("check")
def config_check(
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
    *,
    offline: Annotated[
        bool, typer.Option("--offline", help="Check the files alone, and ask no server.")
    ] = False,
) -> None:
    """Load settings and rules as a worker does, show the rules, and try what the processes will do.

    It reads the files that the settings name, logs in, and asks each server. The exit code is 1 if something would not
    run, and 2 if the files are wrong.
    """
    settings, rules = load_settings(config, data, lambda line: say(f"warning: {line}"))
    table = Table("hook", "topic", "action", "expires", "agent", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for rule in rules.rules:
        agents = [
            name
            for name in ("sessions", "messages", "queue", "pubsub")
            if rule in rules.of_agent(name)
        ]
        table.add_row(
            rule.hook,
            rule.topic or "",
            rule.action or "; ".join(" ".join(command) for command in rule.commands),
            "" if rule.expired_time is None else f"{rule.expired_time} s",
            ", ".join(agents),
        )
    console.print(table)
    if not offline:
        from millpond.pipeline.operate.config_warnings import examine  # noqa: PLC0415  not for --offline

        found = run_command(examine(settings, rules))
        for line in found.notes:
            say(f"note: {line}")
        for line in found.errors:
            say(f"error: {line}")
        if found.errors:
            raise typer.Exit(1)
    console.print("the configuration is valid")
