"""The HTTP listener of a process: `/metrics`, `/healthz`, `/readyz`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Final, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from millpond.pipeline.process.loopback import host_allowed
from millpond.pipeline.telemetry.families import Collector, Metric, MetricsSource, gauge
from millpond.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"  # if `listen` names none
KAFKA_TIMEOUT_S: Final = 2.0  # for Kafka's answer, during a request for /readyz
STOP_TIMEOUT_S: Final = 1.0  # for requests on their way, when the process stops


class Health(Protocol):
    """The health of a process. Both methods return reasons, one sentence each; an empty list means healthy."""

    async def not_alive(self) -> Sequence[str]:
        """Return why the process cannot continue."""
        ...

    async def not_ready(self) -> Sequence[str]:
        """Return why the process cannot do its work now."""
        ...


class _PartsCollector(Collector):
    """Collects the metrics of all parts, at each request."""

    def __init__(self, process: str, parts: Sequence[MetricsSource]) -> None:
        self._process, self._parts = process, parts

    def collect(self) -> Iterator[Metric]:
        labels = {(self._process, version("millpond")): 1.0}
        yield gauge(
            "millpond_build_info",
            "1. The labels say which process this is.",
            ("process", "version"),
            labels,
        )
        for part in self._parts:
            yield from part.metrics()


def registry_of(process: str, parts: Sequence[MetricsSource]) -> CollectorRegistry:
    """Return the registry of a process: metrics of its parts, of the process itself, of the garbage collector."""
    registry = CollectorRegistry()
    registry.register(_PartsCollector(process, parts))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class Listener:
    """Answers the HTTP requests of one process."""

    def __init__(
        self, process: str, parts: Sequence[MetricsSource], health: Health, host: str = HOST
    ) -> None:
        """`host` is where it listens."""
        self._process, self._health, self._host = process, health, host
        self._registry = registry_of(process, parts)

    def app(self) -> web.Application:
        """Return the web application."""
        app = web.Application(middlewares=[self._known_host()])
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        return app

    def _known_host(self) -> Middleware:
        """On loopback, refuse requests for any other host name. See `loopback`."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not host_allowed(self._host, request.host):
                raise web.HTTPForbidden(
                    text="this listener answers only at 127.0.0.1 and localhost\n"
                )
            return await handler(request)

        return check

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        body = encode(self._registry)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _healthz(self, request: web.Request) -> web.Response:
        return self._answer(await self._health.not_alive())

    async def _readyz(self, request: web.Request) -> web.Response:
        return self._answer([*await self._health.not_alive(), *await self._health.not_ready()])

    def _answer(self, reasons: Sequence[str]) -> web.Response:
        body = {"process": self._process, "ok": not reasons, "reasons": list(reasons)}
        return web.json_response(body, status=503 if reasons else 200)


@asynccontextmanager
async def serving(
    listen: str | None, process: str, parts: Sequence[MetricsSource], health: Health
) -> AsyncIterator[None]:
    """Listen at `[HOST:]PORT` inside this context. None means: do not listen.

    Raises:
        ConfigError: The process cannot listen there, for example because the port is in use.
    """
    if listen is None:
        yield
        return
    name, _, port = listen.rpartition(":")
    host = name.strip("[]") or HOST
    app = Listener(process, parts, health, host).app()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_TIMEOUT_S)
    await runner.setup()
    site = web.TCPSite(runner, host, int(port))
    try:
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"[telemetry] listen: {listen}: {error.strerror}") from error
        logger.info("metrics and health: http://%s:%d", *runner.addresses[0][:2])
        yield
    finally:
        await runner.cleanup()
