"""Build rules and pools from drafts. The first fault becomes a ConfigError with file and line.

A draft is one table as the user wrote it. Both file formats become drafts, so both get the same checks and messages.
"""

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
from millpond.schemas.rules.rule import DELIVERY_AGENTS, HOOKS, Action, Rule, rule_error
from millpond.schemas.rules.ruleset import Rules

PORT_MAX: Final = 65_535

# The settings that have an effect with some actions only. For `expired_time` see `_has_effect`.
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

# The type of each key that a user may write. A command is one string there, and a tuple of fields in a Rule.
_RULE_TYPES: Final = {
    field.name: field.type for field in structs.fields(Rule) if field.name not in ("file", "line")
} | {"commands": tuple[str, ...]}
_POOL_TYPES: Final = {
    field.name: field.type
    for field in structs.fields(Pool)
    if field.name not in ("name", "servers")
} | {"server": str | tuple[str, ...]}

# host, host:port, [IPv6] or [IPv6]:port
_ADDRESS: Final = re.compile(r"(?:\[([^\]\s]+)\]|([^\s:/@\[\]]+))(?::([0-9]{1,5}))?")


class DraftTable(NamedTuple):
    """One table as the user wrote it.

    values: Key → value.
    line: Returns the line of a key. None asks for the line of the table.
    file: The name of the file, for messages.
    strict: False if every value is text. Numbers and booleans are then read from the text.
    """

    values: Mapping[str, object]
    line: Callable[[str | None], int]
    file: str
    strict: bool = True

    def fault(self, reason: str, key: str | None = None) -> ConfigError:
        """Make the error about this table, at the line of `key` if the table has it."""
        line = self.line(key if key in self.values else None)
        return ConfigError(reason, file=self.file, line=line)

    def converted(self, types: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values, each converted to its type.

        Raises:
            ConfigError: A key is unknown, or a value has another type or is outside its limits.
        """
        return {key: self._convert(key, value, types) for key, value in self.values.items()}

    def _convert(self, key: str, value: object, types: Mapping[str, Any]) -> Any:
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
    """Build all rules and pools, and check them alone and together.

    Raises:
        ConfigError: The first fault.
    """
    built_pools = tuple(build_pool(name, draft) for name, draft in pools.items())
    built = Rules(tuple(build_rule(draft, tuple(pools)) for draft in rules), built_pools)
    check_together(built)
    return built


def build_rule(draft: DraftTable, pools: Sequence[str]) -> Rule:
    """Build one rule. It needs no pool if the file defines exactly one.

    Raises:
        ConfigError: The rule is invalid, or has a setting without effect.
    """
    values = draft.converted(_RULE_TYPES)
    if "hook" not in values:
        raise draft.fault(f"the rule names no hook: known are {', '.join(HOOKS)}")
    if "pool" not in values and len(pools) == 1:
        values["pool"] = pools[0]
    defined = ", ".join(pools) or "none"
    if "pool" not in values:
        raise draft.fault(f"the rule names no pool; defined pools: {defined}")
    if values["pool"] not in pools:
        raise draft.fault(
            f"the pool {values['pool']!r} is not defined; defined pools: {defined}", "pool"
        )
    if values.get("commands") == ():
        raise draft.fault("commands is empty", "commands")
    values["commands"] = tuple(tuple(command.split(" ")) for command in values.get("commands", ()))
    rule = Rule(**values, file=draft.file, line=draft.line(None))
    error = rule_error(rule)
    if error is not None:
        key, reason = error
        raise draft.fault(reason, key)
    for key in draft.values:
        if not _has_effect(rule, key):
            raise draft.fault(f"{key} has no effect with {rule.summary}: remove it", key)
    return rule


def _has_effect(rule: Rule, key: str) -> bool:
    if key == "expired_time":
        return rule.hook.startswith("message.") or rule.delivery_agent is not None
    return key not in SETTING_ACTIONS or rule.action in SETTING_ACTIONS[key]


def build_pool(name: str, draft: DraftTable) -> Pool:
    """Build one pool. Without `type` it is a single server.

    Raises:
        ConfigError: The pool is invalid.
    """
    values = draft.converted(_POOL_TYPES)
    kind = values.get("type", "single")
    servers = values.pop("server", ())
    texts = servers.split(",") if isinstance(servers, str) else servers
    default_port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    addresses = tuple(_address(draft, text.strip(), default_port) for text in texts)
    pool = Pool(name=name, servers=addresses, **values)
    for wrong, key, reason in (
        (not addresses, "server", "needs a server, as host:port"),
        (kind == "single" and len(addresses) > 1, "server", "is single, but names several servers"),
        (kind == "sentinel" and not pool.sentinel, "type", "needs sentinel, the primary's name"),
        (kind != "sentinel" and pool.sentinel, "sentinel", 'has sentinel: set type = "sentinel"'),
        (
            kind == "cluster" and pool.database,
            "database",
            "is a cluster, which has only database 0",
        ),
        (
            pool.password and pool.password_file,
            "password",
            "has a password and a password_file: remove one",
        ),
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
    """Return the words that a type allows, if it is a Literal, or a Literal or None."""
    options = (kind, *get_args(kind))
    return next((get_args(option) for option in options if get_origin(option) is Literal), ())


def _hint(wrong: str, known: Iterable[str]) -> str:
    close = get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
