"""`millpond rewind`: move the read offset of one subscriber of a pubsub topic."""

from __future__ import annotations

from typing import Annotated

import typer

from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    JsonOption,
    load_settings,
    print_json,
)
from millpond.pipeline.operate import operator_events
from millpond.pipeline.operate.rewind import find_place
from millpond.pipeline.process.signals import run as run_command


def rewind(
    subscriber: Annotated[
        str, typer.Option("--subscriber", help="A client id, or $share/{group}/{filter}.")
    ],
    topic: Annotated[str, typer.Option("--topic", "-t", help="The pubsub topic.")],
    to: Annotated[
        str, typer.Option("--to", help="earliest, latest, an ISO time, or a message id.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count the messages to deliver.")
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Move the read offset of one subscriber of a pubsub topic, while everything runs."""
    settings, rules = load_settings(config, data)

    async def run() -> int:
        order, place = await find_place(settings, rules, subscriber, topic, to)
        if not dry_run:
            await operator_events.write(settings.kafka, [order])
        return place.messages

    messages = run_command(run())
    if as_json:
        answer = {"subscriber": subscriber, "topic": topic, "to": to, "messages": messages}
        print_json({**answer, "dry_run": dry_run})
        return
    will = "would" if dry_run else "will"
    counted = f"{messages} message{'' if messages == 1 else 's'}"
    typer.echo(f"{subscriber} {will} read {topic} from {to} on: {counted} as of now")
