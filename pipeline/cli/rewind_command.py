"""`millpond rewind`: have one subscriber read a pubsub topic again."""

from __future__ import annotations

import asyncio
from typing import Annotated

import orjson
import typer

from millpond.pipeline.cli.common import DEFAULT_DATA, ConfigOption, DataOption, load_settings
from millpond.pipeline.operate import operator_events
from millpond.pipeline.operate.rewind import find_place


def rewind(
    subscriber: Annotated[
        str, typer.Option("--subscriber", help="A client id, or $share/{group}/{filter}.")
    ],
    topic: Annotated[str, typer.Option("--topic", "-t", help="The pubsub topic.")],
    to: Annotated[
        str, typer.Option("--to", help="earliest, latest, an ISO time, or a message id.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many messages would come.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Have one subscriber of a pubsub topic read on from another place, while everything runs."""
    settings, rules = load_settings(config, data)

    async def run() -> int:
        order, place = await find_place(settings, rules, subscriber, topic, to)
        if not dry_run:
            await operator_events.write(settings.kafka, [order])
        return place.messages

    messages = asyncio.run(run())
    if as_json:
        told = {"subscriber": subscriber, "topic": topic, "to": to, "messages": messages}
        typer.echo(orjson.dumps({**told, "dry_run": dry_run}).decode())
        return
    will = "would" if dry_run else "will"
    counted = f"{messages} message{'' if messages == 1 else 's'}"
    typer.echo(f"{subscriber} {will} read {topic} from {to} on: {counted} as of now")
