"""`millpond clients`: which clients are online, and their subscriptions."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    JsonLinesOption,
    JsonOption,
    cell,
    console,
    load_settings,
    print_json,
    utc_time,
)
from millpond.pipeline.operate.clients import client as read_client
from millpond.pipeline.operate.clients import clients as read_clients
from millpond.pipeline.process.signals import run
from millpond.schemas.errors import MillpondError

clients = typer.Typer(help="List clients and their subscriptions.", no_args_is_help=True)


@clients.command("list")
def list_clients(
    as_json: JsonLinesOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """List every client that the sessions agent knows, online or not."""
    settings, rules = load_settings(config, data)
    table = Table("client", "online", "node", "since", "subscriptions", box=None)

    async def read() -> None:
        async for found in read_clients(settings, rules):
            if as_json:
                print_json(found)
            else:
                count = str(len(found["subscriptions"]))
                table.add_row(cell(found["client_id"]), *_presence(found), count)

    run(read())
    if not as_json:
        console.print(table)


@clients.command("show")
def show_client(
    client_id: Annotated[str, typer.Argument(help="The client id.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Show presence, session and subscriptions of one client."""
    settings, rules = load_settings(config, data)
    found = run(read_client(settings, rules, client_id))
    if found is None:
        raise MillpondError(f"the sessions agent knows no client {client_id!r}")
    if as_json:
        print_json(found)
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
    for each in found["subscriptions"]:
        origin = f"{each['origin']}, resumed" if each["resumed"] else each["origin"]
        table.add_row(cell(each["topic_filter"]), str(each["qos"]), origin)
    console.print(table)


def _presence(client: dict[str, Any]) -> tuple[str, str, str]:
    """The cells online, node and since."""
    since = client["online_at"] if client["online"] else client["offline_at"]
    return (
        "yes" if client["online"] else "no",
        cell(client["node"] or ""),
        "" if since is None else utc_time(since),
    )
