"""Rewrite the generated parts of docs/reference/: `python docs/generate.py`.

A generated part stands between `<!-- NAME: … -->` and `<!-- end -->`. Most are tables. The first columns of a table come
from the code, the last ones may be written by hand in the document. A row is known by its first cells: it keeps what is
written by hand. A new row has empty cells, and tests/unit/test_docs.py fails until they are filled.
"""  # noqa: INP001  a script beside the documents, no package

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin

from msgspec import NODEFAULT, Struct, structs
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import Metric
from typer.main import get_command

from millpond.pipeline.cli.main import app
from millpond.pipeline.settings import Settings
from millpond.pipeline.telemetry.bridge import (
    CommandMetrics,
    DeadLetterMetrics,
    HookMetrics,
    ProducerMetrics,
    SpoolMetrics,
)
from millpond.pipeline.telemetry.histogram import LONG_S, RECORDS, SHORT_S, Histogram
from millpond.pipeline.telemetry.http import registry_of
from millpond.pipeline.telemetry.worker import WorkerTelemetry
from millpond.schemas import keys
from millpond.schemas.commands import Command
from millpond.schemas.events import Event, TimeMs
from millpond.schemas.rules import default_rules
from millpond.schemas.rules.build import SETTING_ACTIONS
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import (
    ACTION_HOOKS,
    COMPANIONS,
    DELIVERY_AGENTS,
    HOOKS,
    Action,
    Rule,
)
from millpond.schemas.rules.user_commands import FORBIDDEN, VARIABLES

REFERENCE: Final = Path(__file__).parent / "reference"
PART: Final = re.compile(r"(<!-- ([a-z0-9-]+): [^\n]* -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NOTHING: Final = "none"  # a default that is no value
OF_EVERY_EVENT: Final = ("at", "node")
# What a rule says besides its settings, and where the user wrote it.
RULE_KEYS: Final = ("hook", "topic", "action", "commands", "pool", "file", "line")


class Table(NamedTuple):
    """The cells that come from the code; `head` names more columns where the last ones are written by hand. The first
    `key` cells of a row tell it from all others.
    """

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    key: int = 1

    def text(self, before: str) -> str:
        """The table in Markdown, with what the same part of the document had `before` in the columns by hand."""
        written = {tuple(row[: self.key]): row for row in cells(before)}
        lines = [line(self.head), line("---" for _ in self.head)]
        for row in self.rows:
            old = written.get(row[: self.key], [])
            by_hand = old[len(row) :] or [""] * (len(self.head) - len(row))
            lines.append(line([*row, *by_hand]))
        return "\n".join(lines)


def line(row: Iterable[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(row)} |"


def cells(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without their heads."""
    rows = [row for row in text.splitlines() if row.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def code(text: object) -> str:
    """As code, in a cell."""
    return f"`{text}`".replace("|", "\\|")


def plain(text: str) -> str:
    """As prose, in a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def one_of(words: Iterable[str]) -> str:
    """`a`, `b` or `c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


# -- types ---------------------------------------------------------------------------------------------


def default(value: Any) -> str:
    """A default as a cell shows it; empty for a required value."""
    match value:
        case _ if value is NODEFAULT:
            return ""
        case None:
            return NOTHING
        case "":
            return "empty"
        case bool():
            return code(str(value).lower())
        case tuple():
            return code(", ".join(value))
        case _:
            return code(value)


def value(kind: Any, *, brief: bool = False) -> str:
    """What may stand there, in words; `brief` leaves out its bounds."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind == TimeMs:
        return "time in ms"
    if origin is Annotated:
        return value(arguments[0]) + ("" if brief else bounds(kind.__metadata__[0]))
    if origin is Literal:
        return one_of(map(code, arguments))
    if origin in (types.UnionType, typing.Union):
        return one_of(
            value(option, brief=brief) for option in arguments if option is not type(None)
        )
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {value(arguments[0], brief=True)}"
    if origin is tuple:
        return f"[{', '.join(value(each, brief=True) for each in arguments)}]"
    if origin is dict:
        return "object of text"
    if isinstance(kind, type) and issubclass(kind, Struct):
        return code(f"[{', '.join(kind.__struct_fields__)}]")
    names = {bool: "`true` or `false`", int: "integer", float: "number", str: "text", Path: "path"}
    return names[kind]


def bounds(meta: Any) -> str:
    """The least and most of a type."""
    if meta.max_length is not None:
        least = "" if meta.min_length is None else f"{meta.min_length} to "
        return f", {least or 'at most '}{meta.max_length} characters"
    if meta.gt is not None:
        return f", more than {meta.gt}"
    if meta.ge is not None and meta.le is not None:
        return f", {meta.ge} to {meta.le}"
    return f", at least {meta.ge}" if meta.ge is not None else ""


def unit(name: str) -> str:
    """The unit that a name ends with."""
    units = {"_s": "seconds", "_hours": "hours", "_bytes_max": "bytes", "_records_max": "records"}
    return next((f", {said}" for suffix, said in units.items() if name.endswith(suffix)), "")


# -- settings and rules --------------------------------------------------------------------------------


def fields(of: type[Struct], prefix: str = "", leave_out: Iterable[str] = ()) -> Table:
    """The settings of one table of a file."""
    rows = [
        (code(prefix + field.name), default(field.default), value(field.type) + unit(field.name))
        for field in structs.fields(of)
        if field.name not in leave_out and not is_table(field.type)
    ]
    return Table(("setting", "default", "value", "meaning"), rows)


def is_table(kind: Any) -> bool:
    """True if a setting is a table of settings."""
    return isinstance(kind, type) and issubclass(kind, Struct)


def settings() -> Iterator[tuple[str, Table]]:
    """One part for each table of settings."""
    yield "settings", fields(Settings)
    for field in structs.fields(Settings):
        if is_table(field.type):
            yield f"settings-{field.name}", fields(field.type, f"{field.name}.")


def rule_settings() -> Table:
    """The settings of a rule, and the rules that look at them."""
    found = fields(Rule, leave_out=RULE_KEYS)
    rows = [(*row, rules_with(row[0].strip("`"))) for row in found.rows]
    return found._replace(head=(*found.head[:-1], "rules", found.head[-1]), rows=rows)


def rules_with(setting: str) -> str:
    """The rules that look at a setting."""
    if setting not in SETTING_ACTIONS:
        return "`message.*` hooks, delivery rules, `on_client_disconnected`"
    actions, delivery = SETTING_ACTIONS[setting], frozenset(DELIVERY_AGENTS)
    others = sorted(actions - delivery if delivery <= actions else actions)
    return ", ".join([*(["delivery rules"] if delivery <= actions else []), *map(code, others)])


def pool_settings() -> Table:
    """The settings of a pool, as a file names them."""
    found = fields(Pool, leave_out=("name", "servers"))
    server = (code("server"), "", "text or list of text")
    return found._replace(rows=[server, *found.rows])


def actions() -> Table:
    """Every action, with its hooks and the agent that carries it out."""
    rows = [
        (code(action), ", ".join(map(code, hooks)), agent(action))
        for action, hooks in ACTION_HOOKS.items()
    ]
    return Table(("action", "hook", "agent", "meaning"), rows)


def agent(action: Action) -> str:
    """The agent that carries an action out."""
    delivery = COMPANIONS.get(action, action)
    if delivery in DELIVERY_AGENTS:
        return DELIVERY_AGENTS[delivery]
    of_messages = ACTION_HOOKS[action][0].startswith("message.")
    return "the owner of the topic" if of_messages else "sessions"


def hooks() -> Table:
    """Every hook, with the values that commands may use."""
    rows = [
        (code(hook), " ".join(code(f"${{{name}}}") for name in VARIABLES[hook])) for hook in HOOKS
    ]
    return Table(("hook", "variables", "runs when"), rows)


def documented_rules() -> Table:
    """The rules that are in force where a file has none."""
    rows = []
    for rule in default_rules().rules:
        does = rule.action or "; ".join(" ".join(fields) for fields in rule.commands)
        lifetime = "" if rule.expired_time is None else code(rule.expired_time)
        rows.append((code(rule.hook), code(rule.topic) if rule.topic else "", code(does), lifetime))
    return Table(("hook", "topic", "action or commands", "expired_time"), rows)


def variables() -> Table:
    """Every value that commands may use."""
    names = dict.fromkeys(name for of_hook in VARIABLES.values() for name in of_hook)
    return Table(("variable", "meaning"), [(code(f"${{{name}}}"),) for name in names])


def forbidden() -> Table:
    """The Redis commands that no rule may use, and why."""
    rows = [(reason, ", ".join(map(code, names.split()))) for reason, names in FORBIDDEN.items()]
    return Table(("the command …", "commands"), rows)


# -- Redis and Kafka -----------------------------------------------------------------------------------


def key_table() -> Table:
    """The table in the docstring of the module that builds all keys."""
    rows = cells(keys.__doc__ or "")
    return Table(("key", "type", "content", "owner", "lifetime"), [tuple(row) for row in rows])


def topics() -> Table:
    """Every topic."""
    return Table(("topic", "key", "records"), [(code(topic),) for topic in keys.TOPICS])


def topic_of(name: str) -> str:
    """The topic of the records of a type."""
    if name.startswith(("client.", "session.", "control.", "node.")):
        return keys.CLIENTS_TOPIC
    return keys.DELIVERIES_TOPIC if "." not in name and name != "tick" else keys.MESSAGES_TOPIC


def record_types() -> dict[str, Any]:
    """Every event and command, by the name of its type."""
    kinds = (*get_args(Event), *get_args(Command))
    return {str(kind.__struct_config__.tag): kind for kind in kinds}


def events(topic: str) -> Table:
    """The types of records in a topic, with their fields."""
    rows = []
    for name, kind in record_types().items():
        if topic_of(name) == topic:
            own = [field for field in kind.__struct_fields__ if field not in OF_EVERY_EVENT]
            rows.append((code(name), code(" ".join(own)) if own else ""))
    return Table(("type", "fields", "written by", "meaning"), rows)


def record_fields() -> Table:
    """Every field of all records, each form of it once."""
    found: dict[tuple[str, ...], None] = {}
    for kind in record_types().values():
        for field in structs.fields(kind):
            factory = field.default_factory is not NODEFAULT
            unless = code("{}") if factory else json(default(field.default))
            found[code(field.name), value(field.type) + unit(field.name), unless] = None
    return Table(("field", "value", "default", "meaning"), list(found), key=3)


def json(text: str) -> str:
    """A default in JSON."""
    return code("null") if text == NOTHING else text


# -- metrics -------------------------------------------------------------------------------------------


async def _no_ends(_: Any) -> dict[int, int]:
    return {}


def worker_families() -> dict[str, Metric]:
    """What a worker shows, before it has done anything."""
    owned = SimpleNamespace(drivers=dict, loading=(), assigned=True)
    return families([WorkerTelemetry("queue", lambda: owned, _no_ends)])


def bridge_families() -> dict[str, dict[str, Metric]]:
    """What each bridge shows, before it has done anything."""
    recorder = SimpleNamespace(entered={}, lost={}, unacknowledged=(), kept_s=Histogram(SHORT_S))
    commander = SimpleNamespace(taken={}, unfinished=0, seconds=Histogram(SHORT_S))
    commands = CommandMetrics(commander, SimpleNamespace(outcomes={}, delivery_s={}))
    inlet: Any = SimpleNamespace(
        entered={}, lost={}, spooled={}, spooling=False, depth=(0, 0), complaint=None
    )
    letters: Any = DeadLetterMetrics(SimpleNamespace(reader="bridge", counts={}))  # type: ignore[arg-type]
    return {
        "embedded": families([ProducerMetrics(recorder), commands, letters]),
        "emqx": families([HookMetrics({}), SpoolMetrics(inlet), commands, letters]),
        "emqx-kafka": families([letters]),
    }


def families(parts: Any) -> dict[str, Metric]:
    """The families of a process that are ours, by the name that Prometheus shows."""
    found = registry_of("process", parts).collect()
    return {shown(family): family for family in found if family.name.startswith("millpond_")}


def shown(family: Metric) -> str:
    """The name of a family in the text that Prometheus reads."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def measured(name: str, family: Metric) -> tuple[str, str, str]:
    """Name, type with unit, and labels."""
    noun = name.removesuffix("_total").rpartition("_")[2]
    kind = f"{family.type}, {noun}" if noun in ("seconds", "bytes") else family.type
    labels: Iterable[str] = family._labelnames  # type: ignore[attr-defined]  # noqa: SLF001  no other way
    return code(name), kind, " ".join(map(code, labels))


def worker_metrics() -> Table:
    """Every metric of a worker."""
    rows: list[tuple[str, ...]] = [measured(*each) for each in worker_families().items()]
    return Table(("metric", "type", "labels", "meaning"), rows)


def bridge_metrics() -> Table:
    """Every metric of a bridge, and which bridge has it."""
    bridges = bridge_families()
    merged = {name: family for shown in bridges.values() for name, family in shown.items()}
    rows: list[tuple[str, ...]] = [
        (*measured(name, family), " ".join(code(each) for each in bridges if name in bridges[each]))
        for name, family in merged.items()
        # What every worker and bridge shows is in the table of workers alone.
        if name != "millpond_build_info"
    ]
    return Table(("metric", "type", "labels", "bridge", "meaning"), rows)


def process_metrics() -> Table:
    """What the client library shows of a process and its memory."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    rows: list[tuple[str, ...]] = [measured(shown(each), each) for each in registry.collect()]
    return Table(("metric", "type", "labels", "meaning"), rows)


def labels() -> Table:
    """Every label of our metrics."""
    every = [worker_families(), *bridge_families().values()]
    names = {
        label for some in every for name, family in some.items()
        for label in re.findall(r"\w+", measured(name, family)[2])
    }  # fmt: skip
    return Table(("label", "values"), [(code(name),) for name in sorted(names)])


def buckets() -> Table:
    """The upper bounds of histograms."""
    of = {
        "round trips, in seconds": SHORT_S,
        "with waiting, in seconds": LONG_S,
        "records": RECORDS,
    }
    rows = [(name, ", ".join(f"{end:g}" for end in ends)) for name, ends in of.items()]
    return Table(("histogram of", "upper bounds", "metrics"), rows)


# -- commands ------------------------------------------------------------------------------------------


def command_tree(command: Any = None, name: str = "millpond") -> Iterator[tuple[str, Any]]:
    """Every command by its full name, groups among them."""
    command = get_command(app) if command is None else command
    yield name, command
    for each, inside in getattr(command, "commands", {}).items():
        yield from command_tree(inside, f"{name} {each}")


def commands() -> Table:
    """Every command that does something."""
    rows = [
        (f"[{code(name)}](#{name.replace(' ', '-')})",)
        for name, command in command_tree()
        if not hasattr(command, "commands")
    ]
    return Table(("command", "meaning"), rows)


def command_part(name: str, command: Any) -> str:
    """How a command is called, and its arguments and options."""
    hints = typing.get_type_hints(command.callback, include_extras=True) if command.callback else {}
    options = [each for each in command.params if each.param_type_name == "option"]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = [name, *(["[OPTIONS]"] if options else []), *map(placeholder, arguments)]
    if hasattr(command, "commands"):
        words.append("COMMAND")
    elif command.context_settings.get("allow_extra_args"):
        words.append("ARGUMENT…")
    rows = [(code(placeholder(each)), typed(each, hints), "", said(each)) for each in arguments]
    rows += [
        (", ".join(map(code, [*each.opts, *each.secondary_opts])), typed(each, hints), preset(each), said(each))
        for each in options if not each.hidden
    ]  # fmt: skip
    usage = f"```\n{' '.join(words)}\n```"
    table = Table(("argument or option", "value", "default", "help"), rows).text("")
    return f"{usage}\n\n{table}" if rows else usage


def placeholder(argument: Any) -> str:
    """An argument as the usage shows it."""
    if argument.metavar:
        return str(argument.metavar)
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def typed(parameter: Any, hints: Mapping[str, Any]) -> str:
    """What may be given; nothing for a flag."""
    if parameter.param_type_name == "option" and parameter.is_flag:
        return ""
    kind, *extras = get_args(hints[parameter.name])
    least = next((each.min for each in extras if getattr(each, "min", None) is not None), None)
    most = next((each.max for each in extras if getattr(each, "max", None) is not None), None)
    limits = f", {least} to {most}" if most is not None else f", at least {least}"
    one = next((each for each in get_args(kind) if each is not type(None)), kind)
    one = str if get_origin(one) is list else one
    required = ", required" if parameter.required and parameter.param_type_name == "option" else ""
    return value(one) + (limits if least is not None else "") + required


def preset(option: Any) -> str:
    """The default of an option."""
    return "" if option.is_flag or option.default is None else code(option.default)


def said(parameter: Any) -> str:
    """What `--help` says of it."""
    return plain(parameter.help or "")


# -- documents -----------------------------------------------------------------------------------------


def parts() -> dict[str, Callable[[str], str]]:
    """What makes each part, given what the document has there."""
    tables: dict[str, Table] = dict(settings()) | {
        "actions": actions(),
        "hooks": hooks(),
        "documented-rules": documented_rules(),
        "rule-settings": rule_settings(),
        "pool-settings": pool_settings(),
        "variables": variables(),
        "forbidden": forbidden(),
        "keys": key_table(),
        "topics": topics(),
        "events-clients": events(keys.CLIENTS_TOPIC),
        "events-messages": events(keys.MESSAGES_TOPIC),
        "commands-deliveries": events(keys.DELIVERIES_TOPIC),
        "fields": record_fields(),
        "metrics-worker": worker_metrics(),
        "metrics-bridge": bridge_metrics(),
        "metrics-process": process_metrics(),
        "labels": labels(),
        "buckets": buckets(),
        "commands": commands(),
    }
    texts = {
        f"cli-{name.replace(' ', '-')}": command_part(name, command)
        for name, command in command_tree()
        if name == "millpond" or not hasattr(command, "commands")
    }
    made: dict[str, Callable[[str], str]] = {name: each.text for name, each in tables.items()}
    return made | {name: lambda _, text=text: text for name, text in texts.items()}  # type: ignore[misc]


def rendered(text: str) -> str:
    """A document with its generated parts as the code has them now.

    Raises:
        KeyError: it names a part that there is not.
    """
    made = parts()

    def part(found: re.Match[str]) -> str:
        mark, name, before, end = found.groups()
        return f"{mark}\n{made[name](before)}\n\n{end}"

    return PART.sub(part, text)


def main() -> None:
    """Write all documents, and name those that changed."""
    for path in sorted(REFERENCE.glob("*.md")):
        before = path.read_text()
        after = rendered(before)
        if after != before:
            path.write_text(after)
            print(f"{path}: written")  # noqa: T201  a script


if __name__ == "__main__":
    main()
