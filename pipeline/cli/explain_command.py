"""`millpond explain`: where a message is, or who has what of a topic."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    console,
    errors,
    load_settings,
)
from millpond.pipeline.cli.dead_letter_commands import printable
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain import message as messages
from millpond.pipeline.explain import sentences
from millpond.pipeline.explain import topic as topics
from millpond.pipeline.explain.results import MessageFacts
from millpond.pipeline.explain.topic import TopicFacts
from millpond.schemas.codec import payload_bytes
from millpond.schemas.errors import ConfigError

SHOWN_MAX = 20  # subscribers, members, leases, events: --json has all of them
ID_LENGTH = 40  # ids up to this stay in one piece, to be copied; EMQX's have 32 characters
PIPED_WIDTH = 1_000


def explain(
    message_id: Annotated[
        str | None, typer.Argument(metavar="[MESSAGE_ID]", help="A message.", show_default=False)
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option("--topic", "-t", help="Its topic, if Redis has forgotten it; or a topic."),
    ] = None,
    client: Annotated[
        str | None, typer.Option("--client", help="Only what concerns this client or subscriber.")
    ] = None,
    search: Annotated[
        int, typer.Option("--search", min=1, help="Records of the log to look at, at most.")
    ] = messages.RECORDS_MAX,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Where a message is: in Kafka, in Redis, for each subscriber. With --topic alone: who reads it, who has what in hand."""
    if message_id is None and topic is None:
        raise ConfigError("explain takes a message id, or --topic TOPIC, or both")
    settings, rules = load_settings(config, data)
    if message_id is None:
        assert topic is not None, "it has just been checked"
        about = asyncio.run(topics.explain(settings, rules, topic, client))
        show_topic(about, as_json=as_json, members=client is not None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("reading the log", total=None)
        found = asyncio.run(
            messages.explain(
                settings, rules, message_id, topic=topic, client=client, records_max=search,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        _show_message(found)


def print_json(found: Any) -> None:
    """One line of JSON."""
    sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    sys.stdout.buffer.flush()


def cell(text: object) -> str:
    """What others wrote, for a table."""
    return escape(printable(str(text)))


def say(line: str = "") -> None:
    """A line of its own, however long."""
    console.print(printable(line), markup=False, soft_wrap=True)


def show(table: Table) -> None:
    """A table; for grep, a row is one line."""
    to = console if console.is_terminal else Console(width=PIPED_WIDTH, highlight=False)
    to.print(table)


def facts_table() -> Table:
    """Names and what they are."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def listing(*columns: str) -> Table:
    """A table with these columns, of which long ones are folded."""
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    return table


def left_out(total: int, things: str) -> None:
    """Say that there are more."""
    if total > SHOWN_MAX:
        say(f"and {total - SHOWN_MAX} more {things}: --json shows all")


# -- a message ---------------------------------------------------------------------------------------------------------


def _show_message(found: MessageFacts) -> None:
    facts = facts_table()
    applied = "nothing" if found.applied is None else f"offset {found.applied}"
    for name, value in (
        ("message id", found.message_id),
        ("topic", found.topic),
        ("agent", f"{found.agent}, partition {found.partition}, applied up to {applied}"),
        ("state", found.states[0].words),
        *_stored(found),
    ):
        facts.add_row(name, cell(value))
    show(facts)
    subscribers = found.states[1:]
    if subscribers:
        counts = Counter(each.state for each in subscribers)
        said = ", ".join(f"{number} {state}" for state, number in counts.items())
        say()
        say(f"{sentences.count(len(subscribers), 'subscriber')}: {said}")
        table = listing("subscriber", "state")
        for each in subscribers[:SHOWN_MAX]:
            table.add_row(cell(each.subscriber), cell(each.words))
        show(table)
        left_out(len(subscribers), "subscribers")
    elif found.agent == "pubsub":
        say()
        say("no subscriber of its topic is known")
    _show_events(found)
    for note in found.notes:
        say(f"note: {note}")


def _stored(found: MessageFacts) -> list[tuple[str, str]]:
    stored, rows = found.stored, []
    message = stored.message
    if message is None:
        rows.append(("in Redis", "no body"))
    else:
        size = len(payload_bytes(message))
        rows.append(
            (
                "in Redis",
                f"body: {sentences.count(size, 'byte')} from {message.client_id!r} at QoS {message.qos}",
            )
        )
    if stored.index_score is not None:
        end = "" if stored.expires_at is None else f", until {sentences.time(stored.expires_at)}"
        rows.append(("", f"index entry {stored.index_score}{end}"))
    if stored.retained:
        until = stored.retained_until
        rows.append(
            ("", "retained" + ("" if until is None else f", until {sentences.time(until)}"))
        )
    for field, at in list(stored.receipts.items())[:SHOWN_MAX]:
        kind, _, client = field.partition(":")
        rows.append(("", f"receipt: {kind} by {client!r} at {sentences.time(at * 1000)}"))
    return rows


def _show_events(found: MessageFacts) -> None:
    if not found.events:
        say()
        say("Kafka has no record of it where it was searched:")
        for part in found.searched:
            say(f"  {sentences.searched(part)}")
        return
    say()
    table = listing("in Kafka", "offset", "time", "event", "client", "")
    for event in found.events[:SHOWN_MAX]:
        what = [event.kind.replace("_", " ")]
        if event.qos is not None:
            what.append(f"QoS {event.qos}")
        said = [each for each in (event.lease, event.detail) if each is not None]
        if event.message_id != found.message_id:
            said.append(f"as {event.message_id}")
        table.add_row(
            f"{event.kafka_topic}\\[{event.partition}]", str(event.offset), sentences.time(event.at),
            ", ".join(what), cell(event.client_id or ""), cell("; ".join(said)),
        )  # fmt: skip
    show(table)
    left_out(len(found.events), "records")


# -- a topic -----------------------------------------------------------------------------------------------------------


def show_topic(found: TopicFacts, *, as_json: bool, members: bool = False) -> None:
    """One topic, for people or for scripts; of a pubsub topic, too, with the `members` if they are wanted."""
    if as_json:
        print_json(found)
        return
    facts = facts_table()
    for name, value in _topic_rows(found):
        facts.add_row(name, cell(value))
    show(facts)
    if found.agent == "queue" or (members and found.members):
        _show_members(found)
    if found.agent == "pubsub":
        _show_subscribers(found)
    _show_leases(found)
    for note in found.notes:
        say(f"note: {note}")


def _topic_rows(found: TopicFacts) -> list[tuple[str, str]]:
    now = now_ms()
    applied = "nothing" if found.applied is None else f"offset {found.applied}"
    rows = [
        ("topic", found.topic),
        ("agent", f"{found.agent}, partition {found.partition}, applied up to {applied}"),
    ]
    if found.rule is not None:
        settings = ["max_inflight", "max_deliveries", "max_length"]
        settings += ["start"] if found.agent == "pubsub" else []
        said = [f"{name} {found.rule[name]}" for name in settings if found.rule.get(name)]
        said.append(f"ack_timeout_s {found.rule['ack_timeout_ms'] // 1000}")
        rows.append(("rule", f"{found.rule['action']} {found.rule['topic']}: {', '.join(said)}"))
    kept = "for ever" if found.expired_time is None else f"for {found.expired_time} s"
    depth = f"{sentences.count(found.messages, 'message')}, each kept {kept}"
    if found.oldest is not None:
        depth += f"; the oldest is {sentences.age(now - found.oldest)} old"
    rows.append(("depth", depth))
    if found.ready is not None:
        rows.append(("", f"{found.ready} ready, {found.leased} leased"))
    if found.dead:
        rows.append(("dead letters", str(found.dead)))
    if found.retained is not None:
        rows.append(("retained", found.retained))
    return rows


def _show_members(found: TopicFacts) -> None:
    if not found.members:
        say()
        say("nobody is online to take messages")
        return
    now = now_ms()
    say()
    table = listing("client", "group", "QoS", "in hand", "unconfirmed", "rests")
    for each in found.members[:SHOWN_MAX]:
        rests = "" if each.rests_until is None else f"{sentences.age(each.rests_until - now)} more"
        table.add_row(
            cell(each.client_id), cell(each.group or ""), str(each.qos),
            f"{each.in_hand} of {each.max_inflight}", str(each.unconfirmed), rests,
        )  # fmt: skip
    show(table)
    left_out(len(found.members), "clients")


def _show_subscribers(found: TopicFacts) -> None:
    if not found.subscribers:
        say()
        say("no subscriber is known")
        return
    say()
    table = listing("subscriber", "online", "read offset", "ready", "leased", "lost")
    for each in found.subscribers[:SHOWN_MAX]:
        at = each.read_offset or ("before the first" if each.begun else "not begun")
        table.add_row(
            cell(each.subscriber), str(each.online or "no"), cell(at), str(each.ready),
            str(each.leased), str(each.lost or ""),
        )  # fmt: skip
    show(table)
    left_out(len(found.subscribers), "subscribers")


def _show_leases(found: TopicFacts) -> None:
    if not found.leases:
        return
    now = now_ms()
    say()
    table = listing("leased message", "by", "for", "delivery", "")
    table.columns[0].no_wrap = all(len(each.message_id) <= ID_LENGTH for each in found.leases)
    for each in found.leases[:SHOWN_MAX]:
        left = 0 if each.until is None else each.until - now
        returns = f"{sentences.age(left)} left" if left > 0 else "overdue"
        sent = "sent" if each.sent else "not confirmed"
        by = each.client_id if each.group is None else f"{each.client_id} ({each.group})"
        table.add_row(
            cell(each.message_id), cell(by), sentences.age(now - each.since), str(each.attempt),
            f"{sent}, {returns}",
        )  # fmt: skip
    show(table)
    left_out(len(found.leases), "leases")
