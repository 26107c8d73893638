"""Which commands of a partition are finished: they finish in any order, and are committed in theirs."""

from __future__ import annotations

from millpond.pipeline.kafka.offsets import UNFINISHED_BYTES_MAX, UNFINISHED_MAX, Ledger


def test_a_partition_is_committed_up_to_the_first_command_that_is_not_finished() -> None:
    ledger = Ledger(5)
    assert ledger.due() is None
    for offset in (5, 6, 9, 10):  # the log may have gaps
        ledger.begin(offset, 1)
    assert ledger.due() is None
    ledger.finish(6)
    assert ledger.due() is None
    ledger.finish(5)
    assert ledger.due() == 9
    ledger.committed(9)
    assert ledger.due() is None
    ledger.finish(10)
    assert ledger.due() is None
    ledger.finish(9)
    assert ledger.due() == 11
    ledger.finish(9)  # told twice
    ledger.committed(11)
    assert ledger.due() is None


def test_it_is_full_with_too_many_commands_or_too_many_bytes() -> None:
    many, large = Ledger(0), Ledger(0)
    for offset in range(UNFINISHED_MAX):
        assert not many.full
        many.begin(offset, 0)
    assert many.full
    many.finish(77)
    assert not many.full
    large.begin(0, UNFINISHED_BYTES_MAX - 1)
    assert not large.full
    large.begin(1, 1)
    assert large.full
    large.finish(1)
    assert not large.full
