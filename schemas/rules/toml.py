"""Read rules from a `millpond.toml`: its `[pool.*]` tables and `[[rule]]` entries."""

from __future__ import annotations

import re
import tomllib
from typing import Any, Final

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules.build import DraftTable, build_rules
from millpond.schemas.rules.faults import Faults
from millpond.schemas.rules.ruleset import Rules, default_rules, documented_rules
from millpond.schemas.rules.toml_lines import Path, TomlLines

_LINE: Final = re.compile(r"at line (\d+)")


def parse_toml(text: str, file: str) -> Rules:
    """Read the rules of a file. A file without `rule` gets the documented rules, on its only pool.

    All keys but `pool` and `rule` are ignored: `pipeline/settings.py` reads them.

    Raises:
        ConfigError: The text is not TOML, or rules or pools are invalid. Each fault names its line.
    """
    return _TomlFile(text, file).rules()


def parse_document(text: str, file: str) -> dict[str, Any]:
    """Read a TOML document.

    Raises:
        ConfigError: The text is not TOML. TOML's parser stops at its first mistake, so there is one.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _LINE.search(str(error))
        # Without a line number the message says "at end of document".
        line = int(found[1]) if found else text.count("\n") + 1
        raise ConfigError(f"not TOML: {error}", file=file, line=line) from error
    except RecursionError as error:
        raise ConfigError("not TOML: nested too deeply", file=file) from error


class _TomlFile:
    def __init__(self, text: str, file: str) -> None:
        self._file = file
        self._document = parse_document(text, file)
        self._lines = TomlLines(text)
        self._faults = Faults()

    def rules(self) -> Rules:
        pools = self._pools()
        if "rule" in self._document:
            return build_rules(pools, self._drafts(), self._faults)
        built = build_rules(pools, (), self._faults).pools
        if not pools:
            return default_rules()
        if len(built) > 1:
            reason = "the file has several pools, but no [[rule]] that names one"
            raise ConfigError(reason, file=self._file)
        return Rules(documented_rules(built[0].name), built)

    def _pools(self) -> dict[str, DraftTable]:
        pools = self._document.get("pool", {})
        if not isinstance(pools, dict):
            self._faults.add(self._fault("a pool is written as a table, [pool.pool1]", "pool"))
            return {}
        return self._tables({("pool", name): pools[name] for name in pools})

    def _drafts(self) -> list[DraftTable]:
        rules = self._document["rule"]
        if not isinstance(rules, list):
            self._faults.add(
                self._fault("a rule is written as [[rule]], with two brackets", "rule")
            )
            return []
        return list(self._tables({("rule", at): rule for at, rule in enumerate(rules)}).values())

    def _tables(self, values: dict[tuple[str, Any], Any]) -> dict[Any, DraftTable]:
        """Return the drafts of those values that are tables, by the last key of their paths."""
        drafts = {}
        for path, value in values.items():
            with self._faults.collect():
                drafts[path[-1]] = self._draft(value, *path)
        return drafts

    def _draft(self, table: Any, *path: str | int) -> DraftTable:
        if not isinstance(table, dict):
            raise self._fault(f"{path[0]} is not a table of keys", *path)
        return DraftTable(table, lambda key: self._lines.of(*_path_of(path, key)), self._file)

    def _fault(self, reason: str, *path: str | int) -> ConfigError:
        return ConfigError(reason, file=self._file, line=self._lines.of(*path))


def _path_of(path: Path, key: str | None) -> Path:
    return path if key is None else (*path, key)
