"""Counters and histograms of ours, in the form that prometheus_client shows."""

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
# By label values: a tuple of texts, or the text of the only label.
Values: TypeAlias = Mapping[Any, float]

__all__ = ["Collector", "Metric", "MetricsSource", "counter", "gauge", "histogram"]


class MetricsSource(Protocol):
    """What a process shows of one of its parts."""

    def metrics(self) -> Sequence[Metric]:
        """All of its families, also those without a sample so far."""
        ...


def counter(name: str, meaning: str, labels: Labels, values: Values) -> Metric:
    """A family of counters; Prometheus wants `_total` at the end of its name."""
    family = CounterMetricFamily(name.removesuffix("_total"), meaning, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else key, value)
    return family


def gauge(name: str, meaning: str, labels: Labels, values: Values) -> Metric:
    """A family of gauges."""
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else key, value)
    return family


def histogram(name: str, meaning: str, labels: Labels, values: Mapping[Any, Histogram]) -> Metric:
    """A family of histograms."""
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for key, value in values.items():
        ends = [*map(floatToGoString, value.bounds), "+Inf"]
        buckets = list(zip(ends, map(float, accumulate(value.counts)), strict=True))
        family.add_metric(key, buckets, value.sum)
    return family
