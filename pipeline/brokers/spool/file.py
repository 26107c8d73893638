"""One file of a spool: records in the order they came, in SQLite, fsynced before anybody is told.

The records of one commit are one row, a block: a row costs as much as a thousand records in it, and SQLite gives up
Python's lock at every row. Records are numbered from 1 without gaps; those at the head go first.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from millpond.schemas.errors import MillpondError

logger = logging.getLogger(__name__)

FILE_MODE: Final = 0o600  # payloads are nobody else's
# Of the names beside a record's key and value, and of the row they are in.
RECORD_OVERHEAD_BYTES: Final = 64
BLOCK_BYTES_MAX: Final = 1024 * 1024  # of records; one alone may be larger
# An empty file that is larger is made anew; a smaller one is used again as it is.
EMPTY_FILE_BYTES_MAX: Final = 16 * 1024 * 1024
# Pages written ahead before they are moved to their place: 8 MiB, or what is fsynced twice would come up too often.
CHECKPOINT_PAGES: Final = 2_048
WAL_BYTES_MAX: Final = 16 * 1024 * 1024  # of which the file keeps no more when it starts over
LOCKED_S: Final = 1.0  # if somebody looks into the file; nobody else writes
FORMAT: Final = 1  # of the blocks; SQLite's user_version

RESCUE: Final = "millpond.pipeline.brokers.spool.rescue"
_DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS block (
    last INTEGER PRIMARY KEY,        -- the number of its last record
    records INTEGER NOT NULL,        -- how many it has
    bytes INTEGER NOT NULL,          -- their sizes
    bytes_through INTEGER NOT NULL,  -- the sizes of all records up to its last, gone ones too
    packed BLOB NOT NULL             -- MessagePack, an array of records
)"""


class SpoolRecord(NamedTuple):
    """One record for Kafka, and the hook that it came from."""

    topic: str
    key: bytes
    value: bytes
    partition: int | None
    hook: str


class SpoolDown(MillpondError):
    """A spool file cannot be read or written now: nothing in it is lost, and the next call tries again."""


class SpoolDamaged(MillpondError):
    """A spool file held what is not ours to read. It was moved aside, and a new one is in its place."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[SpoolRecord]] = msgspec.msgpack.Decoder(list[SpoolRecord])


def unpacked(packed: bytes) -> list[SpoolRecord]:
    """The records of a block.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(packed)


def size_of(record: SpoolRecord) -> int:
    """What a record counts against the spool's bound, in bytes."""
    return len(record.key) + len(record.value) + RECORD_OVERHEAD_BYTES


class SpoolFile:
    """Every method blocks, and all are called by one thread at a time. The figures may be read by any."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before the first call."""
        self.path = path
        self.last = 0  # number of the last record kept
        self.discarded = 0  # number of the last record gone; `last` if the file is empty
        self.bytes = 0  # sizes of the records in between
        self.damaged: list[Path] = []  # where files were moved that could not be read
        self._known = False  # whether the figures have been read
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last call had a database."""
        return self._database is not None

    def open(self) -> None:
        """Read the figures. What is damaged is moved aside, with an error in the log.

        Raises:
            SpoolDown: it cannot be opened.
        """
        with suppress(SpoolDamaged), self._opened():
            pass

    def keep(self, records: Sequence[SpoolRecord], discard_through: int = 0) -> int:
        """Append these, and let go of what is numbered up to `discard_through`, in one commit.

        Returns:
            The number of the first of them. They are on the disk.

        Raises:
            SpoolDown, SpoolDamaged: none of them is kept.
        """
        with self._opened() as database:
            if not records and self.discarded < self.last <= discard_through:
                self._empty(database)
                return self.last + 1
            last, bytes_through = self.last, self._bytes_through(database)
            discarded, left = self.discarded, self.bytes
            with database:
                database.execute("BEGIN IMMEDIATE")
                if discard_through > discarded:
                    discarded, left = self._discard(database, discard_through, bytes_through)
                for block in _blocks(records):
                    size = sum(map(size_of, block))
                    last, bytes_through, left = last + len(block), bytes_through + size, left + size
                    row = (last, len(block), size, bytes_through, _encoder.encode(block))
                    database.execute("INSERT INTO block VALUES (?, ?, ?, ?, ?)", row)
            first = self.last + 1
            self.last, self.discarded, self.bytes = last, discarded, left
            return first

    def read(self, after: int, through: int, bytes_max: int) -> list[tuple[int, SpoolRecord]]:
        """Records with their numbers, from `after` on and up to `through`; at least one block of them.

        Raises:
            SpoolDown, SpoolDamaged: they cannot be read.
        """
        found: list[tuple[int, SpoolRecord]] = []
        with self._opened() as database:
            query = "SELECT last, records, bytes, packed FROM block WHERE last > ? ORDER BY last"
            # A cursor that stays open keeps the file locked, even after its connection is closed.
            with closing(database.execute(query, (after,))) as rows:
                for last, count, size, packed in rows:
                    numbers = range(last - count + 1, last + 1)
                    try:
                        block = unpacked(packed)
                    except msgspec.DecodeError as error:
                        raise _NotOurs(f"block {last}: {error}") from error
                    if len(block) != count:
                        raise _NotOurs(f"block {last} holds {len(block)} records, not {count}")
                    both = zip(numbers, block, strict=True)
                    found += [
                        (number, record) for number, record in both if after < number <= through
                    ]
                    bytes_max -= size
                    if bytes_max <= 0 or last >= through:
                        break
        return found

    def close(self) -> None:
        """Whoever opens it again finds everything."""
        database, self._database = self._database, None
        if database is not None:
            with suppress(sqlite3.Error):
                database.close()

    def remove(self) -> None:
        """Nothing in it is needed any more.

        Raises:
            SpoolDown: it cannot be removed.
        """
        self.close()
        try:
            for path in (self.path, _wal(self.path)):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise SpoolDown(f"{self.path} cannot be removed: {error}") from error

    # -- the figures

    @staticmethod
    def _bytes_through(database: sqlite3.Connection) -> int:
        row = database.execute("SELECT bytes_through FROM block ORDER BY last DESC LIMIT 1")
        return int(next(row, (0,))[0])

    @staticmethod
    def _discard(database: sqlite3.Connection, through: int, bytes_through: int) -> tuple[int, int]:
        """The number of the last record gone, and the sizes of those left. Only whole blocks go."""
        database.execute("DELETE FROM block WHERE last <= ?", (through,))
        rows = database.execute(
            "SELECT last - records, bytes_through - bytes FROM block ORDER BY last LIMIT 1"
        )
        before, bytes_before = next(rows, (through, bytes_through))
        return before, bytes_through - bytes_before

    def _empty(self, database: sqlite3.Connection) -> None:
        """Everything in it is gone. A file that is large gives its space back; so does any if the disk is full."""
        size = self.path.stat().st_size + _wal(self.path).stat().st_size
        try:
            if size <= EMPTY_FILE_BYTES_MAX:
                database.execute("DELETE FROM block")
        except sqlite3.OperationalError:
            size = EMPTY_FILE_BYTES_MAX + 1
        if size > EMPTY_FILE_BYTES_MAX:
            self.remove()
        self.discarded, self.bytes = self.last, 0

    # -- opening

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The database. What goes wrong with it is translated here."""
        try:
            if self._database is not None and self._identity != _identity(self.path):
                logger.error("%s was taken away, and what was in it", self.path)
                self.close()
            if self._database is None:
                self._database = self._connect()
            yield self._database
        except sqlite3.Error as error:
            full = error_code(error) == sqlite3.SQLITE_FULL
            if not full:  # which a database gets over; after anything else it is opened anew
                self.close()
            if error_code(error) in _DAMAGED or isinstance(error, _NotOurs):
                raise self._set_aside(error) from error
            raise SpoolDown(f"{self.path}: {error}") from error
        except OSError as error:
            self.close()
            raise SpoolDown(f"{self.path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, FILE_MODE))
        self._identity = _identity(self.path)
        database = sqlite3.connect(
            self.path, timeout=LOCKED_S, isolation_level=None, check_same_thread=False
        )
        try:
            for pragma in (
                "locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL",
                f"wal_autocheckpoint = {CHECKPOINT_PAGES}", f"journal_size_limit = {WAL_BYTES_MAX}",
            ):  # fmt: skip
                database.execute(f"PRAGMA {pragma}")
            self._check(database)
        except BaseException:
            database.close()
            raise
        return database

    def _check(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:  # a new file
            with database:
                database.execute("BEGIN IMMEDIATE")
                database.execute(_TABLE)
                database.execute(f"PRAGMA user_version = {FORMAT}")
            _sync(self.path.parent)
        elif version != FORMAT:
            raise _NotOurs(f"it has format {version}, and this version of Millpond reads {FORMAT}")
        if self._known:  # a commit that failed may be there nevertheless: nobody was told so
            late = database.execute("SELECT 1 FROM block WHERE last > ? LIMIT 1", (self.last,))
            if late.fetchone() is not None:
                database.execute("DELETE FROM block WHERE last > ?", (self.last,))
        self._read_figures(database)
        self._known = True

    def _read_figures(self, database: sqlite3.Connection) -> None:
        first = database.execute(
            "SELECT last - records, bytes_through - bytes FROM block ORDER BY last LIMIT 1"
        ).fetchone()
        if first is None:
            self.discarded, self.bytes = self.last, 0
            return
        self.discarded, bytes_before = first
        (self.last,) = database.execute("SELECT max(last) FROM block").fetchone()
        self.bytes = self._bytes_through(database) - bytes_before

    def _set_aside(self, error: Exception) -> SpoolDamaged:
        """Never in the way, and never thrown away: who can read it may give it back."""
        self.close()
        count = self.last - self.discarded
        aside = self.path.with_name(f"{self.path.stem}.damaged-{time.time_ns() // 1_000_000}.db")
        try:
            for old, new in ((self.path, aside), (_wal(self.path), _wal(aside))):
                with suppress(FileNotFoundError):
                    old.rename(new)
            _sync(self.path.parent)
        except OSError as failed:
            raise SpoolDown(f"{self.path} is damaged and cannot be moved: {failed}") from error
        self.discarded, self.bytes = self.last, 0
        self.damaged.append(aside)
        sentence = (
            f"{self.path} cannot be read ({error}): it is now {aside}, with {count} or more records"
            f" that Kafka may not have. To save what can be read: python -m {RESCUE} {aside},"
            " and start the bridge again. Or delete it"
        )
        logger.error("%s", sentence)
        return SpoolDamaged(sentence)


class _NotOurs(sqlite3.DatabaseError):
    """A database that we cannot read."""


def _blocks(records: Sequence[SpoolRecord]) -> Iterator[Sequence[SpoolRecord]]:
    """Runs of records, none larger than it may be."""
    begin = size = 0
    for end, record in enumerate(records):
        if end > begin and size + size_of(record) > BLOCK_BYTES_MAX:
            yield records[begin:end]
            begin, size = end, 0
        size += size_of(record)
    if begin < len(records):
        yield records[begin:]


def error_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 if the error is not SQLite's own."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file that is; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _sync(directory: Path) -> None:
    """What was made or renamed in it stays so."""
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
