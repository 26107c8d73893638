"""The JSON API of the web page. Times are ms since the epoch. Every list has a bound, and a total beside it.

| request | answer |
|---|---|
| `GET /api/web` | `app`; `operator`: true if a token is configured; `mqtt_url` for the console |
| `GET /api/agents` | `agents`: `agent`, `behind`, `uncommitted`, `oldest_at`, `rate` (per second), `partitions` |
| `GET /api/topics` | `rows`, the deepest first; the totals `topics` and `messages`; `notes` |
| `GET /api/topic?name=T` | the facts of one topic; `members`, `subscribers` and `leases`, and `…_total` of each |
| `GET /api/clients?contains=PART` | `clients` whose id contains `PART`; the totals `total` and `online` |
| `GET /api/dead-letters` | `dead_letters`, the newest first; `total` |
| `GET /api/unreadable` | `records` that could not be read or stored, the newest first; `whole`: false if there may be more |
| `POST /api/operator` | 204 and no body: the token is right |
| `POST /api/dead-letters/requeue`, `…/drop` | `written`, the number of orders. The body is `{"message_ids": […]}` |

A POST needs the header `Authorization: Bearer TOKEN`. An error is `{"error": "…"}`:

| status | meaning |
|---|---|
| 400 | the request is invalid |
| 401 | the token is missing or wrong |
| 403 | no token is configured, or the host name is not allowed |
| 404 | nothing is known of the topic |
| 409 | an id is of no dead letter, or no agent would apply the order |
| 503 | Redis or Kafka does not answer |

Requests within a second share one answer, and longer if the answer took long (`lookups.py`).
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from millpond.pipeline.clock import now_ms
from millpond.pipeline.operate import dead_letters, operator_events
from millpond.pipeline.settings import Settings
from millpond.pipeline.web.lookups import LISTED_MAX, Lookups
from millpond.pipeline.web.operator_token import OperatorToken
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError, StoreError
from millpond.schemas.events import OperatorDrop, OperatorRequeue
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

NAME_LENGTH_MAX: Final = 65_535  # of an MQTT topic or client id


class _Order(Struct, forbid_unknown_fields=True):
    """The body of an order."""

    message_ids: Annotated[list[str], Meta(min_length=1, max_length=LISTED_MAX)]


class Api:
    """The handlers of the API."""

    def __init__(self, settings: Settings, rules: Rules, operator: OperatorToken) -> None:
        """Nothing is read before the first request."""
        self._settings, self._rules, self._operator = settings, rules, operator
        self.lookups = Lookups(settings, rules)

    @property
    def mqtt_url(self) -> str | None:
        """The WebSocket that the console connects to; None if it is not configured."""
        bridge, url = self._settings.bridge, self._settings.web.mqtt_url
        if url is None and bridge.kind == "embedded":
            return f"ws://{bridge.host}:{bridge.websocket_port}/"
        return url

    def routes(self) -> list[web.RouteDef]:
        """Return every route of the table above."""
        return [
            web.get("/api/web", self._web),
            web.get("/api/agents", self._agents),
            web.get("/api/topics", self._topics),
            web.get("/api/topic", self._topic),
            web.get("/api/clients", self._clients),
            web.get("/api/dead-letters", self._dead_letters),
            web.get("/api/unreadable", self._unreadable),
            web.post("/api/operator", self._is_operator),
            web.post("/api/dead-letters/requeue", self._requeue),
            web.post("/api/dead-letters/drop", self._drop),
        ]

    async def _web(self, request: web.Request) -> web.Response:
        return _json(
            {
                "app": self._settings.app,
                "operator": self._operator.configured,
                "mqtt_url": self.mqtt_url,
            }
        )

    async def _agents(self, request: web.Request) -> web.Response:
        return _json(await self.lookups.agents.get())

    async def _topics(self, request: web.Request) -> web.Response:
        return _json(await self.lookups.topics.get())

    async def _topic(self, request: web.Request) -> web.Response:
        try:
            return _json(await self.lookups.topic.get(_text(request, "name")))
        except StoreError:
            raise
        except ConfigError as error:
            return failure(400, str(error))
        except MillpondError as error:
            return failure(404, str(error))

    async def _clients(self, request: web.Request) -> web.Response:
        return _json(await self.lookups.clients.get(_text(request, "contains")))

    async def _dead_letters(self, request: web.Request) -> web.Response:
        return _json(await self.lookups.dead_letters.get())

    async def _unreadable(self, request: web.Request) -> web.Response:
        return _json(await self.lookups.unreadable.get())

    # -- orders of an operator

    def _refusal(self, request: web.Request) -> web.Response | None:
        """The answer to a POST without the token; None if it has the token."""
        if not self._operator.configured:
            return failure(403, "the page is read-only: set [web] token_file to allow orders")
        if self._operator.is_valid(request.headers.get("Authorization", "")):
            return None
        logger.warning("refused %s %s: wrong or missing token", request.method, request.path)
        answer = failure(401, "the token is wrong")
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer

    async def _is_operator(self, request: web.Request) -> web.Response:
        return self._refusal(request) or web.Response(status=204)

    async def _requeue(self, request: web.Request) -> web.Response:
        return self._refusal(request) or await self._order(request, OperatorRequeue)

    async def _drop(self, request: web.Request) -> web.Response:
        return self._refusal(request) or await self._order(request, OperatorDrop)

    async def _order(
        self, request: web.Request, order: type[OperatorRequeue | OperatorDrop]
    ) -> web.Response:
        try:
            message_ids = msgspec.json.decode(await request.read(), type=_Order).message_ids
        except (ValueError, RecursionError) as error:
            return failure(400, str(error))
        try:
            chosen = await dead_letters.find_owned(self._settings, self._rules, message_ids)
        except StoreError:
            raise
        except MillpondError as error:
            return failure(409, str(error))
        dead = [found.dead for found in chosen]
        events = [
            order(at=now_ms(), node=keys.AGENT_NODE, topic=each.topic, message_id=each.message_id)
            for each in dead
        ]
        written = await operator_events.write(self._settings.kafka, events)
        logger.info("an operator wrote %d orders %s", written, order.__name__)
        return _json({"written": written})


def _text(request: web.Request, name: str) -> str:
    return request.query.get(name, "")[:NAME_LENGTH_MAX]


def _json(answer: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def failure(status: int, reason: str) -> web.Response:
    """An error as the answer to a request."""
    return web.Response(
        status=status,
        body=msgspec.json.encode({"error": reason}),
        content_type="application/json",
    )
