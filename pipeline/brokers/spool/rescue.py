"""`python -m millpond.pipeline.brokers.spool.rescue FILE` copies the readable records of a damaged spool file.

The copy is a new spool file in the same directory, with a high number. The next bridge that starts takes it over as an
orphan. Records keep their order. The command prints how many are missing in between.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from millpond.pipeline.brokers.spool.directory import NUMBERS_MAX
from millpond.pipeline.brokers.spool.file import (
    LOCKED_S,
    SpoolDown,
    SpoolFile,
    SpoolRecord,
    error_code,
    unpacked,
)

# An unreadable page hides an unknown range of record numbers. The search skips this many numbers one by one, and then
# doubles its step.
SINGLE_STEPS_MAX: Final = 10_000
NUMBER_MAX: Final = 1 << 62  # ends the search
_IN_USE: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Rescued(NamedTuple):
    """The result of a rescue."""

    path: Path  # the new file
    records: int  # how many it holds
    missing: int  # how many are missing between its first and its last record


def rescue(damaged: Path) -> Rescued:
    """Copy the readable records to a new spool file. `damaged` stays as it is.

    Raises:
        SpoolDown: the damaged file is in use, or the copy cannot be written.
    """
    numbers = range(NUMBERS_MAX - 1, -1, -1)
    paths = (damaged.with_name(f"spool-{number}.db") for number in numbers)
    file = SpoolFile(next(path for path in paths if not path.exists()))
    records = missing = last = 0
    for number, block in _blocks(damaged):
        first = number - len(block) + 1
        missing += first - last - 1 if records else 0
        file.commit(block)
        records, last = records + len(block), number
    file.close()
    return Rescued(file.path, records, missing)


def _blocks(damaged: Path) -> Iterator[tuple[int, list[SpoolRecord]]]:
    """Read the blocks, each with the number of its last record."""
    after, failures = 0, 0
    with closing(sqlite3.connect(damaged, timeout=LOCKED_S)) as database:
        while after < NUMBER_MAX:
            try:
                row = database.execute(
                    "SELECT last, packed FROM block WHERE last > ? ORDER BY last LIMIT 1", (after,)
                ).fetchone()
                if row is None:
                    return
                block = unpacked(row[1])
            except (sqlite3.DatabaseError, msgspec.DecodeError) as error:
                if isinstance(error, sqlite3.Error) and error_code(error) in _IN_USE:
                    raise SpoolDown(
                        f"{damaged} is in use: stop the process that uses it, and try again"
                    ) from error
                failures += 1
                after += 1 << max(0, failures - SINGLE_STEPS_MAX)
            else:
                after, failures = row[0], 0
                yield row[0], block


if __name__ == "__main__":
    path, records, missing = rescue(Path(sys.argv[1]))
    sys.stdout.write(f"{records} records are now in {path}, {missing} between them are missing\n")
