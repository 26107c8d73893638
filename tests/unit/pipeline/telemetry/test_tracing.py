"""Tracing: which publishes are traced, and how a context travels from record to command."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from millpond.agents.driver.observer import NullObserver
from millpond.agents.ports import OutgoingRecord
from millpond.pipeline.settings import TelemetrySettings
from millpond.pipeline.telemetry import otel
from millpond.pipeline.telemetry.tracers import bridge_tracing, worker_tracing
from millpond.schemas import codec, keys
from millpond.schemas.commands import Deliver
from millpond.schemas.errors import ConfigError
from tests.benchmarks import telemetry as benchmark
from tests.support import given

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{SPAN}-01"
# Nothing listens on this port. No span is sent before the test ends.
SETTINGS = TelemetrySettings(otlp_endpoint="http://127.0.0.1:9", trace_ratio=1.0)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that would be sent."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(otel, "BatchSpanProcessor", lambda *_, **__: SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def bridge(spans: InMemorySpanExporter) -> Iterator[otel.OtelBridgeTracing]:
    bridge = otel.OtelBridgeTracing(SETTINGS, "embedded")
    yield bridge
    bridge.close()


@pytest.fixture
def worker(spans: InMemorySpanExporter) -> Iterator[otel.OtelWorkerTracing]:
    worker = otel.OtelWorkerTracing(SETTINGS, "queue")
    yield worker
    worker.close()


def deliver(message_id: str = "m1") -> Deliver:
    return Deliver(
        client_id="anna", lease="queue/0/1", valid_for_s=60, attempt=2, message_id=message_id,
        topic="t", qos=1, retain=False, payload="hello",
    )  # fmt: skip


def command(message_id: str = "m1") -> OutgoingRecord:
    return OutgoingRecord(keys.DELIVERIES_TOPIC, b"anna", codec.encode(deliver(message_id)))


def fetched(*headers: tuple[str, bytes], offset: int = 0) -> SimpleNamespace:
    return SimpleNamespace(offset=offset, headers=headers)


class Log:
    """A log that keeps the produced records."""

    def __init__(self) -> None:
        self.produced: list[OutgoingRecord] = []

    def produce(self, records: Sequence[OutgoingRecord]) -> None:
        self.produced += records


# -- off ------------------------------------------------------------------------------------------------


def test_without_an_endpoint_there_is_no_tracing() -> None:
    assert bridge_tracing(TelemetrySettings(), "embedded") is None
    assert worker_tracing(TelemetrySettings(), "queue") is None


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "millpond.pipeline.telemetry.otel", raising=False)
    monkeypatch.delattr("millpond.pipeline.telemetry.otel", raising=False)
    for call in (lambda: bridge_tracing(SETTINGS, "x"), lambda: worker_tracing(SETTINGS, "queue")):
        with pytest.raises(ConfigError, match=r"pip install 'millpond\[otel\]'"):
            call()


# -- bridges --------------------------------------------------------------------------------------------


def test_the_ratio_decides_how_many_publishes_are_traced(spans: InMemorySpanExporter) -> None:
    never = otel.OtelBridgeTracing(
        TelemetrySettings(otlp_endpoint="http://127.0.0.1:9", trace_ratio=0), "e"
    )
    assert all(never.publish(given.published()) is None for _ in range(100))
    half = otel.OtelBridgeTracing(
        TelemetrySettings(otlp_endpoint="http://127.0.0.1:9", trace_ratio=0.5), "e"
    )
    assert 300 < sum(half.publish(given.published()) is not None for _ in range(1_000)) < 700


def test_a_publish_with_a_sampled_context_is_always_traced(
    bridge: otel.OtelBridgeTracing, spans: InMemorySpanExporter
) -> None:
    event = given.published(user_properties={"traceparent": SAMPLED})
    span = bridge.publish(event)
    assert span is not None
    span.end()
    (sent,) = spans.get_finished_spans()
    assert sent.parent is not None
    assert f"{sent.parent.span_id:016x}" == SPAN
    assert dict(span.headers)["traceparent"].decode().split("-")[1] == TRACE


@pytest.mark.parametrize("text", ["", "nonsense", SAMPLED[:-2] + "00", "00-" + "0" * 32])
def test_an_invalid_or_unsampled_context_counts_as_none(
    text: str, spans: InMemorySpanExporter
) -> None:
    never = otel.OtelBridgeTracing(
        TelemetrySettings(otlp_endpoint="http://127.0.0.1:9", trace_ratio=0), "e"
    )
    event = given.published(user_properties={"traceparent": text})
    assert never.publish(event) is None
    assert never.deliver([("traceparent", text.encode())], deliver()) is None
    assert never.deliver([("traceparent", b"\xff\xfe")], deliver()) is None
    assert never.deliver([], deliver()) is None


def test_a_publish_that_kafka_refused_has_an_error_status(
    bridge: otel.OtelBridgeTracing, spans: InMemorySpanExporter
) -> None:
    span = bridge.publish(given.published())
    assert span is not None
    span.end(failed=True)
    (sent,) = spans.get_finished_spans()
    assert not sent.status.is_ok


def test_no_span_contains_the_payload(
    bridge: otel.OtelBridgeTracing, spans: InMemorySpanExporter
) -> None:
    span = bridge.publish(given.published(payload="bread"))
    assert span is not None
    again = bridge.deliver(span.headers, deliver())
    assert again is not None
    again.end()
    span.end()
    assert [
        dict(each.attributes or {}).get("millpond.attempt") for each in spans.get_finished_spans()
    ] == [2, None]
    assert "bread" not in "".join(each.to_json() for each in spans.get_finished_spans())


# -- workers --------------------------------------------------------------------------------------------


def fold(worker: otel.OtelWorkerTracing, *message_ids: str) -> None:
    """Apply a batch with these publishes, from offset 0 on."""
    observer = worker.observer(NullObserver(), 0)
    observer.stepping(1)
    batch = benchmark.batch_of([given.published(each) for each in message_ids])
    observer.applied(batch, benchmark.transaction_of(()), ())


def test_only_a_command_for_a_traced_publish_carries_a_context(
    worker: otel.OtelWorkerTracing, spans: InMemorySpanExporter
) -> None:
    log = Log()
    traced: Any = worker.log(log)  # type: ignore[arg-type]
    traced.produce([command()])
    worker.fetched(SimpleNamespace(partition=0), [fetched(("traceparent", SAMPLED.encode()))])
    worker.fetched(SimpleNamespace(partition=0), [fetched(("other", b"x"), offset=1)])
    fold(worker, "m1", "m2")
    other = OutgoingRecord(keys.MESSAGES_TOPIC, b"k", b"{}")
    traced.produce([command(), command("m2"), other, command()._replace(value=None)])
    marked = [dict(each.headers).get("traceparent") for each in log.produced]
    fold_span = next(span for span in spans.get_finished_spans() if span.name == "fold")
    context = fold_span.get_span_context()
    assert context is not None
    expected = f"00-{TRACE}-{context.span_id:016x}-01".encode()
    assert marked == [None, expected, None, None, None]
    assert worker.unfolded == {}


def test_a_batch_without_a_traced_publish_has_no_span(
    worker: otel.OtelWorkerTracing, spans: InMemorySpanExporter
) -> None:
    worker.fetched(SimpleNamespace(partition=1), [fetched(("traceparent", SAMPLED.encode()))])
    fold(worker, "m1")  # of another partition
    assert spans.get_finished_spans() == ()


def test_the_oldest_contexts_are_dropped(
    worker: otel.OtelWorkerTracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "CONTEXTS_MAX", 3)
    header = ("traceparent", SAMPLED.encode())
    worker.fetched(SimpleNamespace(partition=0), [fetched(header, offset=at) for at in range(9)])
    assert list(worker.unfolded) == [(0, 6), (0, 7), (0, 8)]
