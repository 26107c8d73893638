"""`millpond dead-letters`: messages given up on, and what is to become of them."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from millpond.agents.pubsub.state import shown
from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    console,
    errors,
    load_settings,
)
from millpond.pipeline.clock import now_ms
from millpond.pipeline.operate import dead_letters as letters
from millpond.pipeline.operate import operator_events
from millpond.pipeline.operate.dead_letter_snapshot import DeadLetterSnapshot
from millpond.pipeline.operate.dead_letters import FoundDeadLetter, StoredMessage
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import OperatorDrop, OperatorRequeue
from millpond.schemas.topics import filter_error, split_share

SHOWN_MAX = 100  # unless more are asked for
ID_LENGTH = 40  # ids up to this stay in one piece, to be copied; EMQX's have 32 characters
WIDE = 110  # columns, from which on topics and reasons have room beside the ids
PIPED_WIDTH = 1_000  # for grep: a dead letter is one line

dead_letters = typer.Typer(
    help="Messages given up on, and what is to become of them.", no_args_is_help=True
)
JsonOption = Annotated[bool, typer.Option("--json", help="For scripts.")]
TopicOption = Annotated[
    str | None,
    typer.Option("--topic", "-t", metavar="FILTER", help="Those of topics that match."),
]
IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[MESSAGE_ID]...", show_default=False)
]
AllOption = Annotated[bool, typer.Option("--all", help="All that there are now.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dead_letters.command("list")
def list_dead_letters(
    topic: TopicOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest so many.")] = SHOWN_MAX,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """The newest last; --json prints one list of objects."""
    _check_filter(topic)
    settings, rules = load_settings(config, data)

    async def read(snapshot: DeadLetterSnapshot) -> None:
        async for found in letters.scan(settings, rules, topic):
            snapshot.add(*found)

    with DeadLetterSnapshot() as snapshot:
        asyncio.run(read(snapshot))
        total, shown = len(snapshot), [FoundDeadLetter(*each) for each in snapshot.newest(limit)]
    if as_json:
        _print_json([found.describe() for found in shown])
        if len(shown) < total:  # a script that reads the list would not know
            errors.print(_how_many(len(shown), total, topic), markup=False, soft_wrap=True)
        return
    if shown and console.is_terminal:
        console.print(table(shown, wide=console.width >= WIDE))
    elif shown:
        Console(width=PIPED_WIDTH, highlight=False).print(table(shown, wide=True))
    console.print(_how_many(len(shown), total, topic), markup=False, soft_wrap=True)


def table(shown: list[FoundDeadLetter], *, wide: bool) -> Table:
    """A line each where there is room; else id and topic, time and reason under each other."""
    table = Table(box=None, pad_edge=False)
    # An id in one piece can be copied.
    whole = max(len(found.dead.message_id) for found in shown) <= ID_LENGTH
    table.add_column("message id" if wide else "message id\ntopic", no_wrap=whole and wide)
    if wide:
        table.add_column("topic", overflow="fold")
    table.add_column("when" if wide else "when\nreason", no_wrap=wide)
    table.add_column("deliveries", no_wrap=True, justify="right")
    if wide:
        table.add_column("reason", overflow="fold")
    for column in table.columns:
        column.overflow = "fold"
    for _, dead in shown:
        message_id, topic, reason = map(_cell, (dead.message_id, dead.topic, dead.reason))
        at, deliveries = _time(dead.at), str(dead.deliveries)
        if wide:
            table.add_row(message_id, topic, at, deliveries, reason)
        else:
            table.add_row(f"{message_id}\n{topic}", f"{at}\n{reason}", deliveries)
    return table


def _how_many(shown: int, total: int, topic: str | None) -> str:
    of_topics = "" if topic is None else f" of topics that match {topic!r}"
    if shown < total:
        return f"the {shown} newest of {_count(total)}{of_topics}: --limit shows more"
    return f"{_count(total)}{of_topics}"


def _count(number: int) -> str:
    return f"{number or 'no'} dead letter{'' if number == 1 else 's'}"


@dead_letters.command("show")
def show_dead_letter(
    message_id: Annotated[str, typer.Argument(help="The message's id.", show_default=False)],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Why and when, and the message itself."""
    settings, rules = load_settings(config, data)
    found, message = asyncio.run(letters.show(settings, rules, message_id))
    if as_json:
        _print_json({**found.describe(), "message": msgspec.to_builtins(message)})
        return
    facts = Table(show_header=False, box=None)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (*_facts(found), *_message_facts(message)):
        facts.add_row(name, _cell(value))
    console.print(facts)
    if message is not None and message.payload:
        console.print(printable(message.payload, "\n\t"), markup=False, soft_wrap=True)


def _facts(found: FoundDeadLetter) -> list[tuple[str, str]]:
    dead = found.dead
    return [
        ("message id", dead.message_id),
        ("topic", dead.topic),
        ("agent", found.agent),
        ("given up on", _time(dead.at)),
        ("deliveries", str(dead.deliveries)),
        ("reason", dead.reason),
        *(("given up on by", shown(each)) for each in dead.subscribers),
        ("kept until", _time(found.describe()["kept_until"])),
    ]


def _message_facts(message: StoredMessage | None) -> list[tuple[str, str]]:
    if message is None:
        return [("message", "the store has it no more: drop this dead letter")]
    form = {"utf-8": "text", "base64": "base64, since it is no text"}[message.payload_encoding]
    return [
        ("publisher", message.client_id),
        ("published at", _time(message.published_at)),
        ("expires at", "never" if message.expires_at is None else _time(message.expires_at)),
        ("QoS", str(message.qos)),
        ("retain", "yes" if message.retain else "no"),
        ("payload", form if message.payload else "empty"),
    ]


@dead_letters.command("requeue")
def requeue(
    message_ids: IdsArgument = None,
    topic: TopicOption = None,
    every: AllOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Have them delivered once more, as if for the first time, behind what waits by now."""
    _order(OperatorRequeue, message_ids or [], topic, every, yes, as_json, config, data)


@dead_letters.command("drop")
def drop(
    message_ids: IdsArgument = None,
    topic: TopicOption = None,
    every: AllOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Delete them, with their messages."""
    _order(OperatorDrop, message_ids or [], topic, every, yes, as_json, config, data)


def _order(
    order: type[OperatorRequeue | OperatorDrop],
    message_ids: list[str],
    topic: str | None,
    every: bool,
    yes: bool,
    as_json: bool,
    config: Path | None,
    data: Path,
) -> None:
    """Choose, ask, write. What is chosen is what there is before the first order is written."""
    verb = "requeue" if order is OperatorRequeue else "drop"
    _check_choice(verb, message_ids, topic, every)
    if not (message_ids or yes or someone_is_there()):
        raise ConfigError(f"nobody is at a terminal to confirm what {verb} shall do: add --yes")
    settings, rules = load_settings(config, data)
    with DeadLetterSnapshot() as snapshot:
        left_out = 0
        if message_ids:
            chosen = asyncio.run(letters.pick(settings, rules, message_ids))
            total, dead = len(chosen), (found.dead for found in chosen)
        else:
            left_out = asyncio.run(letters.take(settings, rules, topic, snapshot))
            total, dead = len(snapshot), (each for _, each in snapshot)
        if total and not (message_ids or yes):
            _confirm(f"{verb.capitalize()} {_count(total)}?")
        events = (
            order(
                at=now_ms(),
                node=keys.AGENT_NODE,
                topic=each.topic,
                message_id=each.message_id,
            )
            for each in dead
        )
        written = asyncio.run(operator_events.write(settings.kafka, events)) if total else 0
    if as_json:
        _print_json({"written": written, "left_out": left_out})
        return
    if left_out:
        console.print(f"left out {_count(left_out)} of topics without a delivery rule")
    carried_out = ": the agents carry it out when they read it" if written else ""
    done = "requeued" if order is OperatorRequeue else "dropped"
    verbs = "is" if written == 1 else "are"
    console.print(f"{_count(written)} {verbs} to be {done}{carried_out}", soft_wrap=True)


def _check_choice(verb: str, message_ids: list[str], topic: str | None, every: bool) -> None:
    _check_filter(topic)
    if [bool(message_ids), topic is not None, every].count(True) != 1:
        raise ConfigError(f"{verb} takes one of: message ids, --topic FILTER, --all")


def _check_filter(topic: str | None) -> None:
    if topic is None:
        return
    reason = filter_error(topic)
    if reason is None and split_share(topic)[0] is not None:
        reason = "a plain filter is wanted here, without $share"
    if reason is not None:
        raise ConfigError(f"--topic: {reason}")


def someone_is_there() -> bool:
    """Whether a question would be read."""
    return sys.stdin.isatty()


def _confirm(question: str) -> None:
    # On stderr whole: typer's own leaves a blank on stdout, which may be a script's.
    errors.print(f"{question} [y/N]", end=" ", markup=False, soft_wrap=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise MillpondError("not confirmed, so nothing was written")


def _time(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%SZ}"


def _cell(text: str) -> str:
    return escape(printable(text))


def printable(text: str, kept: str = "") -> str:
    """What a publisher wrote must not move the cursor of who looks at it."""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )


def _print_json(found: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
    sys.stdout.buffer.flush()
