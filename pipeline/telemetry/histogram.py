"""A histogram that takes many values at once: what a batch brings is counted without a lock for each value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# Upper bounds, in seconds: of what takes a round trip, and of what may also wait for somebody to come.
SHORT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0,
)  # fmt: skip
RECORDS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


class Histogram:
    """Of one event loop."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are the upper ends of the buckets, ascending; one without an end is added."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """One value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def histogram_of(
    histograms: dict[str, Histogram], name: str, bounds: tuple[float, ...] = SHORT_S
) -> Histogram:
    """The one of a name, made when it is first asked for."""
    found = histograms.get(name)
    if found is None:
        found = histograms[name] = Histogram(bounds)
    return found
