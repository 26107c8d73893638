"""Turns our counters and histograms into the metric families of prometheus_client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from millpond.pipeline.telemetry.histogram import Histogram

Labels: TypeAlias = Sequence[str]
# By label values: a tuple of texts, or a single text for a single label.
Values: TypeAlias = Mapping[Any, float]

__all__ = ["Collector", "Metric", "MetricsSource", "counter", "gauge", "histogram"]


class MetricsSource(Protocol):
    """A part of a process that has metrics."""

    def metrics(self) -> Sequence[Metric]:
        """Return all families of the part, also those without a sample."""
        ...


def counter(name: str, meaning: str, labels: Labels, values: Values) -> Metric:
    """Return a family of counters. The library adds `_total` to the name again."""
    family = CounterMetricFamily(name.removesuffix("_total"), meaning, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else key, value)
    return family


def gauge(name: str, meaning: str, labels: Labels, values: Values) -> Metric:
    """Return a family of gauges."""
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else key, value)
    return family


def histogram(name: str, meaning: str, labels: Labels, values: Mapping[Any, Histogram]) -> Metric:
    """Return a family of histograms."""
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for key, value in values.items():
        ends = [*map(floatToGoString, value.bounds), "+Inf"]
        buckets = list(zip(ends, map(float, accumulate(value.counts)), strict=True))
        family.add_metric(key, buckets, value.sum)
    return family
