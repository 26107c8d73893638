"""Traces with OpenTelemetry, over OTLP/HTTP. Imported only if an endpoint is set. Module `tracing` has the concepts."""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from msgspec import Struct
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from millpond.agents.driver.batch import Batch
from millpond.agents.driver.observer import Observer
from millpond.agents.effects import DeadLetter
from millpond.agents.ports import Log, LogBounds, OutgoingRecord, Record, Transaction
from millpond.pipeline.settings import TelemetrySettings
from millpond.pipeline.telemetry.tracing import Headers
from millpond.schemas import keys
from millpond.schemas.commands import Command, Deliver
from millpond.schemas.events import AgentName, MessagePublished
from millpond.schemas.keys import Partition

EXPORT_INTERVAL_MS: Final = 1_000
EXPORT_TIMEOUT_S: Final = 3.0  # for the collector's answer; then the spans are dropped
TRACES_PATH: Final = "/v1/traces"
# Contexts in memory: of fetched publishes, and of folded ones. Beyond that the oldest are dropped, and those messages
# get no further spans.
CONTEXTS_MAX: Final = 10_000

_propagator: Final = TraceContextTextMapPropagator()


class _CommandMessage(Struct):
    """The only field of a command that tracing needs. Decoding skips the others."""

    message_id: str = ""


_decode_message_id: Final = msgspec.json.Decoder(_CommandMessage).decode


def _provider(settings: TelemetrySettings, process: str) -> TracerProvider:
    endpoint = (settings.otlp_endpoint or "").rstrip("/")
    if not endpoint.endswith(TRACES_PATH):
        endpoint += TRACES_PATH
    resource = Resource.create(
        {"service.name": f"millpond-{process}", "service.version": version("millpond")}
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_INTERVAL_MS)
    )
    return provider


def _headers(span: Span) -> Headers:
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span))
    return tuple((name, value.encode()) for name, value in carrier.items())


def _context(carrier: Mapping[str, str]) -> Context | None:
    """Return the trace context in `carrier`. None if there is none, or if it is not sampled."""
    context = _propagator.extract(carrier, Context())
    found = trace.get_current_span(context).get_span_context()
    return context if found.is_valid and found.trace_flags.sampled else None


def _context_of(headers: Sequence[tuple[str, bytes]]) -> Context | None:
    carrier = {name: value.decode("utf-8", "replace") for name, value in headers}
    return _context(carrier) if "traceparent" in carrier else None


def _message(event: MessagePublished | Deliver) -> dict[str, str]:
    """Return attributes by OpenTelemetry's conventions for messaging. They never include the payload."""
    return {
        "messaging.system": "mqtt",
        "messaging.message.id": event.message_id,
        "messaging.destination.name": event.topic,
        "messaging.client.id": event.client_id,
    }


class OtelSpan:
    """A span that has begun. See `tracing.TraceSpan`."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.headers = _headers(span)

    def end(self, *, failed: bool = False) -> None:
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def answered(self, kept: asyncio.Future[Any]) -> None:
        self.end(failed=kept.cancelled() or kept.exception() is not None)


class OtelBridgeTracing:
    """See `tracing.BridgeTracing`. Spans are sent from a thread of their own."""

    def __init__(self, settings: TelemetrySettings, kind: str) -> None:
        self._provider = _provider(settings, f"bridge-{kind}")
        self._tracer = self._provider.get_tracer(__name__)
        self._ratio = settings.trace_ratio

    def publish(self, event: MessagePublished) -> OtelSpan | None:
        """See `tracing.BridgeTracing`.

        A publish with a sampled context of its own, an MQTT 5 user property, is always traced. Chance decides others.
        """
        parent = _context(event.user_properties) if event.user_properties else None
        if parent is None and random.random() >= self._ratio:  # noqa: S311  chance, not a secret
            return None
        span = self._tracer.start_span(
            "publish", parent or Context(), SpanKind.PRODUCER, _message(event)
        )
        return OtelSpan(span)

    def deliver(self, headers: Sequence[tuple[str, bytes]], command: Command) -> OtelSpan | None:
        parent = _context_of(headers) if headers else None
        if parent is None or not isinstance(command, Deliver):
            return None
        attributes: dict[str, Any] = {**_message(command), "millpond.attempt": command.attempt}
        return OtelSpan(self._tracer.start_span("deliver", parent, SpanKind.CONSUMER, attributes))

    def close(self) -> None:
        self._provider.shutdown()


class OtelWorkerTracing:
    """See `tracing.WorkerTracing`. Spans are sent from a thread of their own."""

    def __init__(self, settings: TelemetrySettings, agent: AgentName) -> None:
        self._provider = _provider(settings, f"worker-{agent}")
        self.tracer = self._provider.get_tracer(__name__)
        # Of fetched records: (partition, offset) → the context of the `publish` span.
        self.unfolded: OrderedDict[tuple[int, int], Context] = OrderedDict()
        # Of stored publishes: message id → headers with the context of the `fold` span. Kept for redeliveries.
        self.folded: OrderedDict[str, Headers] = OrderedDict()

    def fetched(self, topic_partition: Any, records: Sequence[Any]) -> None:
        for record in records:
            if record.headers:
                context = _context_of(record.headers)
                if context is not None:
                    _remember(self.unfolded, (topic_partition.partition, record.offset), context)

    def observer(self, inner: Observer, number: int) -> Observer:
        return TracedBatches(inner, number, self)

    def log(self, inner: Log) -> Log:
        return TracedLog(inner, self.folded)

    def close(self) -> None:
        self._provider.shutdown()


def _remember(contexts: OrderedDict[Any, Any], key: Any, context: Any) -> None:
    contexts[key] = context
    if len(contexts) > CONTEXTS_MAX:
        contexts.popitem(last=False)


class TracedBatches:
    """Adds a `fold` span to the trace of each traced publish, and a `batch` span to each batch with such a publish.

    The `batch` span is a trace of its own, because a batch belongs to many traces. Links connect it with them.
    """

    def __init__(self, inner: Observer, number: int, worker: OtelWorkerTracing) -> None:
        """`number` is the number of the partition."""
        self._inner, self._number, self._worker = inner, number, worker
        self._began_ns = 0

    def dead_letter(self, reason: str) -> None:
        self._inner.dead_letter(reason)

    def stepping(self, sequence: int) -> None:
        self._began_ns = time.time_ns()
        self._inner.stepping(sequence)

    def applied(
        self, batch: Batch, transaction: Transaction, refused: Sequence[DeadLetter]
    ) -> None:
        self._inner.applied(batch, transaction, refused)
        if self._worker.unfolded and batch.records:
            self._trace(batch)

    def _trace(self, batch: Batch) -> None:
        unfolded, number = self._worker.unfolded, self._number
        contexts = {
            record.offset: context
            for record in batch.records
            if (context := unfolded.pop((number, record.offset), None)) is not None
        }
        publishes = [
            (contexts[record.offset], event)
            for record, event, _ in batch.folded
            if record.offset in contexts and isinstance(event, MessagePublished)
        ]
        if not publishes:
            return
        tracer = self._worker.tracer
        # An approximation: the next batch may have begun meanwhile. The spans then begin too late.
        began = min(self._began_ns, time.time_ns())
        links = [
            Link(trace.get_current_span(context).get_span_context()) for context, _ in publishes
        ]
        attributes: dict[str, Any] = {
            "millpond.partition": number,
            "millpond.records": len(batch.records),
        }
        batch_span = tracer.start_span(
            "batch", Context(), SpanKind.CONSUMER, attributes, links, start_time=began
        )
        for context, event in publishes:
            link = [Link(batch_span.get_span_context())]
            span = tracer.start_span(
                "fold", context, SpanKind.CONSUMER, _message(event), link, start_time=began
            )
            span.end()
            _remember(self._worker.folded, event.message_id, _headers(span))
        batch_span.end()


class TracedLog:
    """A log that adds the context of its publish to each command. See `millpond.agents.ports.Log`."""

    def __init__(self, inner: Log, contexts: Mapping[str, Headers]) -> None:
        """`contexts` are headers by message id."""
        self._inner, self._contexts = inner, contexts

    async def bounds(self, partition: Partition) -> LogBounds:
        return await self._inner.bounds(partition)

    def read(self, partition: Partition, start: int, stop: int) -> AsyncIterator[Sequence[Record]]:
        return self._inner.read(partition, start, stop)

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        if self._contexts:
            records = [self._with_context(record) for record in records]
        return self._inner.produce(records)

    def _with_context(self, record: OutgoingRecord) -> OutgoingRecord:
        if record.topic != keys.DELIVERIES_TOPIC or record.value is None:
            return record
        headers = self._contexts.get(_decode_message_id(record.value).message_id, ())
        return record._replace(headers=(*record.headers, *headers))
