"""Read rules from an `emqx_backend_redis.conf`, the file of EMQX's own Redis backend (3.x to 4.4).

```
## a comment
backend.redis.{pool}.{setting} = {value}
backend.redis.msg.expired_after = {seconds}
backend.redis.hook.{hook}.{number} = {JSON}      # a comment
```

Rules are in the order of hooks, then numbers, wherever they are in the file. `expired_after` is the `expired_time` of
`message.publish` rules without one.

The old backend read lines that mean nothing here, and ignored settings without effect. Each is a warning, so that old
files need no change. A near miss of a setting is still an error: it was not written on purpose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules.build import NEVER, POOL_KEYS, DraftTable, build_rules
from millpond.schemas.rules.faults import Faults, did_you_mean, hint
from millpond.schemas.rules.rule import DELIVERY_AGENTS, EXPIRED_TIME_S_MAX, HOOKS
from millpond.schemas.rules.ruleset import Rules

_COMMENT: Final = re.compile(r"(?:^|\s)#.*")
_NUMBER: Final = re.compile("0|[1-9][0-9]{0,8}")
_SECONDS: Final = re.compile("-?[0-9]{1,18}")
_EMPTY_TOPIC_HOOKS: Final = ("client.connected", "client.disconnected", "session.created")
# Settings of the whole backend that limit what it reads from the database.
_LIMITS: Final = ("time_range", "max_returned_count")
# Other names of pool settings. The TLS settings are those of EMQ X's other Redis plugins.
_POOL_NAMES: Final = {
    "ssl": "tls",
    "ssl.enable": "tls",
    "cacertfile": "ca_file",
    "ssl.cacertfile": "ca_file",
}
_SWITCH: Final = {"on": "true", "true": "true", "off": "false", "false": "false"}
_OLD_HOOKS: Final = {"message.deliver": "message.delivered"}  # its name in 3.x
_json: Final = json.JSONDecoder()


def parse_conf(text: str, file: str, warn: Callable[[str], None] = lambda _: None) -> Rules:
    """Read the rules of a file. `warn` gets a sentence for each line that the old backend read, and that has no effect.

    Raises:
        ConfigError: Lines are not understood, or rules or pools are invalid. Each fault names its line.
    """
    conf = _Conf(file, warn)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            with conf.faults.collect():
                conf.read(number, line)
    return conf.rules()


class _Conf:
    """The settings of the lines that were read so far."""

    def __init__(self, file: str, warn: Callable[[str], None]) -> None:
        self.faults = Faults()
        self._warn = warn
        self._file = file
        self._lines: dict[str, int] = {}  # key → its line
        self._pools: dict[str, dict[str, str]] = {}
        self._rules: dict[
            tuple[int, int, int], dict[str, Any]
        ] = {}  # (place in HOOKS, number, line) → rule
        self._expired_after: int | None = None

    def _fault(self, line: int, reason: str) -> ConfigError:
        return ConfigError(reason, file=self._file, line=line)

    def read(self, line: int, text: str) -> None:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise self._fault(line, "neither a comment nor `key = value`")
        if key in self._lines:
            raise self._fault(line, f"{key} is given twice, first in line {self._lines[key]}")
        self._lines[key] = line
        plain = _COMMENT.sub("", value).strip()
        match key.split("."):
            case ["backend", "redis", "msg", "expired_after"]:
                self._read_expired_after(line, plain)
            case ["backend", "redis", "hook", group, event, number]:
                self._read_hook(line, f"{group}.{event}", number, value)
            case ["backend", "redis", "rule", *_]:
                reason = "rules are written as backend.redis.hook.HOOK.NUMBER since EMQ X 3"
                raise self._fault(line, reason)
            case ["backend", "redis", name] if name in _LIMITS:
                self._warn_of(
                    line, f"{key} has no effect: a client gets every message that is stored for it"
                )
            case ["backend", "redis", name] if name in POOL_KEYS:
                reason = f"a setting of a pool has the pool's name: backend.redis.pool1.{name}"
                raise self._fault(line, reason)
            case ["backend", "redis", pool, *setting] if setting and pool not in ("hook", "msg"):
                self._read_pool(line, pool, ".".join(setting), plain)
            case _:
                raise self._fault(line, f"unknown setting {key!r}")

    def _warn_of(self, line: int, reason: str) -> None:
        self._warn(str(self._fault(line, reason)))

    def _read_pool(self, line: int, pool: str, setting: str, value: str) -> None:
        settings = self._pools.setdefault(pool, {})
        name = _POOL_NAMES.get(setting, setting)
        self._lines.setdefault(f"backend.redis.{pool}.{name}", line)
        # `password =` means no password. Any other empty value means the default, too.
        if not value:
            return
        if name == "tls":
            if value not in _SWITCH:
                raise self._fault(line, f"{setting} is on or off, not {value!r}")
            value = _SWITCH[value]
        if name not in POOL_KEYS and not did_you_mean(name, POOL_KEYS):
            self._warn_of(line, f"{setting} has no effect here")
        else:
            settings[name] = value

    def _read_expired_after(self, line: int, value: str) -> None:
        if not _SECONDS.fullmatch(value) or int(value) > EXPIRED_TIME_S_MAX:
            reason = f"expired_after is in seconds, at most {EXPIRED_TIME_S_MAX}, not {value!r}"
            raise self._fault(line, reason)
        # EMQX's documentation: zero or less means the default, which is no expiry.
        if int(value) > 0:
            self._expired_after = int(value)

    def _read_hook(self, line: int, hook: str, number: str, value: str) -> None:
        hook = _OLD_HOOKS.get(hook, hook)
        if hook not in HOOKS:
            raise self._fault(line, f"unknown hook {hook!r}: {hint(hook, HOOKS)}")
        if not _NUMBER.fullmatch(number):
            raise self._fault(line, f"a rule of {hook} needs a number, not {number!r}")
        rule = self._read_rule(line, value)
        if hook in _EMPTY_TOPIC_HOOKS and rule.pop("topic", None) is not None:
            self._warn_of(line, f"{hook} has no topic: the rule runs for every client")
        expired_time = rule.get("expired_time")
        if type(expired_time) is int and expired_time <= 0:
            del rule["expired_time"]
        self._rules[HOOKS.index(hook), int(number), line] = {"hook": hook, **rule}

    def _read_rule(self, line: int, value: str) -> dict[str, Any]:
        # The standard decoder finds the end of the JSON. msgspec then refuses what JSON does not allow, such as NaN.
        try:
            _, end = _json.raw_decode(value)
            rule = msgspec.json.decode(value[:end], type=dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise self._fault(line, f"the rule is not a JSON object: {error}") from error
        if _COMMENT.sub("", " " + value[end:]).strip():
            raise self._fault(
                line, f"unexpected text after the rule's JSON: {value[end:].strip()!r}"
            )
        # Drafts have these two keys. In this file the name of the setting and the action give them.
        for key in ("hook", "commands"):
            if key in rule:
                raise self._fault(line, f"unknown key {key!r} in a rule")
        match rule.pop("action", None):
            case {"function": function, **others} if not others:
                return {**rule, "action": function}
            case {"commands": commands, **others} if not others:
                return {**rule, "commands": commands}
        raise self._fault(line, 'the action must be {"function": "…"} or {"commands": ["…"]}')

    def rules(self) -> Rules:
        pools = {
            name: DraftTable(self._meant(name), self._pool_line(name), self._file, strict=False)
            for name in self._pools
        }
        rules = [self._rule(key[-1], self._rules[key]) for key in sorted(self._rules)]
        return build_rules(pools, rules, self.faults)

    def _meant(self, name: str) -> dict[str, str]:
        """Return the settings of a pool without those that the old backend ignored beside others."""
        settings = dict(self._pools[name])
        kind = settings.get("type")
        if kind in ("single", "cluster") and settings.pop("sentinel", None) is not None:
            line = self._lines[f"backend.redis.{name}.sentinel"]
            self._warn_of(line, f"sentinel has no effect with type = {kind}")
        if settings.get("tls") != "true":
            settings.pop("ca_file", None)
        return settings

    def _pool_line(self, name: str) -> Any:
        prefix = f"backend.redis.{name}."
        first = min(line for key, line in self._lines.items() if key.startswith(prefix))
        return lambda key: first if key is None else self._lines[prefix + key]

    def _rule(self, line: int, values: dict[str, Any]) -> DraftTable:
        if values["hook"] == "message.publish" and self._expired_after is not None:
            values.setdefault("expired_time", self._expired_after)
        if values.get("action") in DELIVERY_AGENTS:
            # The old backend fetched nothing for a wildcard.
            values.setdefault("wildcards", "ignore")
        if values.get("action") == "on_client_disconnected":
            # The old backend kept the presence of every client, and applications may read when one was last here.
            values.setdefault("expired_time", NEVER)
        return DraftTable(values, lambda _: line, self._file, warn=self._warn)
