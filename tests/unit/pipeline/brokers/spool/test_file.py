"""The spool alone, on a real disk: order, bounds, numbers, and what it survives."""

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
    """Opened in turn, as by processes that share a directory."""
    spools = [Spool(tmp_path / "spool", MIB) for _ in range(4)]
    yield spools
    for spool in spools:
        if spool._locks:
            spool.close()


# -- one file


def test_what_is_kept_is_read_in_order_with_its_numbers(file: SpoolFile) -> None:
    assert file.commit(some(3)) == 1
    assert file.commit([SpoolRecord("mqtt.clients", b"", b"\0\xff", 7, "client.connected")]) == 4
    expected = [*some(3), SpoolRecord("mqtt.clients", b"", b"\0\xff", 7, "client.connected")]
    assert everything(file) == list(enumerate(expected, 1))
    assert file.read(1, 3, MIB) == [(2, a_record(2)), (3, a_record(3))]
    assert file.bytes == sum(map(size_of, expected))


def test_a_file_that_is_opened_again_has_all_of_it(file: SpoolFile) -> None:
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
def test_whatever_is_kept_and_discarded_the_file_is_what_a_list_would_be(
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
        # Then what is not discarded is there, and a block of what is may be there still
        found = everything(file)
        assert found == kept[len(kept) - len(found) :]
        assert file.discarded <= discarded
        assert [each for each in found if each[0] > discarded] == kept[discarded:]
        assert file.bytes == sum(size_of(record) for _, record in found)
        assert file.last - file.discarded == len(found)
    file.close()


def test_what_is_read_at_once_is_bounded_but_for_one_block(file: SpoolFile) -> None:
    for first in range(1, 6):
        file.commit(some(1, first=first, size=1_000))
    assert [number for number, _ in file.read(0, 5, 1_500)] == [1, 2]
    assert [number for number, _ in file.read(4, 5, 1)] == [5]
    file.commit(some(5, first=6, size=BLOCK_BYTES_MAX // 2))
    assert [number for number, _ in file.read(5, 10, 1)] == [6]


def test_an_empty_file_gives_its_space_back_and_numbers_go_on(file: SpoolFile) -> None:
    file.commit(some(40, size=MIB))
    assert file.path.stat().st_size + wal_of(file).stat().st_size > EMPTY_FILE_BYTES_MAX
    file.commit((), discard_through=40)
    file.commit(some(1, first=41))
    assert everything(file) == [(41, a_record(41))]
    assert file.path.stat().st_size + wal_of(file).stat().st_size < MIB
    assert file.bytes == size_of(a_record(41))


def test_space_in_the_middle_is_used_again(file: SpoolFile) -> None:
    file.commit(some(1))
    for first in range(2, 400):
        file.commit(some(1, first=first, size=MIB // 4), discard_through=first - 8)
    assert file.path.stat().st_size < EMPTY_FILE_BYTES_MAX


def test_nobody_else_may_read_it(file: SpoolFile) -> None:
    before = os.umask(0)
    try:
        file.commit(some(1))
    finally:
        os.umask(before)
    for path in (file.path, wal_of(file)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def wal_of(file: SpoolFile) -> Path:
    return file.path.with_name(file.path.name + "-wal")


# -- what goes wrong


def test_a_full_disk_refuses_and_is_got_over(file: SpoolFile) -> None:
    file.commit(some(2))
    # Given a disk that takes no more than this
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
    try:
        with pytest.raises(SpoolDown):
            file.commit(some(4, first=3, size=MIB))
        # Then what was there is there, and what fits is taken
        assert everything(file) == list(enumerate(some(2), 1))
        assert file.commit(some(1, first=3)) == 3
        # When it was full while it was closed
        file.close()
        assert everything(file) == list(enumerate(some(3), 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # When there is space again, Then it takes all
    assert file.commit(some(4, first=4, size=MIB)) == 4
    assert len(everything(file)) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_disk_with_no_space_left_at_all_is_emptied_when_kafka_has_it(tmp_path: Path) -> None:
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
        # When Kafka has all, Then there is room again
        file.commit((), discard_through=count)
        for number in range(count + 1, count + 20):
            assert file.commit(some(1, first=number, size=MIB // 8)) == number
    finally:
        file.close()
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_that_goes_away_refuses_and_one_that_comes_back_takes(tmp_path: Path) -> None:
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


def test_a_file_that_was_deleted_is_begun_anew(
    file: SpoolFile, caplog: pytest.LogCaptureFixture
) -> None:
    file.commit(some(2))
    file.path.unlink()
    assert file.commit(some(1, first=3)) == 3
    assert everything(file) == [(3, a_record(3))]
    assert f"{file.path} was deleted or replaced" in caplog.text


def test_a_damaged_file_is_moved_aside_and_the_log_says_how_to_save_it(
    file: SpoolFile, caplog: pytest.LogCaptureFixture
) -> None:
    file.path.write_bytes(b"no database at all " * 1_000)
    file.open()
    (aside,) = file.damaged
    assert aside.read_bytes() == b"no database at all " * 1_000
    assert str(aside) in caplog.text
    assert f"millpond.pipeline.brokers.spool.rescue {aside}" in caplog.text
    assert file.commit(some(1)) == 1


def test_a_file_that_is_damaged_while_it_is_read_keeps_its_numbers(file: SpoolFile) -> None:
    file.commit(some(2))
    database = file._database
    assert database is not None
    database.execute("UPDATE block SET packed = x'c1'")
    with pytest.raises(SpoolDamaged):
        everything(file)
    assert file.commit(some(1, first=3)) == 3
    assert file.bytes == size_of(a_record(3))


def test_what_can_be_read_of_a_damaged_file_is_taken_at_the_next_start(tmp_path: Path) -> None:
    # Given a file of which pages in the middle are gone, as its directory's other files are not
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
    # Then nearly all of it is there, in order, and is sent by who starts next
    assert path == tmp_path / "spool-999.db"
    assert 0 < missing < 50
    assert records + missing == 999
    spool = Spool(tmp_path, MIB)
    spool.open()
    (left,) = spool.orphans
    found = [int(record.value.rstrip(b".")) for _, record in everything(left)]
    assert len(found) == records
    assert found == sorted(found)
    spool.close()


def test_a_file_that_is_in_use_is_not_taken_for_a_damaged_one(file: SpoolFile) -> None:
    file.commit(some(2))
    with pytest.raises(SpoolDown, match="is in use"):
        rescue(file.path)


def test_a_file_that_could_not_be_read_is_let_go_of(file: SpoolFile) -> None:
    """A cursor that a traceback still held kept the file locked on Python 3.12 and later."""
    file.commit(some(2))
    assert file._database is not None
    file._database.execute("UPDATE block SET packed = x'c1'")
    with pytest.raises(SpoolDamaged) as raised:
        everything(file)
    with closing(sqlite3.connect(file.damaged[0], timeout=0)) as database:
        assert database.execute("SELECT count(*) FROM block").fetchone() == (1,)
    assert raised.value.__traceback__ is not None


def test_a_file_of_another_format_is_not_touched(file: SpoolFile) -> None:
    with sqlite3.connect(file.path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    file.open()
    (aside,) = file.damaged
    with sqlite3.connect(aside) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)
    database.close()


KEEPER = """
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


def test_a_process_that_is_killed_between_and_within_commits_loses_nothing_it_answered(
    tmp_path: Path,
) -> None:
    for attempt in range(5):
        path = tmp_path / f"spool-{attempt}.db"
        command = [sys.executable, "-c", KEEPER, str(path)]
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
        # Then all it has told of is there, in order
        assert file.last >= answered
        assert [number for number, _ in found] == list(range(file.discarded + 1, file.last + 1))
        assert [record.value for _, record in found] == [b"%d" % number for number, _ in found]
        assert file.discarded <= max(0, answered - 450)
        file.close()


# -- processes


def test_each_process_has_the_lowest_free_number(spools: list[Spool]) -> None:
    first, second, third, fourth = spools
    for spool in (first, second, third):
        spool.open()
    assert [spool.number for spool in (first, second, third)] == [0, 1, 2]
    second.close()
    fourth.open()
    assert fourth.number == 1
    assert fourth.own.path == first.directory / "spool-1.db"


async def test_what_others_left_is_taken_over_once_and_goes_when_it_is_empty(
    spools: list[Spool],
) -> None:
    first, second, third, fourth = spools
    # Given three processes, of which two are gone; one had nothing left
    for spool in (first, second, third):
        spool.open()
    third.own.commit(some(2))
    for spool in (second, third):
        spool.close()
    # When another starts
    fourth.open()
    assert fourth.number == 1
    (left,) = fourth.orphans
    assert left.path == third.own.path
    assert everything(left) == list(enumerate(some(2), 1))
    await fourth.release(left)
    assert not left.path.exists()
    assert fourth.orphans == []


def test_what_a_live_process_has_is_not_taken(spools: list[Spool]) -> None:
    first, second, third, _ = spools
    first.open()
    first.own.commit(some(1))
    second.open()
    third.open()
    assert (second.orphans, third.orphans) == ([], [])


async def test_calls_are_made_in_their_order_and_never_in_the_event_loop(
    spools: list[Spool],
) -> None:
    spool = spools[0]
    spool.open()
    jobs = [spool.submit(spool.own.commit, some(1)) for _ in range(5)]
    assert await asyncio.gather(*jobs) == [1, 2, 3, 4, 5]
    assert len(await spool.submit(spool.own.read, 0, 5, MIB)) == 5


def test_a_directory_that_cannot_be_used_is_the_users_fault(tmp_path: Path) -> None:
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
