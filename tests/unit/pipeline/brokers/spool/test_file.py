"""Spool files and the spool directory on a real disk: order, limits, numbers, and every kind of failure."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.pipeline.brokers.spool.directory import Spool
from millpond.pipeline.brokers.spool.file import (
    BLOCK_BYTES_MAX,
    EMPTY_FILE_BYTES_MAX,
    SpoolDamaged,
    SpoolDown,
    SpoolFile,
    SpoolRecord,
    size_of,
)
from millpond.pipeline.brokers.spool.rescue import rescue
from millpond.schemas.errors import ConfigError

MIB = 1024 * 1024


def a_record(number: int, size: int = 10) -> SpoolRecord:
    return SpoolRecord("mqtt.messages", b"k", b"%d" % number + b"." * size, None, "message.publish")


def some(count: int, first: int = 1, size: int = 10) -> list[SpoolRecord]:
    return [a_record(number, size) for number in range(first, first + count)]


def everything(file: SpoolFile) -> list[tuple[int, SpoolRecord]]:
    return file.read(0, file.last, 1 << 40)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SpoolFile]:
    file = SpoolFile(tmp_path / "spool-0.db")
    yield file
    file.close()


@pytest.fixture
def spools(tmp_path: Path) -> Iterator[list[Spool]]:
    """Spools like those of several processes that share a directory. The test opens them."""
    spools = [Spool(tmp_path / "spool", MIB) for _ in range(4)]
    yield spools
    for spool in spools:
        if spool._locks:
            spool.close()


# -- one file


def test_records_are_read_in_order_with_their_numbers(file: SpoolFile) -> None:
    assert file.commit(some(3)) == 1
    assert file.commit([SpoolRecord("mqtt.clients", b"", b"\0\xff", 7, "client.connected")]) == 4
    expected = [*some(3), SpoolRecord("mqtt.clients", b"", b"\0\xff", 7, "client.connected")]
    assert everything(file) == list(enumerate(expected, 1))
    assert file.read(1, 3, MIB) == [(2, a_record(2)), (3, a_record(3))]
    assert file.bytes == sum(map(size_of, expected))


def test_a_file_that_is_opened_again_has_all_records(file: SpoolFile) -> None:
    file.commit(some(3))
    file.commit(some(4, first=4), discard_through=3)
    file.close()
    again = SpoolFile(file.path)
    again.open()
    assert (again.last, again.discarded, again.bytes) == (file.last, file.discarded, file.bytes)
    assert everything(again) == list(enumerate(some(4, first=4), 4))
    assert again.commit(some(1)) == 8
    again.close()


@settings(deadline=None, max_examples=50)  # every step is fsynced
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.booleans()), max_size=12),
)
def test_a_file_behaves_like_a_list_through_any_commits_and_discards(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]]
) -> None:
    path = tmp_path_factory.mktemp("spool") / "spool-0.db"
    file, kept = SpoolFile(path), list[tuple[int, SpoolRecord]]()
    last = discarded = 0
    for count, through, closes in steps:
        records = some(count, first=last + 1)
        file.commit(records, min(through, last))
        kept += enumerate(records, last + 1)
        last += count
        discarded = max(discarded, min(through, last - count))
        if closes:
            file.close()
        # Then the file has every record that is not discarded, and at most one block of discarded ones
        found = everything(file)
        assert found == kept[len(kept) - len(found) :]
        assert file.discarded <= discarded
        assert [each for each in found if each[0] > discarded] == kept[discarded:]
        assert file.bytes == sum(size_of(record) for _, record in found)
        assert file.last - file.discarded == len(found)
    file.close()


def test_a_read_is_limited_except_for_one_block(file: SpoolFile) -> None:
    for first in range(1, 6):
        file.commit(some(1, first=first, size=1_000))
    assert [number for number, _ in file.read(0, 5, 1_500)] == [1, 2]
    assert [number for number, _ in file.read(4, 5, 1)] == [5]
    file.commit(some(5, first=6, size=BLOCK_BYTES_MAX // 2))
    assert [number for number, _ in file.read(5, 10, 1)] == [6]


def test_an_emptied_file_returns_its_space_and_numbers_continue(file: SpoolFile) -> None:
    file.commit(some(40, size=MIB))
    assert file.path.stat().st_size + wal_of(file).stat().st_size > EMPTY_FILE_BYTES_MAX
    file.commit((), discard_through=40)
    file.commit(some(1, first=41))
    assert everything(file) == [(41, a_record(41))]
    assert file.path.stat().st_size + wal_of(file).stat().st_size < MIB
    assert file.bytes == size_of(a_record(41))


def test_space_of_discarded_records_is_reused(file: SpoolFile) -> None:
    file.commit(some(1))
    for first in range(2, 400):
        file.commit(some(1, first=first, size=MIB // 4), discard_through=first - 8)
    assert file.path.stat().st_size < EMPTY_FILE_BYTES_MAX


def test_only_the_owner_may_read_a_file(file: SpoolFile) -> None:
    before = os.umask(0)
    try:
        file.commit(some(1))
    finally:
        os.umask(before)
    for path in (file.path, wal_of(file)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def wal_of(file: SpoolFile) -> Path:
    return file.path.with_name(file.path.name + "-wal")


# -- failures


def test_a_full_disk_refuses_records_until_there_is_space(file: SpoolFile) -> None:
    file.commit(some(2))
    # Given a disk with little space
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
    try:
        with pytest.raises(SpoolDown):
            file.commit(some(4, first=3, size=MIB))
        # Then earlier records remain, and a record that fits is stored
        assert everything(file) == list(enumerate(some(2), 1))
        assert file.commit(some(1, first=3)) == 3
        # When the file is opened on the full disk
        file.close()
        assert everything(file) == list(enumerate(some(3), 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # When there is space again, Then everything is stored
    assert file.commit(some(4, first=4, size=MIB)) == 4
    assert len(everything(file)) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_file_on_a_completely_full_disk_can_be_emptied(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    file = SpoolFile(disk / "spool-0.db")
    try:
        with pytest.raises(SpoolDown):
            for number in range(1, 10_000):
                file.commit(some(1, first=number, size=MIB // 8))
        count = file.last
        assert count > 20
        found = everything(file)
        assert found == list(enumerate(some(count, size=MIB // 8), 1))
        # When everything is discarded, Then there is room again
        file.commit((), discard_through=count)
        for number in range(count + 1, count + 20):
            assert file.commit(some(1, first=number, size=MIB // 8)) == number
    finally:
        file.close()
        subprocess.run(["umount", str(disk)], check=True)


def test_a_missing_directory_refuses_records_until_it_is_back(tmp_path: Path) -> None:
    file = SpoolFile(tmp_path / "spool" / "spool-0.db")
    with pytest.raises(SpoolDown):
        file.commit(some(1))
    file.path.parent.mkdir()
    assert file.commit(some(1)) == 1
    file.path.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(SpoolDown):
        file.commit(some(1))
    (tmp_path / "elsewhere").rename(file.path.parent)
    assert file.commit(some(1, first=2)) == 2
    assert everything(file) == [(1, a_record(1)), (2, a_record(2))]
    file.close()


def test_a_deleted_file_is_created_again(file: SpoolFile, caplog: pytest.LogCaptureFixture) -> None:
    file.commit(some(2))
    file.path.unlink()
    assert file.commit(some(1, first=3)) == 3
    assert everything(file) == [(3, a_record(3))]
    assert f"{file.path} was deleted or replaced" in caplog.text


def test_a_damaged_file_is_moved_aside_and_the_log_names_the_rescue(
    file: SpoolFile, caplog: pytest.LogCaptureFixture
) -> None:
    file.path.write_bytes(b"no database at all " * 1_000)
    file.open()
    (aside,) = file.damaged
    assert aside.read_bytes() == b"no database at all " * 1_000
    assert str(aside) in caplog.text
    assert f"millpond.pipeline.brokers.spool.rescue {aside}" in caplog.text
    assert file.commit(some(1)) == 1


def test_numbers_continue_after_a_file_was_damaged(file: SpoolFile) -> None:
    file.commit(some(2))
    database = file._database
    assert database is not None
    database.execute("UPDATE block SET packed = x'c1'")
    with pytest.raises(SpoolDamaged):
        everything(file)
    assert file.commit(some(1, first=3)) == 3
    assert file.bytes == size_of(a_record(3))


def test_the_next_start_takes_over_the_rescued_records(tmp_path: Path) -> None:
    # Given a file with damaged pages in the middle
    file = SpoolFile(tmp_path / "spool-3.db")
    for first in range(1, 1_000, 3):
        file.commit(some(3, first=first, size=1_500))
    file.close()
    content = bytearray(file.path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 3 * 4096] = b"\xff" * 3 * 4096
    file.path.write_bytes(content)
    with pytest.raises(SpoolDamaged, match=r"spool\.rescue"):
        everything(file)
    # When it is rescued
    path, records, missing = rescue(file.damaged[0])
    # Then nearly all records are in the new file, in order, and the next start takes it over
    assert path == tmp_path / "spool-999.db"
    assert 0 < missing < 50
    assert records + missing == 999
    spool = Spool(tmp_path, MIB)
    spool.open()
    (orphan,) = spool.orphans
    found = [int(record.value.rstrip(b".")) for _, record in everything(orphan)]
    assert len(found) == records
    assert found == sorted(found)
    spool.close()


def test_the_rescue_refuses_a_file_in_use(file: SpoolFile) -> None:
    file.commit(some(2))
    with pytest.raises(SpoolDown, match="is in use"):
        rescue(file.path)


def test_a_file_that_could_not_be_read_is_unlocked(file: SpoolFile) -> None:
    """On Python 3.12 and later, a cursor in a traceback kept the file locked."""
    file.commit(some(2))
    assert file._database is not None
    file._database.execute("UPDATE block SET packed = x'c1'")
    with pytest.raises(SpoolDamaged) as raised:
        everything(file)
    with closing(sqlite3.connect(file.damaged[0], timeout=0)) as database:
        assert database.execute("SELECT count(*) FROM block").fetchone() == (1,)
    assert raised.value.__traceback__ is not None


def test_a_file_of_another_format_is_moved_aside_unchanged(file: SpoolFile) -> None:
    with sqlite3.connect(file.path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    file.open()
    (aside,) = file.damaged
    with sqlite3.connect(aside) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)
    database.close()


COMMITTER = """
import sys
from pathlib import Path
from millpond.pipeline.brokers.spool.file import SpoolFile, SpoolRecord

file, number = SpoolFile(Path(sys.argv[1])), 0
while True:
    count = number * 7 % 50 + 1
    records = [SpoolRecord("t", b"k", b"%d" % (number + n), None, "h") for n in range(1, count + 1)]
    file.commit(records, discard_through=max(0, number - 500))
    number += count
    print(number, flush=True)
"""


def test_a_process_killed_at_any_moment_loses_no_reported_commit(
    tmp_path: Path,
) -> None:
    for attempt in range(5):
        path = tmp_path / f"spool-{attempt}.db"
        command = [sys.executable, "-c", COMMITTER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            lines = 0
            while lines < 20 + attempt * 37:
                answered = int(process.stdout.readline())
                lines += 1
            process.send_signal(signal.SIGKILL)
            answered = int((process.stdout.read().split() or [b"%d" % answered])[-1])
        file = SpoolFile(path)
        file.open()
        found = everything(file)
        # Then the file has every record whose commit was reported, in order
        assert file.last >= answered
        assert [number for number, _ in found] == list(range(file.discarded + 1, file.last + 1))
        assert [record.value for _, record in found] == [b"%d" % number for number, _ in found]
        assert file.discarded <= max(0, answered - 450)
        file.close()


# -- processes


def test_each_process_takes_the_lowest_free_number(spools: list[Spool]) -> None:
    first, second, third, fourth = spools
    for spool in (first, second, third):
        spool.open()
    assert [spool.number for spool in (first, second, third)] == [0, 1, 2]
    second.close()
    fourth.open()
    assert fourth.number == 1
    assert fourth.own.path == first.directory / "spool-1.db"


async def test_an_orphan_is_taken_over_once_and_deleted_on_release(
    spools: list[Spool],
) -> None:
    first, second, third, fourth = spools
    # Given three processes, two of which have ended, one with an empty file
    for spool in (first, second, third):
        spool.open()
    third.own.commit(some(2))
    for spool in (second, third):
        spool.close()
    # When another process starts
    fourth.open()
    assert fourth.number == 1
    (orphan,) = fourth.orphans
    assert orphan.path == third.own.path
    assert everything(orphan) == list(enumerate(some(2), 1))
    await fourth.release(orphan)
    assert not orphan.path.exists()
    assert fourth.orphans == []


def test_the_file_of_a_running_process_is_not_taken_over(spools: list[Spool]) -> None:
    first, second, third, _ = spools
    first.open()
    first.own.commit(some(1))
    second.open()
    third.open()
    assert (second.orphans, third.orphans) == ([], [])


async def test_submitted_calls_run_in_order_outside_the_event_loop(
    spools: list[Spool],
) -> None:
    spool = spools[0]
    spool.open()
    jobs = [spool.submit(spool.own.commit, some(1)) for _ in range(5)]
    assert await asyncio.gather(*jobs) == [1, 2, 3, 4, 5]
    assert len(await spool.submit(spool.own.read, 0, 5, MIB)) == 5


def test_an_unusable_directory_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="spool_directory"):
        Spool(tmp_path / "file" / "spool", MIB).open()


def test_a_file_with_records_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    first = Spool(tmp_path, MIB)
    first.open()
    first.own.commit(some(1))
    other = Spool(tmp_path, MIB)
    first._unlock(0)  # as if another program held the database
    with pytest.raises(ConfigError, match=r"spool-0\.db"):
        other.open()
    first._locks.clear()
    first.close()
