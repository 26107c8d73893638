"""From what a user wrote to rules: whatever is wrong is one `ConfigError` with file and line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import structs

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules.check import check_together
from millpond.schemas.rules.pool import REDIS_PORT, SENTINEL_PORT, Pool
from millpond.schemas.rules.rule import DELIVERY_AGENTS, Action, Rule, rule_error
from millpond.schemas.rules.ruleset import Rules

PORT_MAX: Final = 65_535

# The settings that only some actions look at; `expired_time` has a rule of its own.
SETTING_ACTIONS: Final[Mapping[str, frozenset[Action]]] = {
    "max_inflight": frozenset(DELIVERY_AGENTS),
    "ack_timeout_s": frozenset(DELIVERY_AGENTS),
    "max_deliveries": frozenset(DELIVERY_AGENTS),
    "max_length": frozenset({"on_message_fetch_for_queue", "on_message_fetch_for_pubsub"}),
    "overflow": frozenset({"on_message_fetch_for_queue"}),
    "start": frozenset({"on_message_fetch_for_pubsub"}),
    "offset_retention_s": frozenset({"on_message_fetch_for_pubsub"}),
    "store_qos0": frozenset({*DELIVERY_AGENTS, "on_message_publish"}),
}

_RULE_TYPES: Final = {
    field.name: field.type for field in structs.fields(Rule) if field.name not in ("file", "line")
} | {"commands": tuple[str, ...]}
_POOL_TYPES: Final = {
    field.name: field.type
    for field in structs.fields(Pool)
    if field.name not in ("name", "servers")
} | {"server": str | tuple[str, ...]}

_ADDRESS: Final = re.compile(r"(?:\[([^\]\s]+)\]|([^\s:/@\[\]]+))(?::([0-9]{1,5}))?")


class DraftTable(NamedTuple):
    """One table as the user wrote it, and the line of each of its keys (of the table itself: None).

    Where `strict` is false every value is text, and numbers are read from it.
    """

    values: Mapping[str, object]
    line: Callable[[str | None], int]
    file: str
    strict: bool = True

    def fault(self, reason: str, key: str | None = None) -> ConfigError:
        """The error that says what is wrong, at a key that the table may not have."""
        line = self.line(key if key in self.values else None)
        return ConfigError(reason, file=self.file, line=line)

    def typed(self, types: Mapping[str, Any]) -> dict[str, Any]:
        """The values, each of its type and within its bounds."""
        return {key: self._typed(key, value, types) for key, value in self.values.items()}

    def _typed(self, key: str, value: object, types: Mapping[str, Any]) -> Any:
        if key not in types:
            raise self.fault(f"unknown key {key!r}: {_hint(key, types)}", key)
        choices = _choices(types[key])
        if choices and isinstance(value, str) and value not in choices:
            raise self.fault(f"unknown {key} {value!r}: {_hint(value, choices)}", key)
        try:
            return msgspec.convert(value, types[key], strict=self.strict)
        except msgspec.ValidationError as error:
            raise self.fault(f"{key}: {str(error).replace('Expected', 'expected')}", key) from error


def build_rules(pools: Mapping[str, DraftTable], rules: Sequence[DraftTable]) -> Rules:
    """The rules and pools, each alone and all together in order.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    built_pools = tuple(build_pool(name, draft) for name, draft in pools.items())
    built = Rules(tuple(build_rule(draft, tuple(pools)) for draft in rules), built_pools)
    check_together(built)
    return built


def build_rule(draft: DraftTable, pools: Sequence[str]) -> Rule:
    """One rule. The pool may be left out if there is only one."""
    values = draft.typed(_RULE_TYPES)
    if "hook" not in values:
        raise draft.fault("the rule names no hook")
    if "pool" not in values and len(pools) == 1:
        values["pool"] = pools[0]
    if "pool" not in values:
        raise draft.fault("the rule names no pool")
    if values["pool"] not in pools:
        known = ", ".join(pools) or "there is none"
        raise draft.fault(f"the pool {values['pool']!r} is not configured, only: {known}", "pool")
    if values.get("commands") == ():
        raise draft.fault("commands is empty", "commands")
    values["commands"] = tuple(tuple(command.split(" ")) for command in values.get("commands", ()))
    rule = Rule(**values, file=draft.file, line=draft.line(None))
    wrong = rule_error(rule)
    if wrong is not None:
        raise draft.fault(wrong[1], wrong[0])
    for key in draft.values:
        if not _uses(rule, key):
            raise draft.fault(f"{key} means nothing for {rule.what}: remove it", key)
    return rule


def _uses(rule: Rule, key: str) -> bool:
    if key == "expired_time":
        return rule.hook.startswith("message.") or rule.delivery_agent is not None
    return key not in SETTING_ACTIONS or rule.action in SETTING_ACTIONS[key]


def build_pool(name: str, draft: DraftTable) -> Pool:
    """One pool; without `type` a single server."""
    values = draft.typed(_POOL_TYPES)
    kind = values.get("type", "single")
    servers = values.pop("server", ())
    texts = servers.split(",") if isinstance(servers, str) else servers
    default_port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    addresses = tuple(_address(draft, text.strip(), default_port) for text in texts)
    pool = Pool(name=name, servers=addresses, **values)
    for wrong, key, reason in (
        (not addresses, "server", "needs a server, as host:port"),
        (kind == "single" and len(addresses) > 1, "server", "is single, but names several servers"),
        (kind == "sentinel" and not pool.sentinel, "type", "needs sentinel, the master's name"),
        (kind != "sentinel" and pool.sentinel, "sentinel", 'names a master: set type = "sentinel"'),
        (
            kind == "cluster" and pool.database,
            "database",
            "is a cluster, which has database 0 only",
        ),
        (pool.password and pool.password_file, "password", "has a password and a password_file"),
        (pool.ca_file and not pool.tls, "ca_file", "has a ca_file: set tls = true"),
    ):
        if wrong:
            raise draft.fault(f"the pool {name!r} {reason}", key)
    return pool


def _address(draft: DraftTable, text: str, default_port: int) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    port = default_port if found is None or found[3] is None else int(found[3])
    if found is None or not 1 <= port <= PORT_MAX:
        raise draft.fault(f"{text!r} is not the address of a server: write host:port", "server")
    return found[1] or found[2], port


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a type allows, if it is a Literal or one or None."""
    options = (kind, *get_args(kind))
    return next((get_args(option) for option in options if get_origin(option) is Literal), ())


def _hint(wrong: str, known: Iterable[str]) -> str:
    close = get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
