"""Find the lines of keys in a TOML document. `tomllib` does not report them.

A statement is one header (`[table]`) or one `key = value`, on one line or more. The document is valid, so its
statements are the shortest runs of lines that are valid TOML by themselves. Each is parsed alone:

- ON a header: it sets the table of the statements that follow. `[[array]]` adds a table to an array.
- ON a key: its line is the first line of its statement.

A path is the keys from the root to a value, with the index of each table of an array: `("rule", 0, "topic")`.
"""

from __future__ import annotations

import tomllib
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str | int, ...]


class TomlLines:
    """The line, from 1, where each table and key of a valid document begins."""

    def __init__(self, text: str) -> None:
        """Note the line of each table and key."""
        self._lines: dict[Path, int] = {(): 1}
        self._last_index: dict[Path, int] = {}  # array of tables → index of its last table so far
        table: Path = ()
        statement, begin = "", 1
        for number, line in enumerate(text.split("\n"), start=1):
            statement += line + "\n"
            try:
                parsed = tomllib.loads(statement)
            except tomllib.TOMLDecodeError:
                continue  # the statement has more lines
            if statement.lstrip().startswith("["):
                table = self._header(parsed)
                self._lines.setdefault(table, begin)
            else:
                self._keys(table, parsed, begin)
            statement, begin = "", number + 1

    def _header(self, parsed: dict[str, Any]) -> Path:
        """Return the path of the table that a header opens. A parsed header is a chain of dicts with one key each."""
        path: Path = ()
        while parsed:
            ((key, value),) = parsed.items()
            path = (*path, key)
            if isinstance(value, list):
                self._last_index[path] = self._last_index.get(path, -1) + 1
                value = value[0]
            # `[rule.sub]` belongs to the last `[[rule]]`.
            if path in self._last_index:
                path = (*path, self._last_index[path])
            parsed = value
        return path

    def _keys(self, table: Path, parsed: dict[str, Any], begin: int) -> None:
        for key, value in parsed.items():
            path = (*table, key)
            self._lines.setdefault(path, begin)
            if isinstance(value, dict):
                self._keys(path, value, begin)

    def of(self, *path: str | int) -> int:
        """Return the line of the value at `path`. If it has none, the line of the innermost table around it."""
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]
