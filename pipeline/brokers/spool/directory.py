"""The spool directory: one file per bridge process, and those of processes that are gone.

`spool-{number}.db` is held by whoever holds a lock (flock) on `spool-{number}.lock`; the lock goes with its process,
the empty lock file stays. A process takes the lowest number that is free. At start it also takes what others left:
files with content that nobody holds. Files are moved to `spool-{number}.damaged-{ms}.db` if they cannot be read.
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

NUMBERS_MAX: Final = 1_000  # processes that share one directory
DIRECTORY_MODE: Final = 0o700

_FILE: Final = re.compile(r"spool-(\d+)\.db")

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Spool:
    """One per bridge process. `own` takes what is new; `left` are files of processes that are gone, to be emptied."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        """`bytes_max` bounds the sizes of the records in `own`; its file may be half as large again."""
        self.directory, self.bytes_max = directory, bytes_max
        self.number = 0  # of this process among those that share the directory, from 0
        self.left: list[SpoolFile] = []
        self._locks: dict[int, int] = {}  # number → file descriptor
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        self._own: SpoolFile | None = None

    @property
    def own(self) -> SpoolFile:
        """The file of this process."""
        assert self._own is not None, "open() comes first"
        return self._own

    def open(self) -> None:
        """Take a number, and what others left. Blocks.

        Raises:
            ConfigError: the directory cannot be used.
        """
        try:
            self.directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            self.number = self._take_number()
            left = sorted(number for number in self._numbers() if self._take(number))
        except OSError as error:
            raise ConfigError(f"[bridge] spool_directory: {error}") from error
        self._own = SpoolFile(self._path(self.number))
        used = self._own.path.exists() and self._own.path.stat().st_size > 0
        self.left = [file for number in left if (file := self._left(number)) is not None]
        try:
            self.own.open()
        except SpoolDown as error:
            if used:
                raise ConfigError(f"[bridge] spool_directory: {error}") from error
            # The disk is full, say: it is tried again.
            logger.error("the spool cannot be used now: %s", error)  # noqa: TRY400  no traceback

    def submit(
        self,
        method: Callable[Arguments, Answer],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> asyncio.Future[Answer]:
        """What a method of a file answers, from the one thread that calls them, in the order of these calls."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, partial(method, *arguments, **named))

    async def release(self, file: SpoolFile) -> None:
        """A file that another process left is empty: it goes.

        Raises:
            SpoolDown: it cannot be removed; it stays in `left`.
        """
        await self.submit(file.remove)
        self.left.remove(file)
        self._unlock(_number(file.path))

    def close(self) -> None:
        """Let go of everything; what the files hold stays. Blocks until calls under way have ended."""
        for file in (*self.left, self.own):
            self._thread.submit(file.close)
        self._thread.shutdown()
        for number in list(self._locks):
            self._unlock(number)

    # -- numbers

    def _path(self, number: int) -> Path:
        return self.directory / f"spool-{number}.db"

    def _take_number(self) -> int:
        for number in range(NUMBERS_MAX):
            if self._take(number):
                return number
        raise ConfigError(f"[bridge] spool_directory: {NUMBERS_MAX} processes use it already")

    def _numbers(self) -> list[int]:
        """Of the files in the directory."""
        found = (_FILE.fullmatch(path.name) for path in self.directory.iterdir())
        return [int(match[1]) for match in found if match]

    def _take(self, number: int) -> bool:
        """Whether it was free, and is ours now."""
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

    def _left(self, number: int) -> SpoolFile | None:
        """What a process left that is gone; None if it is nothing."""
        file = SpoolFile(self._path(number))
        try:
            file.open()
            if file.last > file.discarded:
                logger.warning("%s holds %d records of a process that is gone",
                               file.path, file.last - file.discarded)  # fmt: skip
                return file
            file.remove()
        except SpoolDown as error:
            logger.error("what is in it waits for the next start: %s", error)  # noqa: TRY400  no traceback
            file.close()
        self._unlock(number)
        return None


def _number(path: Path) -> int:
    match = _FILE.fullmatch(path.name)
    assert match is not None, "we named it"
    return int(match[1])
