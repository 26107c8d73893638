"""Which tracing a process uses: OpenTelemetry where an endpoint is configured, else none."""

from __future__ import annotations

from millpond.pipeline.process.extras import extra
from millpond.pipeline.settings import TelemetrySettings
from millpond.pipeline.telemetry.tracing import BridgeTracing, WorkerTracing
from millpond.schemas.events import AgentName


def bridge_tracing(settings: TelemetrySettings, kind: str) -> BridgeTracing | None:
    """Of a bridge of this kind; None if nobody wants traces.

    Raises:
        ConfigError: the extra is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    with extra("otel", "[telemetry] otlp_endpoint"):
        from millpond.pipeline.telemetry import otel  # noqa: PLC0415

    return otel.OtelBridgeTracing(settings, kind)


def worker_tracing(settings: TelemetrySettings, agent: AgentName) -> WorkerTracing | None:
    """Of a worker of this agent; None if nobody wants traces.

    Raises:
        ConfigError: the extra is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    with extra("otel", "[telemetry] otlp_endpoint"):
        from millpond.pipeline.telemetry import otel  # noqa: PLC0415

    return otel.OtelWorkerTracing(settings, agent)
