"""Where the keys of a TOML document stand: `tomllib` does not tell."""

from __future__ import annotations

import tomllib
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str | int, ...]


class TomlLines:
    """The line (1-based) where each table and key of a valid document begins."""

    def __init__(self, text: str) -> None:
        """Cut into statements: the shortest runs of lines that are TOML by themselves."""
        self._lines: dict[Path, int] = {(): 1}
        self._last: dict[Path, int] = {}  # arrays of tables → index of their last table
        table: Path = ()
        statement, begin = "", 1
        for number, line in enumerate(text.split("\n"), start=1):
            statement += line + "\n"
            try:
                parsed = tomllib.loads(statement)
            except tomllib.TOMLDecodeError:
                continue  # ends inside a value of several lines
            if statement.lstrip().startswith("["):
                table = self._header(parsed)
                self._lines.setdefault(table, begin)
            else:
                self._keys(table, parsed, begin)
            statement, begin = "", number + 1

    def _header(self, parsed: dict[str, Any]) -> Path:
        path: Path = ()
        while parsed:
            ((key, value),) = parsed.items()
            path = (*path, key)
            if isinstance(value, list):
                self._last[path] = self._last.get(path, -1) + 1
                value = value[0]
            if path in self._last:
                path = (*path, self._last[path])
            parsed = value
        return path

    def _keys(self, table: Path, parsed: dict[str, Any], begin: int) -> None:
        for key, value in parsed.items():
            path = (*table, key)
            self._lines.setdefault(path, begin)
            if isinstance(value, dict):
                self._keys(path, value, begin)

    def of(self, *path: str | int) -> int:
        """The line of what is at `path`, or of the innermost table around it that has one."""
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]
