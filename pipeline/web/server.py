"""The HTTP server of the web page and its API.

The page may show everything that Redis stores, so browsers must not give it to other sites. Headers forbid framing and
loading from elsewhere, and on loopback the server answers only to loopback's own host names.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from aiokafka.errors import KafkaError

from millpond.pipeline.process.event_loop import use_uvloop
from millpond.pipeline.process.loopback import host_allowed, is_loopback
from millpond.pipeline.process.readiness import report_ready
from millpond.pipeline.process.signals import stop_event
from millpond.pipeline.settings import Settings
from millpond.pipeline.web.api import Api, failure
from millpond.pipeline.web.operator_token import OperatorToken
from millpond.schemas.errors import ConfigError, MillpondError, StoreError
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

PAGE: Final = Path(__file__).with_name("page")
FILES: Final = {  # path: file and type; nothing else is served
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/tables.js": ("tables.js", "text/javascript"),
    "/console.js": ("console.js", "text/javascript"),
    "/mqtt.js": ("vendor/mqtt.min.js", "text/javascript"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
STOP_TIMEOUT_S: Final = 5.0

Added = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


def run_web(settings: Settings, rules: Rules) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the port is in use, or the token cannot be read.
    """
    use_uvloop()
    asyncio.run(_run(settings, rules))


async def _run(settings: Settings, rules: Rules) -> None:
    stop = stop_event()
    host, port = settings.web.host, settings.web.port
    runner = web.AppRunner(application(settings, rules), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, shutdown_timeout=STOP_TIMEOUT_S)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"[web] cannot listen at {host}:{port}: {error.strerror}") from error
        logger.info("the page is at http://%s:%d/", host, runner.addresses[0][1])
        if not is_loopback(host):
            logger.warning("no authentication: anyone who can reach %s can read this page", host)
        report_ready("web")
        await stop.wait()
    finally:
        await runner.cleanup()


def application(settings: Settings, rules: Rules) -> web.Application:
    """Make the application.

    Raises:
        ConfigError: the token cannot be read.
    """
    operator = OperatorToken(settings.web.token_file)
    api = Api(settings, rules, operator)
    app = web.Application(middlewares=[_known_host(settings), _errors])
    app.on_response_prepare.append(_headers(api.mqtt_url))
    for path, (name, kind) in FILES.items():
        app.router.add_get(path, _file(PAGE / name, kind))
    app.add_routes(api.routes())

    async def close(_: web.Application) -> None:
        await api.lookups.close()

    app.on_cleanup.append(close)
    return app


def _file(path: Path, kind: str) -> Handler:
    body = path.read_bytes()

    async def serve(request: web.Request) -> web.Response:
        charset = None if kind == "image/svg+xml" else "utf-8"
        return web.Response(body=body, content_type=kind, charset=charset)

    return serve


def _headers(mqtt_url: str | None) -> Added:
    """Set headers: the page loads nothing from elsewhere, no site frames it, no cache keeps an answer."""
    broker = "" if mqtt_url is None else " {0.scheme}://{0.netloc}".format(urlsplit(mqtt_url))
    headers = {
        "Content-Security-Policy": (
            f"default-src 'self'; connect-src 'self'{broker}; base-uri 'none'; form-action 'none';"
            " frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        kept = "no-cache" if request.path in FILES else "no-store"
        response.headers.update({**headers, "Cache-Control": kept})

    return add


def _known_host(settings: Settings) -> Middleware:
    """On loopback, refuse requests for any other host name. See `loopback`."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not host_allowed(settings.web.host, request.host):
            return failure(403, "this page answers only at 127.0.0.1 and localhost")
        return await handler(request)

    return check


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn an exception into a JSON answer."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        answer = failure(error.status, error.reason)
        answer.headers.update({k: v for k, v in error.headers.items() if k == "Allow"})
        return answer
    except StoreError as error:
        return failure(503, f"Redis does not answer: {error}")
    except KafkaError as error:
        return failure(503, f"Kafka does not answer: {error}")
    except MillpondError as error:
        return failure(503, str(error))
