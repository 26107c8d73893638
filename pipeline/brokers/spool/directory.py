"""The spool directory: one file for each bridge process, and orphans: the files of processes that have ended.

| file | meaning |
|---|---|
| `spool-{number}.db` | the records of one process, in SQLite (`file.py`) |
| `spool-{number}.lock` | empty; the process that uses the number holds a lock (flock) on it |
| `spool-{number}.damaged-{ms}.db` | a file that could not be read, moved aside; `rescue.py` reads what can be read |

The operating system releases the lock when its process ends, also after `kill -9`. The lock file stays.
A process takes the lowest free number. At start it also locks every orphan that holds records, and sends it to Kafka.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from millpond.pipeline.brokers.spool.file import FILE_MODE, SpoolDown, SpoolFile
from millpond.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

NUMBERS_MAX: Final = 1_000  # processes that share one directory: far more than one host runs
DIRECTORY_MODE: Final = 0o700

_FILE: Final = re.compile(r"spool-(\d+)\.db")

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Spool:
    """One per bridge process. New records go to `own`; `orphans` are files of ended processes, to be emptied."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        """`bytes_max` limits the sizes of the records in `own`. Its file may be half as large again."""
        self.directory, self.bytes_max = directory, bytes_max
        self.number = 0  # this process's number among those that share the directory, from 0
        self.orphans: list[SpoolFile] = []
        self._locks: dict[int, int] = {}  # number → file descriptor of the locked file
        # One thread calls all files: SQLite blocks, and the order of commits is the order of calls.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        self._own: SpoolFile | None = None

    @property
    def own(self) -> SpoolFile:
        """The file of this process."""
        assert self._own is not None, "open() comes first"
        return self._own

    def open(self) -> None:
        """Lock a number and all orphans. Blocks.

        Raises:
            ConfigError: the directory cannot be used, or the process's own file holds records and cannot be opened.
        """
        try:
            self.directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            self.number = self._lock_lowest()
            orphans = sorted(number for number in self._numbers() if self._lock(number))
        except OSError as error:
            raise ConfigError(f"[bridge] spool_directory: {error}") from error
        self._own = SpoolFile(self._path(self.number))
        used = self._own.path.exists() and self._own.path.stat().st_size > 0
        self.orphans = [file for number in orphans if (file := self._orphan(number)) is not None]
        try:
            self.own.open()
        except SpoolDown as error:
            if used:
                raise ConfigError(f"[bridge] spool_directory: {error}") from error
            # No record is lost, for example because the disk is full. The first write tries again.
            logger.error("the spool cannot be opened, the first write tries again: %s", error)  # noqa: TRY400  no traceback

    def submit(
        self,
        method: Callable[Arguments, Answer],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> asyncio.Future[Answer]:
        """Call a method of a file in the spool's thread. Methods run in the order of these calls."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, partial(method, *arguments, **named))

    async def release(self, file: SpoolFile) -> None:
        """Delete an orphan whose records Kafka has, and unlock its number.

        Raises:
            SpoolDown: the file cannot be deleted; it stays in `orphans`.
        """
        await self.submit(file.remove)
        self.orphans.remove(file)
        self._unlock(_number(file.path))

    def close(self) -> None:
        """Close the files and release the locks; the records stay on disk. Blocks until running calls have ended."""
        for file in (*self.orphans, self.own):
            self._thread.submit(file.close)
        self._thread.shutdown()
        for number in list(self._locks):
            self._unlock(number)

    # -- numbers

    def _path(self, number: int) -> Path:
        return self.directory / f"spool-{number}.db"

    def _lock_lowest(self) -> int:
        for number in range(NUMBERS_MAX):
            if self._lock(number):
                return number
        raise ConfigError(
            f"[bridge] spool_directory: {NUMBERS_MAX} processes already use {self.directory}"
        )

    def _numbers(self) -> list[int]:
        """The numbers of all spool files in the directory."""
        found = (_FILE.fullmatch(path.name) for path in self.directory.iterdir())
        return [int(match[1]) for match in found if match]

    def _lock(self, number: int) -> bool:
        """True if the number was free. Then this process has locked it."""
        if number in self._locks:
            return False
        path = self.directory / f"spool-{number}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        except OSError:
            os.close(lock)
            raise
        self._locks[number] = lock
        return True

    def _unlock(self, number: int) -> None:
        os.close(self._locks.pop(number))

    def _orphan(self, number: int) -> SpoolFile | None:
        """Open an orphan. None if it is empty, or cannot be opened now; then unlock its number."""
        file = SpoolFile(self._path(number))
        try:
            file.open()
            if file.last > file.discarded:
                logger.warning("%s holds %d records of a process that has ended; this process sends them to Kafka",
                               file.path, file.last - file.discarded)  # fmt: skip
                return file
            file.remove()
        except SpoolDown as error:
            logger.error("the next start of a bridge tries this spool file again: %s", error)  # noqa: TRY400  no traceback
            file.close()
        self._unlock(number)
        return None


def _number(path: Path) -> int:
    match = _FILE.fullmatch(path.name)
    assert match is not None, "only this module names spool files"
    return int(match[1])
