"""The offset tracker: records finish in any order, and are committed in log order."""

from __future__ import annotations

from millpond.pipeline.kafka.offsets import UNFINISHED_BYTES_MAX, UNFINISHED_MAX, OffsetTracker


def test_the_offset_to_commit_is_that_of_the_first_unfinished_record() -> None:
    tracker = OffsetTracker(5)
    assert tracker.offset_to_commit() is None
    for offset in (5, 6, 9, 10):  # the log may have gaps
        tracker.begin(offset, 1)
    assert tracker.offset_to_commit() is None
    tracker.finish(6)
    assert tracker.offset_to_commit() is None
    tracker.finish(5)
    assert tracker.offset_to_commit() == 9
    tracker.mark_committed(9)
    assert tracker.offset_to_commit() is None
    tracker.finish(10)
    assert tracker.offset_to_commit() is None
    tracker.finish(9)
    assert tracker.offset_to_commit() == 11
    tracker.finish(9)  # a second time: no effect
    tracker.mark_committed(11)
    assert tracker.offset_to_commit() is None


def test_it_is_full_with_too_many_records_or_too_many_bytes() -> None:
    many, large = OffsetTracker(0), OffsetTracker(0)
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
