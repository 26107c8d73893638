"""One spool file: records in order, in SQLite. `commit` returns after the fsync.

Concepts:

- A *record* has a number. Numbers begin at 1 and have no gaps. They survive a restart as long as the file holds
  records.
- A *block* is one row of the table: the records of one commit, up to 1 MiB, packed with MessagePack. A row costs as
  much as a thousand records in it, and SQLite releases Python's lock at every row. Hence blocks.
- *Discarding* deletes whole blocks at the head. So a few discarded records may remain on disk and be sent again.

State in memory, the *figures*: `last`, `discarded` and `bytes`. The records `discarded + 1 … last` exist, and `bytes`
is the sum of their sizes. A call changes the figures only after its commit.

What can go wrong, and what follows:

- SpoolDown: the disk is full, the file is locked, a permission is missing. No record is lost. The database is
  closed, and the next call opens it again. Only a full disk leaves it open: SQLite recovers from that by itself.
- A commit that failed may nevertheless be on disk, for example if the fsync failed after the write. Its caller saw an
  error. So `_check` deletes the blocks beyond `last` at the next opening.
- SpoolDamaged: SQLite calls the file corrupt, or its content is not ours. The file is moved aside, never deleted, and
  a new one takes its place. Its numbers continue after `last`, so numbers never repeat within a process.
- The file is deleted or replaced from outside: the next call notices another inode, and opens the new file.
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

FILE_MODE: Final = 0o600  # payloads are private
# What a record takes beside key and value: its names, and its share of the row.
RECORD_OVERHEAD_BYTES: Final = 64
BLOCK_BYTES_MAX: Final = 1024 * 1024  # of records; a single record may be larger
# An emptied file above this size is deleted and created again; a smaller one is reused as it is.
EMPTY_FILE_BYTES_MAX: Final = 16 * 1024 * 1024
# 8 MiB of pages. A checkpoint copies the write-ahead log into the database, with a second fsync: not too often.
CHECKPOINT_PAGES: Final = 2_048
# SQLite truncates the write-ahead log to this size when it restarts it
WAL_BYTES_MAX: Final = 16 * 1024 * 1024
LOCKED_S: Final = 1.0  # how long to wait for a reader from outside; no other process writes
FORMAT: Final = 1  # the format of the blocks, in SQLite's user_version

RESCUE: Final = "millpond.pipeline.brokers.spool.rescue"
_DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS block (
    last INTEGER PRIMARY KEY,        -- the number of its last record
    records INTEGER NOT NULL,        -- how many it has
    bytes INTEGER NOT NULL,          -- the sum of their sizes
    bytes_through INTEGER NOT NULL,  -- the sum of all sizes up to its last record, discarded ones included
    packed BLOB NOT NULL             -- MessagePack, an array of records
)"""


class SpoolRecord(NamedTuple):
    """One record for Kafka, and the hook that caused it."""

    topic: str
    key: bytes
    value: bytes
    partition: int | None
    hook: str


class SpoolDown(MillpondError):
    """A spool file cannot be read or written now. It loses no record, and the next call tries again."""


class SpoolDamaged(MillpondError):
    """A spool file could not be understood. It was moved aside, and the next call makes a new one."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[SpoolRecord]] = msgspec.msgpack.Decoder(list[SpoolRecord])


def unpacked(packed: bytes) -> list[SpoolRecord]:
    """Decode a block.

    Raises:
        msgspec.DecodeError: the bytes are not a block.
    """
    return _decoder.decode(packed)


def size_of(record: SpoolRecord) -> int:
    """What a record counts against the spool's limit, in bytes."""
    return len(record.key) + len(record.value) + RECORD_OVERHEAD_BYTES


class SpoolFile:
    """Every method blocks, and one thread at a time calls them. Any thread may read the figures."""

    def __init__(self, path: Path) -> None:
        """The first call of a method opens the file."""
        self.path = path
        self.last = 0  # number of the last stored record
        self.discarded = 0  # number of the last discarded record; `last` if the file is empty
        self.bytes = 0  # sum of the sizes of the records in between
        self.damaged: list[Path] = []  # where this process moved damaged files
        self._figures_known = False  # the figures were read from disk, or come from commits since
        self._database: sqlite3.Connection | None = None  # None: closed, or failed
        # Device and inode of the open file, to notice that it was replaced.
        self._identity: tuple[int, int] | None = None

    @property
    def is_open(self) -> bool:
        """True if the database is open."""
        return self._database is not None

    def open(self) -> None:
        """Read the figures. A damaged file is moved aside, with an error in the log.

        Raises:
            SpoolDown: the file cannot be opened.
        """
        with suppress(SpoolDamaged), self._opened():
            pass

    def commit(self, records: Sequence[SpoolRecord], discard_through: int = 0) -> int:
        """Append records and discard records up to a number, in one transaction.

        Returns:
            The number of the first appended record. All of them are on the disk.

        Raises:
            SpoolDown: no record is stored, and none is discarded.
            SpoolDamaged: no record is stored, and the earlier ones are in the file that was moved aside.
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
        """Read the records `after + 1 … through` with their numbers, about `bytes_max` of them, at least one block.

        Raises:
            SpoolDown, SpoolDamaged: the records cannot be read.
        """
        found: list[tuple[int, SpoolRecord]] = []
        with self._opened() as database:
            query = "SELECT last, records, bytes, packed FROM block WHERE last > ? ORDER BY last"
            # An open cursor keeps the file locked, even after its connection is closed.
            with closing(database.execute(query, (after,))) as rows:
                for last, count, size, packed in rows:
                    numbers = range(last - count + 1, last + 1)
                    try:
                        block = unpacked(packed)
                    except msgspec.DecodeError as error:
                        raise _Foreign(f"block {last}: {error}") from error
                    if len(block) != count:
                        raise _Foreign(f"block {last} holds {len(block)} records, not {count}")
                    both = zip(numbers, block, strict=True)
                    found += [
                        (number, record) for number, record in both if after < number <= through
                    ]
                    bytes_max -= size
                    if bytes_max <= 0 or last >= through:
                        break
        return found

    def close(self) -> None:
        """Close the database. The records stay on disk."""
        database, self._database = self._database, None
        if database is not None:
            with suppress(sqlite3.Error):
                database.close()

    def remove(self) -> None:
        """Delete the file.

        Raises:
            SpoolDown: it cannot be deleted.
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
        """Delete whole blocks. Returns the new `discarded` and `bytes`."""
        database.execute("DELETE FROM block WHERE last <= ?", (through,))
        rows = database.execute(
            "SELECT last - records, bytes_through - bytes FROM block ORDER BY last LIMIT 1"
        )
        before, bytes_before = next(rows, (through, bytes_through))
        return before, bytes_through - bytes_before

    def _empty(self, database: sqlite3.Connection) -> None:
        """Discard everything. A large file is deleted, so that it returns its space."""
        size = self.path.stat().st_size + _wal(self.path).stat().st_size
        # On a full disk even DELETE can fail, because it writes to the write-ahead log. Then the file is deleted, too.
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
        """Open the database if necessary, and translate its errors."""
        try:
            if self._database is not None and self._identity != _identity(self.path):
                logger.error(
                    "%s was deleted or replaced: unsent records are lost, a new file follows",
                    self.path,
                )
                self.close()
            if self._database is None:
                self._database = self._connect()
            yield self._database
        except sqlite3.Error as error:
            full = error_code(error) == sqlite3.SQLITE_FULL
            # SQLite recovers from a full disk by itself. After any other error the next call opens a new connection.
            if not full:
                self.close()
            if error_code(error) in _DAMAGED or isinstance(error, _Foreign):
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
            raise _Foreign(f"it has format {version}, and this version of Millpond reads {FORMAT}")
        # A commit that failed may be on disk nevertheless. Its caller saw an error: delete it.
        if self._figures_known:
            late = database.execute("SELECT 1 FROM block WHERE last > ? LIMIT 1", (self.last,))
            if late.fetchone() is not None:
                database.execute("DELETE FROM block WHERE last > ?", (self.last,))
        self._read_figures(database)
        self._figures_known = True

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
        """Move the file aside. It is never deleted, because `rescue` may read some of its records."""
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
            f"{self.path} cannot be read ({error}). It was moved to {aside}, with {count} or more records"
            f" that Kafka may not have. To save the readable ones: python -m {RESCUE} {aside},"
            " and start the bridge again. Or delete the file"
        )
        logger.error("%s", sentence)
        return SpoolDamaged(sentence)


class _Foreign(sqlite3.DatabaseError):
    """A database with content that this version does not write."""


def _blocks(records: Sequence[SpoolRecord]) -> Iterator[Sequence[SpoolRecord]]:
    """Divide records into blocks of at most `BLOCK_BYTES_MAX`."""
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
    """Device and inode of a file; None if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _sync(directory: Path) -> None:
    """Make creations and renames in a directory durable."""
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
