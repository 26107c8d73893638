"""The README says what the code does: its tables are compared with the types, bounds and names they describe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from msgspec import NODEFAULT, Struct, structs

from pipeline.settings import Settings
from schemas import keys
from schemas.commands import Command
from schemas.events import Event
from schemas.pool import Pool
from schemas.rule import ACTIONS, COMPANIONS, Rule
from schemas.user_commands import VARIABLES

README = (Path(__file__).parents[2] / "README.md").read_text()
# What a rule says besides its settings.
RULE_KEYS = {"hook", "topic", "action", "commands", "pool", "file", "line"}


def table(after: str) -> list[list[str]]:
    """The cells of the first table after this line, without head and backquotes."""
    rows = []
    for line in README.split(f"\n{after}\n")[1].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def generated(name: str) -> str:
    """What stands between the marks of a generated part."""
    found = re.search(rf"<!-- {name}: [^\n]* -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert found is not None, name
    return found[1]


def default(value: Any) -> str:
    """A default as the README shows it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case tuple():
            return ", ".join(value)
        case _:
            return "" if value is NODEFAULT else str(value)


def settings(of: type[Struct], prefix: str = "") -> dict[str, str]:
    """Each setting with its default, tables flattened."""
    found: dict[str, str] = {}
    for field in structs.fields(of):
        if isinstance(field.type, type) and issubclass(field.type, Struct):
            found |= settings(field.type, f"{field.name}.")
        else:
            found[prefix + field.name] = default(field.default)
    return found


def bounds(kind: Any) -> tuple[str, str]:
    """The least and most that a type allows, if it says so."""
    if get_origin(kind) is Annotated:
        meta = kind.__metadata__[0]
        return str(meta.ge), str(meta.le)
    return next((bounds(option) for option in get_args(kind) if get_args(option)), ("", ""))


def test_every_setting_is_in_its_table_with_its_default() -> None:
    shown = {row[0]: row[1] for row in table("## Settings")}
    assert shown == settings(Settings)


def test_every_setting_of_a_rule_is_in_its_table_with_default_and_bounds() -> None:
    shown = {row[0]: tuple(row[1:4]) for row in table("Settings of a rule:")}
    assert shown == {
        field.name: (default(field.default), *bounds(field.type))
        for field in structs.fields(Rule)
        if field.name not in RULE_KEYS
    }


def test_every_setting_of_a_pool_is_in_its_table_with_its_default() -> None:
    shown = {row[0]: row[1] for row in table("A pool:")}
    expected = settings(Pool)
    del expected["name"]
    expected["server"] = expected.pop("servers")
    assert shown == expected


def test_every_action_and_every_variable_of_commands_is_named() -> None:
    rules = README.partition("## Rules")[2].partition("## What is in Redis")[0]
    assert [action for action in ACTIONS if action not in rules and action not in COMPANIONS] == []
    for name in {name for names in VARIABLES.values() for name in names}:
        assert f"${{{name}}}" in rules


def test_the_table_of_keys_is_the_one_in_the_code() -> None:
    lines = (keys.__doc__ or "").splitlines()
    assert generated("keys") == "\n".join(line for line in lines if line.startswith("|"))


def test_every_topic_is_in_its_table() -> None:
    assert [row[0] for row in table("## What is in Kafka")] == list(keys.TOPICS)


def events_table() -> str:
    """Every event and command, with its fields."""
    rows = ["| topic | type | fields, besides `at` and `node` |", "|---|---|---|"]
    for kind in (*get_args(Event), *get_args(Command)):
        name = str(kind.__struct_config__.tag)
        fields = " ".join(field for field in kind.__struct_fields__ if field not in ("at", "node"))
        rows.append(f"| `{topic_of(name)}` | `{name}` | {f'`{fields}`' if fields else ''} |")
    return "\n".join(rows)


def topic_of(name: str) -> str:
    """Where records of this type are."""
    if name.startswith(("client.", "session.", "control.", "node.")):
        return keys.CLIENTS_TOPIC
    return keys.DELIVERIES_TOPIC if "." not in name and name != "tick" else keys.MESSAGES_TOPIC


def test_the_table_of_events_names_every_type_and_field() -> None:
    assert generated("events") == events_table()
