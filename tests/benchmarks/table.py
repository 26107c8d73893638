"""The one table, and what is said on the way to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

WIDTH: Final = 120
_started = time.monotonic()


class Row(NamedTuple):
    """One line: what was measured, the figures behind it, their ratio, and what is asked of it."""

    what: str
    figures: str
    ratio: str
    target: str
    met: bool | None  # None: nothing is asked


def progress(line: str) -> None:
    """Say on stderr what is happening."""
    print(f"[{time.monotonic() - _started:5.0f} s] {line}", file=sys.stderr, flush=True)


def thousands(rate: float) -> str:
    return f"{rate:,.0f}/s"


def ratio_row(
    what: str, ours: Sequence[float], theirs: Sequence[float], least: float | None
) -> Row:
    """Rates of the same rounds: the median of their ratios, with the lowest and the highest."""
    ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
    middle = median(ratios)
    return Row(
        what,
        f"{thousands(median(ours))} : {thousands(median(theirs))}",
        f"{middle:.2f}" + (f" ({ratios[0]:.2f}–{ratios[-1]:.2f})" if len(ratios) > 1 else ""),
        "" if least is None else f"at least {least:g}",
        None if least is None else middle >= least,
    )


def least_row(what: str, rates: Sequence[float], least: float) -> Row:
    """A rate that is to be reached: the median, with the lowest and the highest."""
    middle = median(rates)
    spread = f"{thousands(min(rates))}–{thousands(max(rates))}" if len(rates) > 1 else ""
    return Row(what, spread, thousands(middle), f"at least {thousands(least)}", middle >= least)


def most_row(what: str, figures: str, value: float, most: float, unit: str) -> Row:
    """A figure that is to stay below a limit."""
    shown = f"{value:.2f}" if unit == "x" else f"{value:.1f} {unit}"
    return Row(what, figures, shown, f"at most {most:g} {unit}", value <= most)


def show(rows: Sequence[Row], notes: Sequence[str]) -> None:
    """The table and its footnotes, on stdout."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what")
    for heading in ("figures", "ratio", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        verdict = {None: "", True: "met", False: "NOT MET"}[row.met]
        table.add_row(row.what, row.figures, row.ratio, row.target, verdict)
    console = Console(width=WIDTH, highlight=False)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", markup=False)
