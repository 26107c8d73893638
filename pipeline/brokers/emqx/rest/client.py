"""The client of EMQX's REST API: one HTTP session, every answer validated, no credential in any message or log line.

Errors say what EMQX may have done, because the sender repeats a publish only at a price:

| error | EMQX has done it |
|---|---|
| `Unreachable` | no: there was no connection |
| `Unauthorized` | no: it rejects the API key |
| `Refused` | no: it rejects the request |
| `Unanswered` | perhaps: the answer is missing, unreadable or 5xx |
"""

from __future__ import annotations

import logging
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from msgspec import Struct
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)
from yarl import URL

from millpond.pipeline.brokers.emqx.rest.responses import (
    ClientRow,
    ErrorBody,
    NodeRow,
    Page,
    PublishResult,
    RetainedRow,
    SubscribeResult,
    SubscriptionRow,
)
from millpond.pipeline.settings import BridgeSettings, read_secret
from millpond.schemas.errors import ConfigError, MillpondError

logger = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 16  # of one process; the sender uses 8, retained look-ups 4
CONNECT_TIMEOUT_S: Final = 3.0
# EMQX answers a bulk after the hook of each of its messages was answered, and each hook may wait for Kafka.
PUBLISH_TIMEOUT_S: Final = 30.0
REQUEST_TIMEOUT_S: Final = 10.0  # of all other requests
PAGE_ROWS: Final = 1_000  # a few hundred kilobytes; EMQX allows 10,000
ATTEMPTS_MAX: Final = 3  # to read one page or node list
PAGES_MAX: Final = 10_000  # ten million rows: beyond any cluster
ANSWER_BYTES_MAX: Final = 32 * 1024 * 1024  # far more than a page or a message takes
SHOWN_CHARACTERS_MAX: Final = 200  # of EMQX's error text in messages and log lines

Answer = TypeVar("Answer")
Row = TypeVar("Row")
API_PATH: Final = "/api/v5"
# With these statuses EMQX refuses the request for ever. All others depend on the state of EMQX.
REQUEST_FAULTS: Final = (400, 413)
Body: TypeAlias = Sequence[Struct] | Sequence[dict[str, Any]] | None


class RestError(MillpondError):
    """Base of the errors of EMQX's REST API."""


class Unreachable(RestError):
    """No connection to EMQX. It got no request."""


class Unanswered(RestError):
    """The answer is missing, unreadable or 5xx. EMQX may have done what was requested."""


class Unauthorized(RestError):
    """EMQX does not accept the API key. It did nothing."""


class Refused(RestError):
    """EMQX rejects the request. It did nothing. After 429 (too many requests) the caller may repeat it."""

    def __init__(self, sentence: str, status: int, code: str) -> None:
        """`status` is HTTP's, `code` is EMQX's own word."""
        super().__init__(sentence)
        self.status, self.code = status, code


class NoPath(Refused):
    """No path of the API can name the client or topic. It was not asked."""

    def __init__(self, name: str) -> None:
        """`name` is that of the client or topic."""
        super().__init__(f"EMQX's REST API has no path for the name {name!r}", 400, "NO_PATH")


class PublishRequest(Struct, frozen=True):
    """One message to publish; the payload is base64."""

    topic: str
    payload: str
    qos: int
    properties: dict[str, Any]
    payload_encoding: str = "base64"
    retain: bool = False


class RestClient:
    """One per process. Every method may raise a RestError, as the head of this file lists them."""

    def __init__(self, settings: BridgeSettings) -> None:
        """`start` reads the files that the settings name.

        Raises:
            ConfigError: the settings name no file with an API key.
        """
        if settings.api_key_file is None:
            raise ConfigError("[bridge] api_key_file is missing: EMQX's REST API needs a key")
        self._key_file, self._ca_file = settings.api_key_file, settings.rest_ca_file
        # Some write the address as EMQX's own documents show it, with the path.
        self._url = settings.rest_url.rstrip("/").removesuffix(API_PATH).rstrip("/")
        self._authorization: str | None = None
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Rest({self._url!r})"

    def secret(self) -> str:
        """The secret half of the API key.

        Raises:
            ConfigError: the file cannot be read, or holds no key.
        """
        return _key(self._key_file).partition(":")[2]

    async def start(self) -> None:
        """Read the files. The first request connects.

        Raises:
            ConfigError: a file cannot be read.
        """
        self._authorization = _authorization(self._key_file)
        context: ssl.SSLContext | bool = True
        if self._url.startswith("https:") and self._ca_file is not None:
            try:
                context = ssl.create_default_context(cafile=self._ca_file)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"[bridge] rest_ca_file: {error}") from error
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=context),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def stop(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    # -- requests

    async def publish(self, messages: Sequence[PublishRequest]) -> list[PublishResult]:
        """Publish messages in this order; the result of each. If EMQX refuses one, it publishes none.

        Raises:
            RestError: see the head of this file.
        """
        status, body = await self._request("POST", "/publish/bulk", messages, PUBLISH_TIMEOUT_S)
        # 200: all were routed. 202: some had no subscriber. 503: some could not be handed over.
        if status not in (200, 202, 503):
            raise _refusal(status, body)
        try:
            results = msgspec.json.decode(body, type=list[PublishResult])
        except (msgspec.DecodeError, RecursionError):
            raise Unanswered(
                f"EMQX answers {status} to a publish with an unknown body: {_shown(body)}"
            ) from None
        if len(results) != len(messages):
            raise Unanswered(
                f"EMQX answers with {len(results)} results of {len(messages)} publishes"
            )
        return results

    async def subscribe(
        self, client_id: str, topic_filters: Sequence[tuple[str, int]]
    ) -> SubscribeResult | None:
        """Subscribe a client's session. None if it has no session.

        The filters are as the client would write them: EMQX adds its mountpoint.

        Raises:
            RestError: see the head of this file.
        """
        wanted = [{"topic": topic, "qos": qos} for topic, qos in topic_filters]
        body = await self._of_client(client_id, "subscribe/bulk", wanted)
        if body is None:
            return None
        granted = _decoded(body, list[msgspec.Raw] | SubscribeResult)
        return granted if isinstance(granted, SubscribeResult) else SubscribeResult()

    async def unsubscribe(self, client_id: str, topic_filters: Sequence[str]) -> bool:
        """Unsubscribe a client's session. False if it has no session. The filters are as the client would write them.

        Raises:
            RestError: see the head of this file.
        """
        wanted = [{"topic": topic} for topic in topic_filters]
        return await self._of_client(client_id, "unsubscribe/bulk", wanted) is not None

    async def _of_client(
        self, client_id: str, action: str, wanted: Sequence[dict[str, Any]]
    ) -> bytes | None:
        path = f"/clients/{_quoted(client_id)}/{action}"
        return await self._found("POST", path, "CLIENTID_NOT_FOUND", wanted)

    async def nodes(self) -> list[NodeRow]:
        """The nodes of the cluster.

        Raises:
            RestError: see the head of this file.
        """
        body = await self._get("/nodes")
        nodes: list[NodeRow] = _decoded(body, list[NodeRow])
        return nodes

    def clients(self, node: str | None = None) -> AsyncIterator[list[ClientRow]]:
        """The clients with a session, page by page; see `_pages`."""
        return self._pages("/clients", ClientRow, node)

    def subscriptions(self, node: str | None = None) -> AsyncIterator[list[SubscriptionRow]]:
        """The subscriptions of all clients, page by page; see `_pages`."""
        return self._pages("/subscriptions", SubscriptionRow, node)

    async def _pages(
        self, path: str, kind: type[Row], node: str | None
    ) -> AsyncIterator[list[Row]]:
        """Read a list. If it changes between two pages, a row may appear twice, or not at all.

        Raises:
            RestError: see the head of this file.
        """
        for number in range(1, PAGES_MAX + 1):
            parameters: dict[str, Any] = {"page": number, "limit": PAGE_ROWS}
            if node is not None:
                parameters["node"] = node
            query = urlencode(parameters, quote_via=quote)
            page: Page = _decoded(await self._get(f"{path}?{query}"), Page)
            yield _rows(page, path, kind)
            if not page.meta.hasnext:
                return
        raise Unanswered(f"EMQX's {path} has more than {PAGES_MAX} pages")

    async def retained(self, topic: str) -> RetainedRow | None:
        """The retained message of a topic; None if there is none.

        Raises:
            RestError: see the head of this file.
        """
        path = f"/mqtt/retainer/message/{_quoted(topic)}"
        body = await self._found("GET", path, "NOT_FOUND", None)
        return None if body is None else _decoded(body, RetainedRow)

    async def _found(self, method: str, path: str, not_found: str, sent: Body) -> bytes | None:
        """The answer's body. None for a 404 with the code `not_found`; any other 404 means a wrong `rest_url`."""
        status, body = await self._request(method, path, sent, REQUEST_TIMEOUT_S)
        if status == 404 and _fault(body).code == not_found:
            return None
        if status not in (200, 204):
            raise _refusal(status, body)
        return body

    # -- HTTP

    async def _get(self, path: str) -> bytes:
        """Read something, with retries: one lost answer must not spoil a long list."""
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(ATTEMPTS_MAX),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            retry=retry_if_exception_type((Unreachable, Unanswered)),
            reraise=True,
        ):
            with attempt:
                status, body = await self._request("GET", path, None, REQUEST_TIMEOUT_S)
                if status != 200:
                    raise _refusal(status, body)
        return body

    async def _request(
        self, method: str, path: str, sent: Body, timeout_s: float
    ) -> tuple[int, bytes]:
        """Send a request; status and body of the answer.

        Raises:
            Unreachable, Unanswered: there is no answer.
            Unauthorized: the status is 401 or 403.
            Refused: the status is 429.
        """
        assert self._session is not None, "start() comes first"
        headers = {"Authorization": self._credentials(), "Accept": "application/json"}
        data = None
        if sent is not None:
            headers["Content-Type"] = "application/json"
            data = msgspec.json.encode(sent)
        # The path is already quoted, and a quoted slash or plus in a name must stay quoted.
        url = URL(f"{self._url}{API_PATH}{path}", encoded=True)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, url, data=data, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                status, body = response.status, await _body(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(f"[bridge] rest_url {self._url}: {_why(error)}") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # The error's text and chain are dropped: they may hold the request with its headers.
            raise Unanswered(f"{self._url}: no answer: {_why(error)}") from None
        if status in (401, 403):
            # The operator may have replaced the key: the next request reads the file again.
            self._authorization = None
            raise Unauthorized(
                f"EMQX at {self._url} answers {status}: it does not accept the key in [bridge] "
                f"api_key_file {self._key_file}"
            )
        if status == 429:
            raise Refused("EMQX answers 429: too many requests", status, "")
        return status, body

    def _credentials(self) -> str:
        if self._authorization is None:
            try:
                self._authorization = _authorization(self._key_file)
            except ConfigError as error:
                raise Unauthorized(str(error)) from None
        return self._authorization


def _key(path: str) -> str:
    """Read `key:secret` from a file."""
    line = read_secret(path, "[bridge] api_key_file").strip()
    key, _, secret = line.partition(":")
    if not key or not secret:
        raise ConfigError(f"[bridge] api_key_file: {path} does not hold one line key:secret")
    return line


def _authorization(path: str) -> str:
    """The value of the Authorization header, for the key in a file."""
    return "Basic " + b64encode(_key(path).encode()).decode()


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """Read the body, up to `ANSWER_BYTES_MAX`."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > ANSWER_BYTES_MAX:
            raise aiohttp.ClientPayloadError("the answer is too large")
        chunks.append(chunk)
    return b"".join(chunks)


def _why(error: Exception) -> str:
    """A description of an error that cannot hold a credential."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error)
    if isinstance(error, TimeoutError):
        return "timed out"
    return type(error).__name__


def _decoded(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Unanswered(f"EMQX answers with an unknown body ({error}): {_shown(body)}") from None


def _rows(page: Page, path: str, kind: type[Row]) -> list[Row]:
    """Decode the rows of a page, and skip unreadable ones.

    A client may have an id or username that Millpond does not accept. If no row is readable, EMQX has another format.

    Raises:
        Unanswered: no row of the page can be read.
    """
    rows: list[Row] = []
    for raw in page.data:
        try:
            rows.append(msgspec.json.decode(raw, type=kind))
        except (msgspec.DecodeError, RecursionError) as error:
            logger.warning("skipped a row of EMQX's %s that cannot be read: %s", path, error)
    if page.data and not rows:
        raise Unanswered(f"no row of EMQX's {path} can be read: {_shown(bytes(page.data[0]))}")
    return rows


def _fault(body: bytes) -> ErrorBody:
    try:
        return msgspec.json.decode(body, type=ErrorBody)
    except (msgspec.DecodeError, RecursionError):
        return ErrorBody()


def _refusal(status: int, body: bytes) -> RestError:
    if status >= 500:
        return Unanswered(f"EMQX answers {status}: {_shown(body)}")
    fault = _fault(body)
    code = str(fault.code if fault.code is not None else fault.reason_code or "")
    return Refused(
        f"EMQX answers {status}: {code} {fault.message or _shown(body)}"[:SHOWN_CHARACTERS_MAX],
        status,
        code,
    )


def _shown(body: bytes) -> str:
    return repr(body[:SHOWN_CHARACTERS_MAX])


def _quoted(name: str) -> str:
    """Quote a name as one level of a path.

    Raises:
        NoPath: clients and servers take such a level out of a path (RFC 3986, 5.2.4).
    """
    if name in (".", ".."):
        raise NoPath(name)
    return quote(name, safe="")
