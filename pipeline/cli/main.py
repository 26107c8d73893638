"""The list of all commands, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from aiokafka.errors import KafkaError

from millpond import __version__
from millpond.pipeline.cli import (
    client_commands,
    dead_letter_commands,
    explain_command,
    lag_command,
    logs_command,
    mqtt_commands,
    process_commands,
    rebuild_command,
    redis_command,
    replay_commands,
    rewind_command,
    stack_commands,
    topics_command,
    web_command,
)
from millpond.pipeline.cli.common import console, errors
from millpond.pipeline.process.child import FAILURE_EXIT_CODE, USAGE_EXIT_CODE
from millpond.pipeline.process.logs import quiet_libraries
from millpond.schemas.errors import ConfigError, MillpondError

app = typer.Typer(
    help="Store what an MQTT broker forgets: its events go through Kafka and Faust into Redis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich's own markup would take the brackets of a URL such as redis://host[:port][/database] for tags.
    rich_markup_mode="markdown",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"millpond {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    pass


app.command()(stack_commands.up)
app.command()(stack_commands.down)
app.command()(stack_commands.status)
app.command()(logs_command.logs)
app.command()(process_commands.worker)
app.command()(process_commands.bridge)
app.add_typer(client_commands.clients, name="clients")
app.add_typer(dead_letter_commands.commands, name="dead-letters")
app.command()(explain_command.explain)
app.command()(topics_command.topics)
app.command()(lag_command.lag)
app.command()(web_command.web)
app.add_typer(process_commands.kafka, name="kafka")
app.add_typer(process_commands.config, name="config")
app.command()(mqtt_commands.pub)
app.command()(mqtt_commands.sub)
app.command()(rewind_command.rewind)
app.command()(replay_commands.replay)
app.command()(rebuild_command.rebuild)
app.command(context_settings={"ignore_unknown_options": True})(redis_command.redis)


def main() -> None:
    """Run one command. An error is one sentence on stderr, never a traceback."""
    # Libraries would log the same error beside our sentence. Long-running processes raise the level again.
    quiet_libraries(logging.CRITICAL)
    try:
        app(prog_name="millpond")
    except ConfigError as error:
        # One line for each fault, so that a user mends a file in one round.
        _fail("\nmillpond: ".join(map(str, error.faults)), USAGE_EXIT_CODE)
    except MillpondError as error:
        _fail(str(error), FAILURE_EXIT_CODE)
    except KafkaError as error:
        _fail(f"Kafka: {error}", FAILURE_EXIT_CODE)


def _fail(reason: str, exit_code: int) -> None:
    # The reason is the last line. aiokafka and asyncio log what they left open when the interpreter ends.
    logging.disable(logging.CRITICAL)
    errors.print(f"millpond: {reason}", markup=False, soft_wrap=True)
    sys.exit(exit_code)
