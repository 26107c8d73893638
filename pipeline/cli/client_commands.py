"""`millpond clients`: who is online, and subscribed to what."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import typer
from rich.markup import escape
from rich.table import Table

from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    console,
    load_settings,
)
from millpond.pipeline.operate.clients import client as find
from millpond.pipeline.operate.clients import clients as find_all
from millpond.schemas.errors import MillpondError

clients = typer.Typer(help="Who is online, and subscribed to what.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


@clients.command("list")
def list_clients(
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Every client that was ever heard of."""
    settings, rules = load_settings(config, data)
    table = Table("client", "online", "node", "since", "subscriptions", box=None)

    async def show() -> None:
        async for found in find_all(settings, rules):
            if as_json:
                _print_json(found)
            else:
                count = str(len(found["subscriptions"]))
                table.add_row(escape(found["client_id"]), *_presence(found), count)

    asyncio.run(show())
    if not as_json:
        console.print(table)


@clients.command("show")
def show_client(
    client_id: Annotated[str, typer.Argument(help="The client id.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Presence, session and subscriptions of one client."""
    settings, rules = load_settings(config, data)
    found = asyncio.run(find(settings, rules, client_id))
    if found is None:
        raise MillpondError(f"no client {client_id!r} was ever heard of")
    if as_json:
        _print_json(found)
        return
    online, node, since = _presence(found)
    facts = Table(show_header=False, box=None)
    facts.add_row("online", f"{online} (since {since})" if since else online)
    facts.add_row("node", node)
    facts.add_row("session", "none" if found["session"] is None else str(found["session"]["id"]))
    console.print(facts)
    if not found["subscriptions"]:
        return
    table = Table("subscription", "QoS", "origin", box=None)
    for held in found["subscriptions"]:
        origin = f"{held['origin']}, resumed" if held["resumed"] else held["origin"]
        table.add_row(escape(held["topic_filter"]), str(held["qos"]), origin)
    console.print(table)


def _presence(found: dict[str, Any]) -> tuple[str, str, str]:
    since = found["online_at"] if found["online"] else found["offline_at"]
    shown = (
        "" if since is None else f"{datetime.fromtimestamp(since / 1000, UTC):%Y-%m-%d %H:%M:%SZ}"
    )
    return "yes" if found["online"] else "no", escape(found["node"] or ""), shown


def _print_json(found: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
    sys.stdout.buffer.flush()
