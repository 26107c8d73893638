"""The reference says what the code does: generated parts are up to date, the rest is compared with the code."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from aiohttp import web
from msgspec import NODEFAULT, Struct, structs

from docs import generate
from millpond.agents.driver import dead_letters
from millpond.agents.effects import Output
from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka.topics import wanted
from millpond.pipeline.process.logs import JsonLines
from millpond.pipeline.settings import ENVIRONMENT_PREFIX, READY_FILE, Settings
from millpond.pipeline.telemetry.agent import LETTERS, OPERATIONS
from millpond.pipeline.telemetry.http import Listener
from millpond.schemas import codec, keys
from millpond.schemas.commands import Command
from millpond.schemas.events import DeliveryFailed, Event
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import ACTIONS, Rule
from millpond.schemas.rules.user_commands import FORBIDDEN, VARIABLES
from tests.unit.pipeline.telemetry.test_telemetry import every_family

ROOT = Path(__file__).parents[2]
DOCUMENTS = {path.stem: path.read_text() for path in sorted(generate.REFERENCE.glob("*.md"))}
RULES, SETTINGS, CLI = DOCUMENTS["rules"], DOCUMENTS["settings"], DOCUMENTS["cli"]
KEYS, KAFKA, METRICS = DOCUMENTS["redis-keys"], DOCUMENTS["kafka"], DOCUMENTS["metrics"]
PARTS = {
    found[2]: found[3] for text in DOCUMENTS.values() for found in generate.PART.finditer(text)
}
# What a rule says besides its settings.
RULE_KEYS = {"hook", "topic", "action", "commands", "pool", "file", "line"}


def rows(part: str) -> list[list[str]]:
    """The cells of a generated table, without backquotes."""
    return [[cell.replace("`", "") for cell in row] for row in generate.cells(PARTS[part])]


def default(value: Any) -> str:
    """A default as a table shows it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case tuple():
            return ", ".join(value)
        case _:
            return "" if value is NODEFAULT else str(value) or "empty"


def settings(of: type[Struct], prefix: str = "") -> dict[str, str]:
    """Each setting with its default, tables flattened."""
    found: dict[str, str] = {}
    for field in structs.fields(of):
        if isinstance(field.type, type) and issubclass(field.type, Struct):
            found |= settings(field.type, f"{field.name}.")
        else:
            found[prefix + field.name] = default(field.default)
    return found


# -- generated parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_parts_are_what_the_code_says(name: str) -> None:
    assert generate.rendered(DOCUMENTS[name]) == DOCUMENTS[name], "run python docs/generate.py"


def test_every_part_that_can_be_generated_stands_in_one_document() -> None:
    names = [found[2] for text in DOCUMENTS.values() for found in generate.PART.finditer(text)]
    assert sorted(names) == sorted(generate.parts())


@pytest.mark.parametrize("part", sorted(PARTS))
def test_no_row_lacks_its_meaning(part: str) -> None:
    head = next((line for line in PARTS[part].splitlines() if line.startswith("|")), "")
    if "| meaning |" in head or "| records |" in head or "| values |" in head:
        assert [row[0] for row in generate.cells(PARTS[part]) if not row[-1]] == []


def test_what_is_written_by_hand_stays_where_its_row_stays() -> None:
    table = generate.Table(("name", "default", "meaning"), [("`a`", "1"), ("`c`", "3")])
    before = (
        "| name | default | meaning |\n|---|---|---|\n| `b` | 2 | gone |\n| `a` | 0 | x \\| y |"
    )
    assert generate.cells(table.text(before)) == [["`a`", "1", "x \\| y"], ["`c`", "3", ""]]


# -- settings and rules ----------------------------------------------------------------------------------


def test_every_setting_is_in_a_table_with_its_default() -> None:
    tables = [name for name in PARTS if name.partition("-")[0] == "settings"]
    assert {row[0]: row[1] for name in tables for row in rows(name)} == settings(Settings)


def test_the_bounds_of_settings_are_shown() -> None:
    shown = {row[0]: row[2] for name in PARTS if name.startswith("settings") for row in rows(name)}
    assert shown["worker.session_timeout_s"] == "number, 6 to 90, seconds"
    assert shown["bridge.spool_bytes_max"] == "integer, at least 1048576, bytes"
    assert shown["kafka.sasl_mechanism"] == "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"


def test_the_variables_of_the_environment_are_those_of_settings() -> None:
    named = re.findall(r"\| `([a-z_.]+)` \| `(MILLPOND_[A-Z_]+)`", SETTINGS)
    assert len(named) > 3
    for setting, variable in named:
        assert variable == ENVIRONMENT_PREFIX + setting.replace(".", "_").upper()
    assert READY_FILE in SETTINGS
    assert READY_FILE in CLI


def test_every_setting_of_a_rule_is_in_its_table_with_default_and_bounds() -> None:
    shown = {row[0]: (row[1], row[2]) for row in rows("rule-settings")}
    assert shown.keys() == set(Rule.__struct_fields__) - RULE_KEYS
    for field in structs.fields(Rule):
        if field.name not in RULE_KEYS:
            assert shown[field.name][0] == default(field.default)
    assert shown["offset_retention_s"][1] == "integer, 60 to 3155760000, seconds"
    assert shown["overflow"][1] == "drop_oldest or dead_letter"


def test_every_key_of_a_rule_is_described() -> None:
    described = RULES.partition("## Keys of a rule")[2].partition("\n## ")[0]
    for name in RULE_KEYS - {"file", "line"}:
        assert f"| `{name}` |" in described


def test_every_setting_of_a_pool_is_in_its_table_with_its_default() -> None:
    shown = {row[0]: row[1] for row in rows("pool-settings")}
    expected = settings(Pool)
    del expected["name"]
    expected["server"] = expected.pop("servers")
    assert shown == expected


def test_every_action_and_every_variable_of_commands_is_named() -> None:
    assert [row[0] for row in rows("actions")] == list(ACTIONS)
    for hook, names in VARIABLES.items():
        (shown,) = [row[1] for row in rows("hooks") if row[0] == hook]
        assert shown.split() == [f"${{{name}}}" for name in names]
    described = {row[0] for row in rows("variables")}
    assert described == {f"${{{name}}}" for names in VARIABLES.values() for name in names}


def test_every_command_that_no_rule_may_use_is_named() -> None:
    shown = {row[0]: row[1].split(", ") for row in rows("forbidden")}
    assert shown == {reason: names.split() for reason, names in FORBIDDEN.items()}


# -- Redis and Kafka -------------------------------------------------------------------------------------


def test_the_table_of_keys_is_the_one_in_the_code() -> None:
    assert generate.cells(PARTS["keys"]) == generate.cells(keys.__doc__ or "")


def test_every_topic_is_in_its_table() -> None:
    assert [row[0] for row in rows("topics")] == list(keys.TOPICS)


def test_the_configuration_of_topics_is_shown() -> None:
    for name, value in wanted(Settings().kafka).items():
        (shown,) = re.findall(rf"\| `{re.escape(name)}` \| (.*) \|", KAFKA)
        assert value in shown or "`kafka." in shown


def test_the_tables_of_events_name_every_type_and_field() -> None:
    names = ("events-clients", "events-messages", "commands-deliveries")
    shown = {row[0]: row[1].split() for name in names for row in rows(name)}
    assert shown == {
        str(kind.__struct_config__.tag): [
            field for field in kind.__struct_fields__ if field not in ("at", "node")
        ]
        for kind in (*get_args(Event), *get_args(Command))
    }
    fields = {row[0] for row in rows("fields")}
    assert fields == {"at", "node"} | {field for of in shown.values() for field in of}


def examples() -> Iterator[dict[str, Any]]:
    """The records in the JSON blocks."""
    for block in re.findall(r"```json\n(.*?)```", KAFKA, re.DOTALL):
        rest = block.strip()
        while rest:
            record, end = json.JSONDecoder().raw_decode(rest)
            yield record
            rest = rest[end:].strip()


def test_there_is_an_example_of_each_type_and_it_is_canonical() -> None:
    shown = list(examples())
    types = [str(kind.__struct_config__.tag) for kind in (*get_args(Event), *get_args(Command))]
    assert [example["type"] for example in shown] == types
    for example in shown:
        text = json.dumps(example).encode()
        commands = generate.topic_of(example["type"]) == keys.DELIVERIES_TOPIC
        record = codec.decode_command(text) if commands else codec.decode(text)
        assert json.loads(codec.encode(record)) == example


def test_the_headers_of_dead_letters_are_named() -> None:
    for name, _ in dead_letters.headers_of("t", 0, 0, "queue", "why"):
        assert f"| `{name}` |" in KAFKA
    for name in ("message-id", "deliveries", "not-produced", "source-channel"):
        assert f"`{name}`" in KAFKA
    assert dead_letters.GONE.strip() in KAFKA


def test_the_consumer_groups_are_named() -> None:
    for agent in AGENT_NAMES:
        assert f"`{keys.group_id('{app}', agent)}`" in KAFKA
    assert f"`{keys.bridge_group_id('{app}')}`" in KAFKA
    assert f"`{keys.rule_events_group_id('{app}')}`" in KAFKA


# -- what processes report -------------------------------------------------------------------------------


def test_every_metric_that_a_process_shows_is_in_its_table_with_its_labels() -> None:
    documented = {
        row[0]: (row[1].partition(",")[0], set(row[2].split()))
        for part in ("metrics-worker", "metrics-bridge", "metrics-process")
        for row in rows(part)
    }
    assert documented == {
        generate.shown(family): (family.type, set(family._labelnames))  # type: ignore[attr-defined]
        for family in every_family()
    }


def test_labels_and_their_values_are_named() -> None:
    values = {row[0]: set(re.findall(r"\w+", row[1])) for row in rows("labels")}
    assert set(LETTERS) <= values["reason"]
    assert set(OPERATIONS) <= values["operation"]
    assert set(AGENT_NAMES) <= values["agent"]
    reasons = get_args(structs.fields(DeliveryFailed)[-1].type)
    assert {"sent", *reasons} <= values["outcome"]
    kinds = {str(kind.__struct_config__.tag) for kind in get_args(Output)}
    assert kinds <= values["type"]


def test_the_paths_of_the_listener_are_in_their_table() -> None:
    class Well:
        async def not_alive(self) -> list[str]:
            return []

        not_ready = not_alive

    app: web.Application = Listener("p", [], Well()).app()
    paths = {route.resource.canonical for route in app.router.routes() if route.resource}
    assert set(re.findall(r"\| `(/[a-z]+)` \|", METRICS)) == paths


def test_the_fields_of_a_json_line_are_named() -> None:
    line = msgspec.json.decode(JsonLines("p").format(logging.makeLogRecord({"msg": "m"})))
    logs = METRICS.partition("## Logs")[2].partition("\n## ")[0]
    assert [*line, "traceback"] == re.findall(r"^\| `(\w+)` \|", logs, re.MULTILINE)


def test_spans_and_their_attributes_are_named() -> None:
    source = (ROOT / "pipeline" / "telemetry" / "otel.py").read_text()
    attributes = set(re.findall(r'"((?:messaging|millpond|service)\.[a-z._]+)"', source))
    traces = METRICS.partition("## Traces")[2]
    assert set(re.findall(r"^\| `([a-z]+\.[a-z._]+)` \|", traces, re.MULTILINE)) == attributes
    for span in ("publish", "fold", "deliver", "batch"):
        assert f'"{span}"' in source
        assert f"| `{span}` |" in traces


# -- commands --------------------------------------------------------------------------------------------


def test_every_command_has_a_section() -> None:
    named = re.findall(r"^### (millpond .*)$", CLI, re.MULTILINE)
    commands = [name for name, each in generate.command_tree() if not hasattr(each, "commands")]
    assert sorted(named) == sorted(commands)
