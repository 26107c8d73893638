"""A histogram without locks. The one of prometheus_client takes a lock for each value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# Upper bounds in seconds: SHORT_S for round trips, LONG_S for times that include waiting for a client.
SHORT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0,
)  # fmt: skip
# Upper bounds in records.
RECORDS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


class Histogram:
    """Counts values by bucket. Only one event loop may use it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are the upper ends of the buckets, ascending. A last bucket without an end is added."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def histogram_of(
    histograms: dict[str, Histogram], name: str, bounds: tuple[float, ...] = SHORT_S
) -> Histogram:
    """Return the histogram of this name. Create it at the first call."""
    found = histograms.get(name)
    if found is None:
        found = histograms[name] = Histogram(bounds)
    return found
