"""The API of the page. Times are ms since the epoch; every list is cut, and says of how many.

| request | answer |
|---|---|
| `GET /api/web` | `app`; `operator`: whether there is a token; `mqtt_url` for the console |
| `GET /api/agents` | `agents`: `agent`, `behind`, `uncommitted`, `oldest_at`, `rate` (records applied a second), `partitions` |
| `GET /api/topics` | `rows`, the deepest first; `topics` and `messages` in all; `notes` |
| `GET /api/topic?name=T` | all that is known of a topic, with `members`, `subscribers`, `leases` and `…_total` of each |
| `GET /api/clients?contains=PART` | `clients` whose id contains that part; `total`, `online` |
| `GET /api/dead-letters` | `dead_letters`, the newest first; `total` |
| `POST /api/operator` | nothing (204): the token is right |
| `POST /api/dead-letters/requeue`, `…/drop` | of `{"message_ids": […]}`: `written`, the orders that Kafka has |

A POST needs `Authorization: Bearer TOKEN`: 401 without, 403 if there is none to be had. What goes wrong is
`{"error": "…"}`: 400 no such request is possible, 404 nothing is known of it, 409 no such dead letter, 503 Redis or
Kafka is away. An answer serves everybody who asks within a second, or longer if it took long to get.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from millpond.pipeline.clock import now_ms
from millpond.pipeline.operate import dead_letters as letters
from millpond.pipeline.operate import operator_events
from millpond.pipeline.settings import Settings
from millpond.pipeline.web.lookups import LISTED_MAX, Lookups
from millpond.pipeline.web.operator_token import OperatorToken
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError, StoreError
from millpond.schemas.events import OperatorDrop, OperatorRequeue
from millpond.schemas.rules import Rules

logger = logging.getLogger(__name__)

NAME_LENGTH_MAX: Final = 65_535  # of an MQTT topic or client id


class _Chosen(Struct, forbid_unknown_fields=True):
    """What an operator sends."""

    message_ids: Annotated[list[str], Meta(min_length=1, max_length=LISTED_MAX)]


class Api:
    """Answers requests."""

    def __init__(self, settings: Settings, rules: Rules, operator: OperatorToken) -> None:
        """Nothing is read before somebody asks."""
        self._settings, self._rules, self._operator = settings, rules, operator
        self.lookups = Lookups(settings, rules)

    @property
    def mqtt_url(self) -> str | None:
        """Where the console connects to; None if nobody has told."""
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
            web.post("/api/operator", self._is_operator),
            web.post("/api/dead-letters/requeue", self._requeue),
            web.post("/api/dead-letters/drop", self._drop),
        ]

    async def _web(self, request: web.Request) -> web.Response:
        return _json(
            {
                "app": self._settings.app,
                "operator": self._operator.possible,
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

    # -- what an operator does

    def _refused(self, request: web.Request) -> web.Response | None:
        if not self._operator.possible:
            return failure(403, "read-only: [web] token_file names no token")
        if self._operator.is_meant(request.headers.get("Authorization", "")):
            return None
        logger.warning("refused %s %s: not the token", request.method, request.path)
        answer = failure(401, "this is not the token")
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer

    async def _is_operator(self, request: web.Request) -> web.Response:
        return self._refused(request) or web.Response(status=204)

    async def _requeue(self, request: web.Request) -> web.Response:
        return self._refused(request) or await self._order(request, OperatorRequeue)

    async def _drop(self, request: web.Request) -> web.Response:
        return self._refused(request) or await self._order(request, OperatorDrop)

    async def _order(
        self, request: web.Request, order: type[OperatorRequeue | OperatorDrop]
    ) -> web.Response:
        try:
            message_ids = msgspec.json.decode(await request.read(), type=_Chosen).message_ids
        except (ValueError, RecursionError) as error:
            return failure(400, str(error))
        try:
            chosen = await letters.pick(self._settings, self._rules, message_ids)
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
        logger.info("an operator ordered %s of %d dead letters", order.__name__, written)
        return _json({"written": written})


def _text(request: web.Request, name: str) -> str:
    return request.query.get(name, "")[:NAME_LENGTH_MAX]


def _json(answer: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def failure(status: int, reason: str) -> web.Response:
    """What went wrong, for whoever asked."""
    return web.Response(
        status=status,
        body=msgspec.json.encode({"error": reason}),
        content_type="application/json",
    )
