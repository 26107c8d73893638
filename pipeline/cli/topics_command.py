"""`millpond topics`: the deepest topics, or one topic."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.status import Status

from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    JsonOption,
    cell,
    errors,
    listing,
    load_settings,
    print_json,
    say,
    show,
)
from millpond.pipeline.cli.explain_command import show_topic
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain import sentences
from millpond.pipeline.explain import topic as one_topic
from millpond.pipeline.explain.topics import LISTED_MAX, TopicList, deepest
from millpond.pipeline.process.signals import run


def topics(
    topic: Annotated[str | None, typer.Argument(help="Show this topic in full.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="How many topics to list, the deepest.")
    ] = LISTED_MAX,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """List the topics with the most messages, the deepest first; or show one topic and its subscribers."""
    settings, rules = load_settings(config, data)
    if topic is not None:
        show_topic(run(one_topic.explain(settings, rules, topic)), as_json=as_json)
        return
    with Status("reading the state of all partitions", console=errors):
        found = run(deepest(settings, rules, limit))
    if as_json:
        print_json(found)
        return
    _show(found)


def _show(found: TopicList) -> None:
    now = now_ms()
    table = listing(
        "topic", "agent", "messages", "ready", "leased", "subscribers", "oldest", "dead"
    )
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for row in found.rows:
        table.add_row(
            cell(row.topic), row.agent, str(row.messages), _number(row.ready), _number(row.leased),
            "" if row.agent == "messages" else str(row.subscribers),
            "" if row.oldest is None else sentences.age(now - row.oldest), str(row.dead or ""),
        )  # fmt: skip
    if found.rows:
        show(table)
    total = (
        f"{sentences.count(found.topics, 'topic')}, {sentences.count(found.messages, 'message')}"
    )
    if len(found.rows) < found.topics:
        total = f"the {len(found.rows)} deepest of {total}: --limit shows more"
    say(total)
    for note in found.notes:
        say(f"note: {note}")


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
