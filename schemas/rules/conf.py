"""Read rules from an `emqx_backend_redis.conf`, the file of EMQX's own Redis backend (3.x to 4.4).

```
## a comment
backend.redis.{pool}.{setting} = {value}
backend.redis.msg.expired_after = {seconds}
backend.redis.hook.{hook}.{number} = {JSON}      # a comment
```

Rules are in the order of hooks, then numbers, wherever they are in the file. `expired_after` is the `expired_time` of
`message.publish` rules without one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules.build import DraftTable, build_rules
from millpond.schemas.rules.faults import Faults, hint
from millpond.schemas.rules.rule import EXPIRED_TIME_S_MAX, HOOKS
from millpond.schemas.rules.ruleset import Rules

_COMMENT: Final = re.compile(r"(?:^|\s)#.*")
_NUMBER: Final = re.compile("0|[1-9][0-9]{0,8}")
_SECONDS: Final = re.compile("-?[0-9]{1,18}")
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
        # (place in HOOKS, number) → line and rule
        self._rules: dict[tuple[int, int], tuple[int, dict[str, Any]]] = {}
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
            case ["backend", "redis", pool, setting] if pool not in ("hook", "msg"):
                settings = self._pools.setdefault(pool, {})
                # `password =` means no password. Any other empty value means the default, too.
                if plain:
                    settings[setting] = plain
            case _:
                raise self._fault(line, f"unknown setting {key!r}")

    def _read_expired_after(self, line: int, value: str) -> None:
        if not _SECONDS.fullmatch(value) or int(value) > EXPIRED_TIME_S_MAX:
            reason = f"expired_after is in seconds, at most {EXPIRED_TIME_S_MAX}, not {value!r}"
            raise self._fault(line, reason)
        # EMQX's documentation: zero or less means the default, which is no expiry.
        if int(value) > 0:
            self._expired_after = int(value)

    def _read_hook(self, line: int, hook: str, number: str, value: str) -> None:
        if hook not in HOOKS:
            raise self._fault(line, f"unknown hook {hook!r}: {hint(hook, HOOKS)}")
        if not _NUMBER.fullmatch(number):
            raise self._fault(line, f"a rule of {hook} needs a number, not {number!r}")
        rule = self._read_rule(line, value)
        self._rules[HOOKS.index(hook), int(number)] = line, {"hook": hook, **rule}

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
            name: DraftTable(settings, self._pool_line(name), self._file, strict=False)
            for name, settings in self._pools.items()
        }
        rules = [self._rule(*self._rules[key]) for key in sorted(self._rules)]
        return build_rules(pools, rules, self.faults)

    def _pool_line(self, name: str) -> Any:
        prefix = f"backend.redis.{name}."
        first = min(line for key, line in self._lines.items() if key.startswith(prefix))
        return lambda key: first if key is None else self._lines[prefix + key]

    def _rule(self, line: int, values: dict[str, Any]) -> DraftTable:
        if values["hook"] == "message.publish" and self._expired_after is not None:
            values.setdefault("expired_time", self._expired_after)
        return DraftTable(values, lambda _: line, self._file)
