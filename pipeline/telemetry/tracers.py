"""Chooses the tracing of a process: OpenTelemetry with a configured endpoint, else none."""

from __future__ import annotations

from millpond.pipeline.process.extras import extra
from millpond.pipeline.settings import TelemetrySettings
from millpond.pipeline.telemetry.tracing import BridgeTracing, WorkerTracing
from millpond.schemas.events import AgentName


def bridge_tracing(settings: TelemetrySettings, kind: str) -> BridgeTracing | None:
    """Return the tracing of a bridge of this kind, or None without an endpoint.

    Raises:
        ConfigError: The extra `otel` is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    with extra("otel", "[telemetry] otlp_endpoint"):
        from millpond.pipeline.telemetry import otel  # noqa: PLC0415

    return otel.OtelBridgeTracing(settings, kind)


def worker_tracing(settings: TelemetrySettings, agent: AgentName) -> WorkerTracing | None:
    """Return the tracing of a worker of this agent, or None without an endpoint.

    Raises:
        ConfigError: The extra `otel` is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    with extra("otel", "[telemetry] otlp_endpoint"):
        from millpond.pipeline.telemetry import otel  # noqa: PLC0415

    return otel.OtelWorkerTracing(settings, agent)
