"""`millpond explain`: where a message is, or what is known of a topic."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Final

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ID_LENGTH,
    ConfigOption,
    DataOption,
    JsonOption,
    cell,
    errors,
    facts_table,
    listing,
    load_settings,
    print_json,
    say,
    show,
)
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain import message as messages
from millpond.pipeline.explain import sentences
from millpond.pipeline.explain import topic as topics
from millpond.pipeline.explain.results import MessageFacts, TopicFacts
from millpond.pipeline.process.signals import run
from millpond.schemas.codec import payload_bytes
from millpond.schemas.errors import ConfigError

SHOWN_MAX: Final = 20  # of each table: subscribers, clients, leases, records


def explain(
    message_id: Annotated[
        str | None, typer.Argument(help="The message id.", show_default=False)
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic",
            "-t",
            help="The message's topic, if Redis has no trace of it; or a topic to show.",
        ),
    ] = None,
    client: Annotated[
        str | None, typer.Option("--client", help="Show only this client or subscriber.")
    ] = None,
    search: Annotated[
        int, typer.Option("--search", min=1, help="How many records of the log to read at most.")
    ] = messages.RECORDS_MAX,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Show where a message is: in Kafka, in Redis, and for each subscriber. With --topic alone, show a topic."""
    if message_id is None and topic is None:
        raise ConfigError("explain takes a message id, or --topic TOPIC, or both")
    settings, rules = load_settings(config, data)
    if message_id is None:
        assert topic is not None, "one of the two is given"
        facts = run(topics.explain(settings, rules, topic, client))
        show_topic(facts, as_json=as_json, members=client is not None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("reading the log", total=None)
        found = run(
            messages.explain(
                settings, rules, message_id, topic=topic, client=client, records_max=search,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        _show_message(found)


def _say_left_out(total: int, things: str) -> None:
    """Say how many rows a table leaves out, if it does."""
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
        by_state = ", ".join(f"{number} {state}" for state, number in counts.items())
        say()
        say(f"{sentences.count(len(subscribers), 'subscriber')}: {by_state}")
        table = listing("subscriber", "state")
        for each in subscribers[:SHOWN_MAX]:
            table.add_row(cell(each.subscriber), cell(each.words))
        show(table)
        _say_left_out(len(subscribers), "subscribers")
    elif found.agent == "pubsub":
        say()
        say("its topic has no known subscriber")
    _show_events(found)
    for note in found.notes:
        say(f"note: {note}")


def _stored(found: MessageFacts) -> list[tuple[str, str]]:
    stored, rows = found.stored, []
    message = stored.message
    if message is None:
        rows.append(("in Redis", "no body"))
    else:
        size = sentences.count(len(payload_bytes(message)), "byte")
        rows.append(("in Redis", f"body: {size} from {message.client_id!r} at QoS {message.qos}"))
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
        say("no record of it in the part of Kafka that was searched:")
        for part in found.searched:
            say(f"  {sentences.searched(part)}")
        return
    say()
    table = listing("in Kafka", "offset", "time", "event", "client", "")
    for event in found.events[:SHOWN_MAX]:
        what = [event.kind.replace("_", " ")]
        if event.qos is not None:
            what.append(f"QoS {event.qos}")
        details = [each for each in (event.lease, event.detail) if each is not None]
        if event.message_id != found.message_id:
            details.append(f"as {event.message_id}")
        table.add_row(
            f"{event.kafka_topic}\\[{event.partition}]", str(event.offset), sentences.time(event.at),
            ", ".join(what), cell(event.client_id or ""), cell("; ".join(details)),
        )  # fmt: skip
    show(table)
    _say_left_out(len(found.events), "records")


# -- a topic -----------------------------------------------------------------------------------------------------------


def show_topic(found: TopicFacts, *, as_json: bool, members: bool = False) -> None:
    """Print one topic. The members of a pubsub topic are printed only if `members` asks for them."""
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
        names = ["max_inflight", "max_deliveries", "max_length"]
        names += ["start"] if found.agent == "pubsub" else []
        settings = [f"{name} {found.rule[name]}" for name in names if found.rule.get(name)]
        settings.append(f"ack_timeout_s {found.rule['ack_timeout_ms'] // 1000}")
        rows.append(
            ("rule", f"{found.rule['action']} {found.rule['topic']}: {', '.join(settings)}")
        )
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
        say("no client that could get its messages is online")
        return
    now = now_ms()
    say()
    table = listing("client", "group", "QoS", "in flight", "unconfirmed", "back-off")
    for each in found.members[:SHOWN_MAX]:
        back_off = ""
        if each.rests_until is not None:
            back_off = f"{sentences.age(each.rests_until - now)} more"
        table.add_row(
            cell(each.client_id), cell(each.group or ""), str(each.qos),
            f"{each.in_hand} of {each.max_inflight}", str(each.unconfirmed), back_off,
        )  # fmt: skip
    show(table)
    _say_left_out(len(found.members), "clients")


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
    _say_left_out(len(found.subscribers), "subscribers")


def _show_leases(found: TopicFacts) -> None:
    if not found.leases:
        return
    now = now_ms()
    say()
    table = listing("leased message", "by", "for", "delivery", "")
    table.columns[0].no_wrap = all(len(each.message_id) <= ID_LENGTH for each in found.leases)
    for each in found.leases[:SHOWN_MAX]:
        left = 0 if each.until is None else each.until - now
        deadline = f"{sentences.age(left)} left" if left > 0 else "overdue"
        sent = "sent" if each.sent else "not confirmed"
        by = each.client_id if each.group is None else f"{each.client_id} ({each.group})"
        table.add_row(
            cell(each.message_id), cell(by), sentences.age(now - each.since), str(each.attempt),
            f"{sent}, {deadline}",
        )  # fmt: skip
    show(table)
    _say_left_out(len(found.leases), "leases")
