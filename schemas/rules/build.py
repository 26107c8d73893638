"""Build rules and pools from drafts. Every fault is collected, with file and line.

A draft is one table as the user wrote it. Both file formats become drafts, so both get the same checks and messages.
What is left of a faulty draft is checked as far as its faults allow. A fault that follows from another is not reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import structs

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules.check import faults_together
from millpond.schemas.rules.faults import Faults, hint
from millpond.schemas.rules.pool import REDIS_PORT, SENTINEL_PORT, Pool
from millpond.schemas.rules.rule import (
    DELIVERY_AGENTS,
    HOOKS,
    PRESENCE_LIFETIME_S,
    Action,
    Rule,
    rule_errors,
)
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
    "wildcards": frozenset(DELIVERY_AGENTS),
    "store_qos0": frozenset({*DELIVERY_AGENTS, "on_message_publish"}),
}

# The `expired_time` without an end, of the one rule whose lifetime has a default in a file. In a Rule it is None.
NEVER: Final = "never"

# The type of each key that a user may write. A command is one string there, and a tuple of fields in a Rule.
_RULE_TYPES: Final = {
    field.name: field.type for field in structs.fields(Rule) if field.name not in ("file", "line")
} | {"commands": tuple[str, ...]}
_POOL_TYPES: Final = {
    field.name: field.type
    for field in structs.fields(Pool)
    if field.name not in ("name", "servers")
} | {"server": str | tuple[str, ...]}
POOL_KEYS: Final = tuple(_POOL_TYPES)

_OTHER_HOOKS: Final = tuple(hook for hook in HOOKS if hook != "session.subscribed")

# host, host:port, [IPv6] or [IPv6]:port
_ADDRESS: Final = re.compile(r"(?:\[([^\]\s]+)\]|([^\s:/@\[\]]+))(?::([0-9]{1,5}))?")


class DraftTable(NamedTuple):
    """One table as the user wrote it.

    values: Key → value.
    line: Returns the line of a key. None asks for the line of the table.
    file: The name of the file, for messages.
    strict: False if every value is text. Numbers and booleans are then read from the text.
    warn: Gets what has no effect, if that is no fault.
    """

    values: Mapping[str, object]
    line: Callable[[str | None], int]
    file: str
    strict: bool = True
    warn: Callable[[str], None] | None = None

    def fault(self, reason: str, key: str | None = None) -> ConfigError:
        """Make the error about this table, at the line of `key` if the table has it."""
        line = self.line(key if key in self.values else None)
        return ConfigError(reason, file=self.file, line=line)

    def converted(self, types: Mapping[str, Any], faults: Faults) -> dict[str, Any]:
        """Return the values, each converted to its type, without those that are at fault.

        A key may be unknown, or a value have another type or be outside its limits.
        """
        values = {}
        for key, value in self.values.items():
            with faults.collect():
                values[key] = self._convert(key, value, types)
        return values

    def _convert(self, key: str, value: object, types: Mapping[str, Any]) -> Any:
        if key not in types:
            raise self.fault(f"unknown key {key!r}: {hint(key, types)}", key)
        choices = _choices(types[key])
        if choices and isinstance(value, str) and value not in choices:
            raise self.fault(f"unknown {key} {value!r}: {hint(value, choices)}", key)
        try:
            return msgspec.convert(value, types[key], strict=self.strict)
        except msgspec.ValidationError as error:
            raise self.fault(f"{key}: {str(error).replace('Expected', 'expected')}", key) from error


def build_rules(
    pools: Mapping[str, DraftTable], rules: Sequence[DraftTable], faults: Faults
) -> Rules:
    """Build all rules and pools, and check them alone and together.

    Raises:
        ConfigError: All faults of the file: those that were found before, and those that are found here.
    """
    complete = not faults
    built_pools = [build_pool(name, draft, faults) for name, draft in pools.items()]
    built_rules = [build_rule(draft, tuple(pools), faults) for draft in rules]
    # Rules that cannot be built are left out. The others may still contradict each other.
    built = Rules(tuple(filter(None, built_rules)), tuple(filter(None, built_pools)))
    for draft, rule in zip(rules, built_rules, strict=True):
        complete = complete and (rule is not None or draft.values.get("hook") in _OTHER_HOOKS)
    for fault in faults_together(built, complete=complete):
        faults.add(fault)
    faults.raise_any()
    return built


def build_rule(draft: DraftTable, pools: Sequence[str], faults: Faults) -> Rule | None:
    """Build one rule, or None if it is at fault: invalid, or with a setting that has no effect.

    A rule needs no pool if the file defines exactly one.
    """
    before = len(faults)
    never = draft.values.get("expired_time") == NEVER
    if never:
        draft = draft._replace(values={**draft.values, "expired_time": None})
    values = draft.converted(_RULE_TYPES, faults)
    if values.get("action") == "on_client_disconnected":
        values.setdefault("expired_time", PRESENCE_LIFETIME_S)
    elif never:
        reason = f"expired_time may be {NEVER!r} with on_client_disconnected alone: remove it"
        faults.add(draft.fault(reason, "expired_time"))
    _find_pool(draft, values, pools, faults)
    if values.get("commands") == ():
        faults.add(draft.fault("commands is empty", "commands"))
    if "hook" not in draft.values:
        faults.add(draft.fault(f"the rule names no hook: known are {', '.join(HOOKS)}"))
    if "hook" not in values:
        return None
    values["commands"] = tuple(tuple(command.split(" ")) for command in values.get("commands", ()))
    rule = Rule(**values, file=draft.file, line=draft.line(None))
    # With one of the two keys, a lack of it follows from another fault.
    has_one = ("action" in draft.values) != ("commands" in draft.values)
    does_something = bool(rule.action or rule.commands)
    for key, reason in rule_errors(rule):
        if does_something or not has_one or key == "topic":
            faults.add(draft.fault(reason, key))
    for key in draft.values if does_something else ():
        if key in values and not _has_effect(rule, key):
            useless = draft.fault(f"{key} has no effect with {rule.summary}: remove it", key)
            if draft.warn is None:
                faults.add(useless)
            else:
                draft.warn(str(useless))
    return rule if len(faults) == before else None


def _find_pool(
    draft: DraftTable, values: dict[str, Any], pools: Sequence[str], faults: Faults
) -> None:
    """Check the pool of a rule, and put it into the values. Of a rule at fault it is an empty name."""
    defined = ", ".join(pools) or "none"
    if "pool" not in draft.values and len(pools) == 1:
        values["pool"] = pools[0]
    elif "pool" not in draft.values:
        faults.add(draft.fault(f"the rule names no pool; defined pools: {defined}"))
    elif "pool" in values and values["pool"] not in pools:
        name = values["pool"]
        faults.add(
            draft.fault(f"the pool {name!r} is not defined; defined pools: {defined}", "pool")
        )
    values.setdefault("pool", "")


def _has_effect(rule: Rule, key: str) -> bool:
    if key == "expired_time":
        return (
            rule.hook.startswith("message.")
            or rule.delivery_agent is not None
            or rule.action == "on_client_disconnected"
        )
    return key not in SETTING_ACTIONS or rule.action in SETTING_ACTIONS[key]


def build_pool(name: str, draft: DraftTable, faults: Faults) -> Pool | None:
    """Build one pool, or None if it is at fault. Without `type` it is a single server, or has the name of a primary."""
    before = len(faults)
    values = draft.converted(_POOL_TYPES, faults)
    # What follows from one of these that could not be read is not reported.
    decisive = {"server", "type", "sentinel", "sentinel_password_file", "tls"}
    unread = decisive & (draft.values.keys() - values.keys())
    kind = values.setdefault("type", "sentinel" if values.get("sentinel") else "single")
    servers = values.pop("server", ())
    texts = servers.split(",") if isinstance(servers, str) else servers
    default_port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    addresses = []
    for text in texts:
        with faults.collect():
            addresses.append(_address(draft, text.strip(), default_port))
    pool = Pool(name=name, servers=tuple(addresses), **values)
    for wrong, key, reason in (
        (not texts, "server", "needs a server, as host:port"),
        (kind == "single" and len(addresses) > 1, "server", "is single, but names several servers"),
        (kind == "sentinel" and not pool.sentinel, "type", "needs sentinel, the primary's name"),
        (kind != "sentinel" and pool.sentinel, "sentinel", 'has sentinel: set type = "sentinel"'),
        *(
            (kind != "sentinel" and getattr(pool, key), key, f'has {key}: set type = "sentinel"')
            for key in ("sentinel_username", "sentinel_password_file")
        ),
        (
            pool.sentinel_username and not pool.sentinel_password_file,
            "sentinel_username",
            "has a sentinel_username: it needs a sentinel_password_file",
        ),
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
        if wrong and not unread:
            faults.add(draft.fault(f"the pool {name!r} {reason}", key))
    return pool if len(faults) == before else None


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
