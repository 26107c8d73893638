"""Collect the faults of a user's files, so that one run shows all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from millpond.schemas.errors import ConfigError, ConfigFaults


class Faults:
    """The faults that were found so far. Readers add to it and continue; the caller raises at the end."""

    def __init__(self) -> None:
        self._found: list[ConfigError] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, fault: ConfigError) -> None:
        """Note a fault, or all that it reports."""
        self._found += fault.faults

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note the fault that ends the block."""
        try:
            yield
        except ConfigError as fault:
            self.add(fault)

    def raise_any(self) -> None:
        """Do nothing if there is no fault.

        Raises:
            ConfigError: The faults, file by file, each file's in the order of lines.
        """
        if not self._found:
            return
        files = list(dict.fromkeys(fault.file for fault in self._found))
        ordered = sorted(self._found, key=lambda fault: (files.index(fault.file), fault.line or 0))
        raise ordered[0] if len(ordered) == 1 else ConfigFaults(ordered)


def hint(wrong: str, known: Iterable[str]) -> str:
    """Ask for the known word that resembles the wrong one. Without such a word, list all."""
    known = tuple(known)
    return did_you_mean(wrong, known).removeprefix(": ") or f"known are {', '.join(known)}"


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return `: did you mean …?` with the known word that resembles the wrong one, or nothing."""
    close = get_close_matches(wrong, known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""
