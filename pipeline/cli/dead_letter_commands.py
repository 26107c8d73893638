"""`millpond dead-letters`: list, show, requeue and drop the dead letters that the delivery agents keep."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from millpond.agents.pubsub.state import shown
from millpond.pipeline.cli import common
from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ID_LENGTH,
    PIPED_WIDTH,
    ConfigOption,
    DataOption,
    JsonOption,
    YesOption,
    cell,
    confirm,
    console,
    errors,
    listing,
    load_settings,
    print_json,
    printable,
    say,
    show,
    utc_time,
)
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain.sentences import count
from millpond.pipeline.operate import dead_letters, operator_events, unreadable
from millpond.pipeline.operate.dead_letter_snapshot import DeadLetterSnapshot
from millpond.pipeline.operate.dead_letters import FoundDeadLetter, StoredMessage
from millpond.pipeline.operate.unreadable import Unreadable
from millpond.pipeline.process.signals import run
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from millpond.schemas.events import OperatorDrop, OperatorRequeue
from millpond.schemas.topics import filter_error, split_share

LISTED_MAX: Final = 100  # without --limit
SHOWN_BYTES: Final = 60  # of the value of an unreadable record; --json has more
WIDE_COLUMNS_MIN: Final = 110  # from this width on, topics and reasons have columns of their own

commands = typer.Typer(help="List, requeue and drop dead letters.", no_args_is_help=True)
TopicOption = Annotated[
    str | None,
    typer.Option(
        "--topic", "-t", metavar="FILTER", help="Only dead letters whose topic matches this filter."
    ),
]
IdsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="The message ids.", show_default=False),
]
AllOption = Annotated[bool, typer.Option("--all", help="All dead letters that exist now.")]


@commands.command("list")
def list_dead_letters(
    topic: TopicOption = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="How many to list, the newest.")
    ] = LISTED_MAX,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    only_unreadable: Annotated[
        bool,
        typer.Option(
            "--unreadable", help="List the records that could not be read or stored instead."
        ),
    ] = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """List the newest dead letters, the newest last."""
    _check_filter(topic)
    if only_unreadable and topic is not None:
        raise ConfigError("--topic: a record that could not be read has no known topic")
    settings, rules = load_settings(config, data)
    if only_unreadable:
        _list_unreadable(run(unreadable.newest(settings, limit)), as_json=as_json)
        return

    async def read(snapshot: DeadLetterSnapshot) -> None:
        async for found in dead_letters.scan(settings, rules, topic):
            snapshot.add(*found)

    with DeadLetterSnapshot() as snapshot:
        run(read(snapshot))
        total = len(snapshot)
        listed = [FoundDeadLetter(*each) for each in snapshot.newest(limit)]
    if as_json:
        print_json([found.describe() for found in listed])
        if len(listed) < total:  # on stderr: the JSON does not say that it is cut
            errors.print(_summary(len(listed), total, topic), markup=False, soft_wrap=True)
        return
    if listed and console.is_terminal:
        console.print(_table(listed, wide=console.width >= WIDE_COLUMNS_MIN))
    elif listed:
        Console(width=PIPED_WIDTH, highlight=False).print(_table(listed, wide=True))
    say(_summary(len(listed), total, topic))


def _list_unreadable(found: Unreadable, *, as_json: bool) -> None:
    total = count(len(found.records), "record")
    summary = f"{total} that could not be read or stored"
    if not found.whole:
        summary = f"the newest {summary}; older ones are in {keys.DEAD_LETTERS_TOPIC}: --limit N lists more"
    if as_json:
        print_json(found.records)
        if not found.whole:
            errors.print(summary, markup=False, soft_wrap=True)
        return
    table = listing("when", "from", "by", "bytes", "begins with", "reason")
    for each in found.records:
        begin = b64decode(each.value)[:SHOWN_BYTES]
        table.add_row(
            utc_time(each.at), cell(each.source), cell(each.reader), str(each.size),
            cell(begin.decode("utf-8", "backslashreplace")), cell(each.reason),
        )  # fmt: skip
    if found.records:
        show(table)
    say(summary)


def _table(listed: list[FoundDeadLetter], *, wide: bool) -> Table:
    """One line for each dead letter if it is `wide`; else topic and reason are on a second line."""
    table = Table(box=None, pad_edge=False)
    # A folded id cannot be copied.
    short_ids = max(len(found.dead.message_id) for found in listed) <= ID_LENGTH
    table.add_column("message id" if wide else "message id\ntopic", no_wrap=short_ids and wide)
    if wide:
        table.add_column("topic", overflow="fold")
    table.add_column("when" if wide else "when\nreason", no_wrap=wide)
    table.add_column("deliveries", no_wrap=True, justify="right")
    if wide:
        table.add_column("reason", overflow="fold")
    for column in table.columns:
        column.overflow = "fold"
    for _, dead in listed:
        message_id, topic, reason = map(cell, (dead.message_id, dead.topic, dead.reason))
        at, deliveries = utc_time(dead.at), str(dead.deliveries)
        if wide:
            table.add_row(message_id, topic, at, deliveries, reason)
        else:
            table.add_row(f"{message_id}\n{topic}", f"{at}\n{reason}", deliveries)
    return table


def _summary(listed: int, total: int, topic: str | None) -> str:
    of_topics = "" if topic is None else f" of topics that match {topic!r}"
    if listed < total:
        return f"the {listed} newest of {_count(total)}{of_topics}: --limit shows more"
    return f"{_count(total)}{of_topics}"


def _count(number: int) -> str:
    return count(number, "dead letter")


@commands.command("show")
def show_dead_letter(
    message_id: Annotated[str, typer.Argument(help="The message id.", show_default=False)],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Show one dead letter with its message."""
    settings, rules = load_settings(config, data)
    found, message = run(dead_letters.show(settings, rules, message_id))
    if as_json:
        print_json({**found.describe(), "message": message})
        return
    facts = Table(show_header=False, box=None)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (*_facts(found), *_message_facts(message)):
        facts.add_row(name, cell(value))
    console.print(facts)
    if message is not None and message.payload:
        console.print(printable(message.payload, "\n\t"), markup=False, soft_wrap=True)


def _facts(found: FoundDeadLetter) -> list[tuple[str, str]]:
    dead = found.dead
    return [
        ("message id", dead.message_id),
        ("topic", dead.topic),
        ("agent", found.agent),
        ("dead since", utc_time(dead.at)),
        ("deliveries", str(dead.deliveries)),
        ("reason", dead.reason),
        *(("dead for", shown(each)) for each in dead.subscribers),
        ("kept until", utc_time(found.describe()["kept_until"])),
    ]


def _message_facts(message: StoredMessage | None) -> list[tuple[str, str]]:
    if message is None:
        return [("message", "no longer in the store: drop this dead letter")]
    form = {"utf-8": "text", "base64": "binary, shown as base64"}[message.payload_encoding]
    return [
        ("publisher", message.client_id),
        ("published at", utc_time(message.published_at)),
        ("expires at", "never" if message.expires_at is None else utc_time(message.expires_at)),
        ("QoS", str(message.qos)),
        ("retain", "yes" if message.retain else "no"),
        ("payload", form if message.payload else "empty"),
    ]


@commands.command("requeue")
def requeue(
    message_ids: IdsArgument = None,
    topic: TopicOption = None,
    every: AllOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Deliver dead letters again, after the messages that wait now, and with no deliveries counted."""
    _order(OperatorRequeue, message_ids or [], topic, every, yes, as_json, config, data)


@commands.command("drop")
def drop(
    message_ids: IdsArgument = None,
    topic: TopicOption = None,
    every: AllOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Delete dead letters with their messages."""
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
    """Choose dead letters, ask, and write one order for each.

    The snapshot is complete before the first order is written. A requeued message may die again at once, and must not
    be chosen a second time.
    """
    verb = "requeue" if order is OperatorRequeue else "drop"
    _check_choice(verb, message_ids, topic, every)
    if not (message_ids or yes or common.can_ask()):
        raise common.cannot_ask(verb)
    settings, rules = load_settings(config, data)
    with DeadLetterSnapshot() as snapshot:
        left_out = 0
        if message_ids:
            chosen = run(dead_letters.find_owned(settings, rules, message_ids))
            total, dead = len(chosen), (found.dead for found in chosen)
        else:
            left_out = run(dead_letters.fill_snapshot(settings, rules, topic, snapshot))
            total, dead = len(snapshot), (each for _, each in snapshot)
        if total and not (message_ids or yes):
            confirm(f"{verb.capitalize()} {_count(total)}?")
        events = (
            order(
                at=now_ms(),
                node=keys.AGENT_NODE,
                topic=each.topic,
                message_id=each.message_id,
            )
            for each in dead
        )
        written = run(operator_events.write(settings.kafka, events)) if total else 0
    if as_json:
        print_json({"written": written, "left_out": left_out})
        return
    if left_out:
        say(f"left out {_count(left_out)} of topics without a delivery rule")
    done = "requeued" if order is OperatorRequeue else "dropped"
    if written:
        say(f"{_count(written)} will be {done} when the agents read the orders from Kafka")
    else:
        say(f"no dead letters to {verb}")


def _check_choice(verb: str, message_ids: list[str], topic: str | None, every: bool) -> None:
    _check_filter(topic)
    if [bool(message_ids), topic is not None, every].count(True) != 1:
        raise ConfigError(f"{verb} takes one of: message ids, --topic FILTER, --all")


def _check_filter(topic: str | None) -> None:
    if topic is None:
        return
    reason = filter_error(topic)
    if reason is None and split_share(topic)[0] is not None:
        reason = "give the topic filter without $share or $queue"
    if reason is not None:
        raise ConfigError(f"--topic: {reason}")
