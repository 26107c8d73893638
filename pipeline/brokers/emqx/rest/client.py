"""EMQX's REST API: one session with few connections, every answer checked, no credential in anything that is said."""

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

CONNECTIONS_MAX: Final = 16  # of one process
CONNECT_TIMEOUT_S: Final = 3.0
# A bulk is answered when the hook of each of its messages has been, and each may wait for Kafka.
PUBLISH_TIMEOUT_S: Final = 30.0
ASK_TIMEOUT_S: Final = 10.0
PAGE_ROWS: Final = 1_000  # EMQX allows 10,000; this is a few hundred kilobytes
READS_MAX: Final = 3  # attempts to read one thing
PAGES_MAX: Final = 10_000  # ten million rows: beyond any cluster
ANSWER_BYTES_MAX: Final = 32 * 1024 * 1024  # of one answer: far more than a page or a message takes
SHOWN_CHARACTERS_MAX: Final = 200  # of what EMQX says is wrong

Answer = TypeVar("Answer")
Row = TypeVar("Row")
Body: TypeAlias = Sequence[Struct] | Sequence[dict[str, Any]] | None


class RestError(MillpondError):
    """Root of what goes wrong with EMQX's REST API."""


class Unreachable(RestError):
    """No connection: nothing was asked."""


class Unanswered(RestError):
    """It was asked, and there is no answer, or none that can be read: it may have been done."""


class Unauthorized(RestError):
    """EMQX does not accept the key: nothing was done."""


class Refused(RestError):
    """EMQX will not do it; `status` is HTTP's, `code` EMQX's word. Too many requests (429) may be asked again."""

    def __init__(self, reason: str, status: int, code: str) -> None:
        """`reason` is the whole sentence."""
        super().__init__(reason)
        self.status, self.code = status, code


class PublishRequest(Struct, frozen=True):
    """One message to publish; the payload is base64."""

    topic: str
    payload: str
    qos: int
    properties: dict[str, Any]
    payload_encoding: str = "base64"
    retain: bool = False


class RestClient:
    """One per process."""

    def __init__(self, settings: BridgeSettings) -> None:
        """`start` reads the files that the settings name.

        Raises:
            ConfigError: they name no key.
        """
        if settings.api_key_file is None:
            raise ConfigError("[bridge] api_key_file is missing: EMQX's REST API needs a key")
        self._key_file, self._ca_file = settings.api_key_file, settings.rest_ca_file
        self._url = settings.rest_url.rstrip("/")
        self._authorization: str | None = None
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Rest({self._url!r})"

    def secret(self) -> str:
        """The key's second half, which only this bridge and EMQX know.

        Raises:
            ConfigError: the file cannot be read, or holds no key.
        """
        return _key(self._key_file).partition(":")[2]

    async def start(self) -> None:
        """Get ready; the first request connects.

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

    # -- what is asked

    async def publish(self, messages: Sequence[PublishRequest]) -> list[PublishResult]:
        """Publish in this order; what came of each. EMQX publishes all of them or, refusing one, none.

        Raises:
            RestError: see its kinds.
        """
        status, body = await self._ask("POST", "/publish/bulk", messages, PUBLISH_TIMEOUT_S)
        # 200: all were routed; 202: some had no subscriber; 503: some could not be handed over.
        if status not in (200, 202, 503):
            raise _refusal(status, body)
        try:
            results = msgspec.json.decode(body, type=list[PublishResult])
        except (msgspec.DecodeError, RecursionError):
            raise Unanswered(
                f"EMQX answers {status} to a publish, in words unknown: {_shown(body)}"
            ) from None
        if len(results) != len(messages):
            raise Unanswered(f"EMQX has {len(results)} results of {len(messages)} publishes")
        return results

    async def subscribe(
        self, client_id: str, topic_filters: Sequence[tuple[str, int]]
    ) -> SubscribeResult | None:
        """Subscribe a client's session, in its own words: EMQX puts its mountpoint in front. None: there is none.

        Raises:
            RestError: see its kinds.
        """
        wanted = [{"topic": topic, "qos": qos} for topic, qos in topic_filters]
        body = await self._of_client(client_id, "subscribe/bulk", wanted)
        if body is None:
            return None
        granted = _decoded(body, list[msgspec.Raw] | SubscribeResult)
        return granted if isinstance(granted, SubscribeResult) else SubscribeResult()

    async def unsubscribe(self, client_id: str, topic_filters: Sequence[str]) -> bool:
        """End subscriptions of a client's session, in its own words; whether there is one.

        Raises:
            RestError: see its kinds.
        """
        wanted = [{"topic": topic} for topic in topic_filters]
        return await self._of_client(client_id, "unsubscribe/bulk", wanted) is not None

    async def _of_client(
        self, client_id: str, what: str, wanted: Sequence[dict[str, Any]]
    ) -> bytes | None:
        path = f"/clients/{_quoted(client_id)}/{what}"
        return await self._found("POST", path, "CLIENTID_NOT_FOUND", wanted)

    async def nodes(self) -> list[NodeRow]:
        """The cluster's.

        Raises:
            RestError: see its kinds.
        """
        body = await self._get("/nodes")
        nodes: list[NodeRow] = _decoded(body, list[NodeRow])
        return nodes

    def clients(self, node: str | None = None) -> AsyncIterator[list[ClientRow]]:
        """Everyone with a session, page by page; see `_pages`."""
        return self._pages("/clients", ClientRow, node)

    def subscriptions(self, node: str | None = None) -> AsyncIterator[list[SubscriptionRow]]:
        """Everyone's subscriptions, page by page; see `_pages`."""
        return self._pages("/subscriptions", SubscriptionRow, node)

    async def _pages(
        self, path: str, kind: type[Row], node: str | None
    ) -> AsyncIterator[list[Row]]:
        """A list that changes between two pages may show a row twice, or not at all.

        Raises:
            RestError: see its kinds.
        """
        for number in range(1, PAGES_MAX + 1):
            asked: dict[str, Any] = {"page": number, "limit": PAGE_ROWS}
            if node is not None:
                asked["node"] = node
            query = urlencode(asked, quote_via=quote)
            page: Page = _decoded(await self._get(f"{path}?{query}"), Page)
            yield _rows(page, path, kind)
            if not page.meta.hasnext:
                return
        raise Unanswered(f"EMQX's {path} has no end")

    async def retained(self, topic: str) -> RetainedRow | None:
        """What the broker retains of a topic.

        Raises:
            RestError: see its kinds.
        """
        path = f"/mqtt/retainer/message/{_quoted(topic)}"
        body = await self._found("GET", path, "NOT_FOUND", None)
        return None if body is None else _decoded(body, RetainedRow)

    async def _found(self, method: str, path: str, not_found: str, asked: Body) -> bytes | None:
        """The answer's body; None if EMQX says that there is no such thing (another 404 is a wrong `rest_url`)."""
        status, body = await self._ask(method, path, asked, ASK_TIMEOUT_S)
        if status == 404 and _fault(body).code == not_found:
            return None
        if status not in (200, 204):
            raise _refusal(status, body)
        return body

    # -- how it is asked

    async def _get(self, path: str) -> bytes:
        """What is only read may be asked for again: one lost answer does not spoil a long list."""
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(READS_MAX),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            retry=retry_if_exception_type((Unreachable, Unanswered)),
            reraise=True,
        ):
            with attempt:
                status, body = await self._ask("GET", path, None, ASK_TIMEOUT_S)
                if status != 200:
                    raise _refusal(status, body)
        return body

    async def _ask(
        self, method: str, path: str, asked: Body, timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and body of an answer that is none of 401, 403 and 429."""
        assert self._session is not None, "start() comes first"
        headers = {"Authorization": self._credentials(), "Accept": "application/json"}
        data = None
        if asked is not None:
            headers["Content-Type"] = "application/json"
            data = msgspec.json.encode(asked)
        # Already quoted: a quoted slash or plus in a name has to stay one.
        url = URL(f"{self._url}/api/v5{path}", encoded=True)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, url, data=data, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                status, body = response.status, await _body(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(f"[bridge] rest_url {self._url}: {_why(error)}") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # Not its text and not its chain: they may hold the request with its headers.
            raise Unanswered(f"{self._url}: no answer: {_why(error)}") from None
        if status in (401, 403):
            self._authorization = None  # the file may hold another key by now
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
    """`key:secret` of a file."""
    line = read_secret(path, "[bridge] api_key_file").strip()
    key, _, secret = line.partition(":")
    if not key or not secret:
        raise ConfigError(f"[bridge] api_key_file: {path} does not hold one line key:secret")
    return line


def _authorization(path: str) -> str:
    """The header for the key in a file."""
    return "Basic " + b64encode(_key(path).encode()).decode()


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """All of it, up to a bound."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > ANSWER_BYTES_MAX:
            raise aiohttp.ClientPayloadError("the answer is too large")
        chunks.append(chunk)
    return b"".join(chunks)


def _why(error: Exception) -> str:
    """What is known not to hold a credential."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error)
    if isinstance(error, TimeoutError):
        return "timed out"
    return type(error).__name__


def _decoded(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Unanswered(f"EMQX answers in words unknown ({error}): {_shown(body)}") from None


def _rows(page: Page, path: str, kind: type[Row]) -> list[Row]:
    """The rows that can be read. A client may have called itself anything; that none can is EMQX's doing."""
    rows: list[Row] = []
    for raw in page.data:
        try:
            rows.append(msgspec.json.decode(raw, type=kind))
        except (msgspec.DecodeError, RecursionError) as error:
            logger.warning("a row of EMQX's %s cannot be read: %s", path, error)
    if page.data and not rows:
        raise Unanswered(f"none of EMQX's {path} can be read: {_shown(bytes(page.data[0]))}")
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
    """A name as one level of a path."""
    return quote(name, safe="")
