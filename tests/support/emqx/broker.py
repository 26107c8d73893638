"""A double of EMQX 5.5, as far as a bridge can see: sessions, routing, hooks, and the state behind the REST API.

EMQX itself cannot run in the tests. The double does what was seen on a real EMQX. Tests connect clients without MQTT.
`tests.support.emqx.hooks` calls a bridge by gRPC, and `tests.support.emqx.rest` serves the REST API.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from millpond.pipeline.clock import now_ms
from millpond.schemas.topics import matches, split_share
from tests.support.workers import until

NODE = "emqx@127.0.0.1"
ORDINARY, MOUNTED = "tcp:default", "tcp:mounted"
MOUNTPOINT = "mp/${clientid}/"
INFLIGHT_MAX = 32  # EMQX's defaults
QUEUE_MAX = 1_000
SUCCESS, NO_MATCHING_SUBSCRIBERS = 0, 16

_ports = itertools.count(40_000)
_sequence = itertools.count(1)


@dataclass(frozen=True)
class Message:
    """A message in the broker."""

    id: str
    topic: str
    payload: bytes
    qos: int
    sender: str
    timestamp: int
    headers: dict[str, str] = field(default_factory=dict)
    retain: bool = False
    expires_at: int | None = None
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and now_ms() >= self.expires_at


def message_id() -> str:
    """A new message id. Ids sort by time as text."""
    return f"{time.time_ns() // 1000:016X}F443{next(_sequence):012X}"


class Hooks(Protocol):
    """The calls to a provider. The broker waits for the answer of each before the client's next packet."""

    async def client(self, name: str, client: Client, **what: Any) -> None:
        """Call `ClientConnected`, `SessionSubscribed`, and so on."""

    async def publish(self, message: Message) -> Message | None:
        """Call `MessagePublish`. Returns the message to route, or None to drop it."""

    async def received(self, name: str, client: Client, message: Message) -> None:
        """Call `MessageDelivered` or `MessageAcked`."""


class NoHooks:
    """No provider."""

    async def client(self, name: str, client: Client, **what: Any) -> None:
        pass

    async def publish(self, message: Message) -> Message | None:
        return message

    async def received(self, name: str, client: Client, message: Message) -> None:
        pass


@dataclass
class Session:
    """The state that outlives a connection: subscriptions with mountpoint, and unacknowledged messages."""

    client_id: str
    client: Client | None = None
    subscriptions: dict[str, dict[str, int]] = field(default_factory=dict)
    queue: deque[Message] = field(default_factory=deque)
    inflight: dict[str, Message] = field(default_factory=dict)
    dropped: int = 0


class Client:
    """One connection."""

    def __init__(
        self, emqx: Emqx, client_id: str, listener: str, clean_start: bool, expiry_s: int,
        username: str | None, answers: bool,
    ) -> None:  # fmt: skip
        self.emqx, self.client_id, self.listener = emqx, client_id, listener
        self.clean_start, self.expiry_s, self.username = clean_start, expiry_s, username
        self.answers = answers  # acknowledges by itself
        self.peerhost, self.port = "127.0.0.1", next(_ports)
        self.connected_at = now_ms()
        template = emqx.mountpoints.get(listener)
        self.mountpoint = "" if template is None else template.replace("${clientid}", client_id)
        self.received: list[Message] = []  # topics as the client sees them
        self._calls: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Do one thing after the other, each with its hooks, like the client's process in EMQX."""
        while True:
            await (await self._calls.get())()
            self._calls.task_done()

    def soon(self, call: Callable[[], Awaitable[None]]) -> None:
        self._calls.put_nowait(call)

    async def _now(self, call: Callable[[], Awaitable[Any]]) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def do() -> None:
            try:
                done.set_result(await call())
            except Exception as error:
                done.set_exception(error)

        self.soon(do)
        return await done

    # -- what a client does

    async def subscribe(self, topic_filter: str, qos: int = 1, rh: int = 0) -> None:
        await self._now(lambda: self.emqx.subscribe(self, topic_filter, qos, rh))

    async def unsubscribe(self, topic_filter: str) -> None:
        await self._now(lambda: self.emqx.unsubscribe(self, topic_filter))

    async def publish(
        self, topic: str, payload: bytes | str = b"", qos: int = 1, *, retain: bool = False,
        expiry_s: int | None = None,
    ) -> int:  # fmt: skip
        """Publish. Returns the reason code of the PUBACK."""
        data = payload.encode() if isinstance(payload, str) else payload
        at = now_ms()
        message = Message(
            message_id(), self.mountpoint + topic, data, qos, self.client_id, at,
            {"protocol": "mqtt", "peerhost": self.peerhost, **({"username": self.username} if self.username else {})},
            retain, None if expiry_s is None else at + expiry_s * 1000,
        )  # fmt: skip
        routed = await self._now(lambda: self.emqx.publish(message))
        return SUCCESS if routed else NO_MATCHING_SUBSCRIBERS

    async def ack(self, message: Message) -> None:
        await self._now(lambda: self.emqx.acked(self, message.id))

    async def disconnect(self, reason: str = "normal") -> None:
        await self._now(lambda: self.emqx.disconnect(self, reason))

    async def settle(self) -> None:
        """Wait until everything on its way to the client has arrived."""
        await self._calls.join()

    async def until_received(self, count: int) -> list[Message]:
        """Wait for exactly so many copies."""

        async def enough() -> bool:
            return len(self.received) >= count

        await until(
            enough, lambda: f"{count} copies at {self.client_id!r}, not {len(self.received)}"
        )
        assert len(self.received) == count, self.payloads
        return self.received

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.received]

    def stop(self) -> None:
        self._working.cancel()


class Emqx:
    """One broker. `nodes` is the cluster as REST lists it."""

    def __init__(self, hooks: Hooks | None = None, mountpoint: str | None = MOUNTPOINT) -> None:
        self.hooks: Hooks = hooks or NoHooks()
        self.mountpoints = {} if mountpoint is None else {MOUNTED: mountpoint}
        self.nodes = {NODE: "running"}
        self.started_at = now_ms()
        self.sessions: dict[str, Session] = {}
        self.retained: dict[str, Message] = {}
        self.clients: list[Client] = []
        self._turn = itertools.count()  # of shared subscriptions
        self._routes: dict[
            str, list[tuple[Session, str, int]]
        ] = {}  # topic → matching subscriptions

    def stop(self) -> None:
        for client in self.clients:
            client.stop()

    # -- clients come and go

    async def connect(
        self, client_id: str, *, listener: str = MOUNTED, clean_start: bool = True,
        expiry_s: int = 0, username: str | None = None, answers: bool = True,
    ) -> Client:  # fmt: skip
        session = self.sessions.get(client_id)
        before = None if session is None else self.last(client_id)
        client = Client(self, client_id, listener, clean_start, expiry_s, username, answers)
        self.clients.append(client)
        if session is not None and before is not None and clean_start:
            await self.hooks.client("ClientDisconnected", before, reason="discarded")
            await self.hooks.client("SessionDiscarded", before)
        online = False
        if session is None or clean_start:
            session = self.sessions[client_id] = Session(client_id, client)
            self.changed()
            await self.hooks.client("SessionCreated", client)
        else:
            online, session.client = session.client is not None, client
            await self.hooks.client("SessionResumed", client)
            assert before is not None, "a session has had a connection"
            await self.hooks.client("ClientDisconnected", before, reason="takenover")
            if not online:
                await self.hooks.client("SessionTakenover", before)
        await self.hooks.client("ClientConnected", client)
        if online and before is not None:
            await self.hooks.client("SessionTakenover", before)
        again, session.inflight = list(session.inflight.values()), {}
        session.queue.extendleft(reversed(again))
        client.soon(lambda: self._pump(session))
        return client

    def last(self, client_id: str) -> Client:
        """A client's newest connection, which may be closed."""
        return [client for client in self.clients if client.client_id == client_id][-1]

    async def disconnect(self, client: Client, reason: str) -> None:
        session = self.sessions.get(client.client_id)
        if session is None or session.client is not client:
            return
        session.client = None
        await self.hooks.client("ClientDisconnected", client, reason=reason)
        if not client.expiry_s:
            del self.sessions[client.client_id]
            self.changed()
            await self.hooks.client("SessionTerminated", client, reason=f"{{shutdown,{reason}}}")

    # -- subscriptions

    async def subscribe(self, client: Client, topic_filter: str, qos: int, rh: int = 0) -> None:
        group, plain = split_share(topic_filter)
        mounted = client.mountpoint + plain
        held = mounted if group is None else f"$share/{group}/{mounted}"
        session = self.sessions[client.client_id]
        self.changed()
        session.subscriptions[held] = {"qos": qos, "rh": rh, "nl": 0, "rap": 0}
        await self.hooks.client("SessionSubscribed", client, topic=held, qos=qos, rh=rh)
        if group is None and rh != 2:
            for topic, message in self.retained.items():
                if matches(mounted, topic):
                    self._hand(session, replace(message, qos=min(qos, message.qos)))

    async def unsubscribe(self, client: Client, topic_filter: str) -> None:
        group, plain = split_share(topic_filter)
        mounted = client.mountpoint + plain
        held = mounted if group is None else f"$share/{group}/{mounted}"
        self.changed()
        if self.sessions[client.client_id].subscriptions.pop(held, None) is not None:
            await self.hooks.client("SessionUnsubscribed", client, topic=held)

    # -- messages

    async def publish(self, message: Message) -> bool:
        """Publish. True if a subscription matches. EMQX retains the unchanged message before it calls the hook."""
        if message.retain:
            if message.payload:
                self.retained[message.topic] = message
            else:
                self.retained.pop(message.topic, None)
        answer = await self.hooks.publish(message)
        return answer is not None and self._route(answer)

    def _route(self, message: Message) -> bool:
        groups: dict[tuple[str, str], list[tuple[Session, int]]] = {}
        routed = False
        for session, held, qos in self._matching(message.topic):
            group, plain = split_share(held)
            routed = True
            if group is None:
                self._hand(session, replace(message, qos=min(qos, message.qos)))
            else:
                groups.setdefault((group, plain), []).append((session, qos))
        for members in groups.values():
            session, qos = members[next(self._turn) % len(members)]
            self._hand(session, replace(message, qos=min(qos, message.qos)))
        return routed

    def _matching(self, topic: str) -> list[tuple[Session, str, int]]:
        """The matching subscriptions, cached until one changes."""
        if topic not in self._routes:
            self._routes[topic] = [
                (session, held, options["qos"])
                for session in self.sessions.values()
                for held, options in session.subscriptions.items()
                if matches(split_share(held)[1], topic)
            ]
        return self._routes[topic]

    def changed(self) -> None:
        """Clear the cache of routes. Call it after every change of sessions or subscriptions."""
        self._routes.clear()

    def _hand(self, session: Session, message: Message) -> None:
        if len(session.queue) >= QUEUE_MAX:
            session.queue.popleft()
            session.dropped += 1
        session.queue.append(message)
        if session.client is not None:
            session.client.soon(lambda: self._pump(session))

    async def _pump(self, session: Session) -> None:
        """Send queued messages to the client, as far as its window has room."""
        while session.client is not None and session.queue and len(session.inflight) < INFLIGHT_MAX:
            client, message = session.client, session.queue.popleft()
            if message.expired:
                continue
            if message.qos:
                session.inflight[message.id] = message
            await self.hooks.received("MessageDelivered", client, message)
            seen = replace(message, topic=message.topic.removeprefix(client.mountpoint))
            client.received.append(seen)
            if message.qos and client.answers:
                await self.acked(client, message.id)

    async def acked(self, client: Client, number: str) -> None:
        session = self.sessions[client.client_id]
        message = session.inflight.pop(number, None)
        if message is not None:
            await self.hooks.received("MessageAcked", client, message)
            client.soon(lambda: self._pump(session))

    # -- what tests look at

    def held(self, client_id: str) -> int:
        """The number of messages that the broker holds for a client, unacknowledged or queued."""
        session = self.sessions[client_id]
        return len(session.inflight) + len(session.queue)

    async def until_held(self, client_id: str, count: int) -> None:
        async def enough() -> bool:
            return self.held(client_id) >= count

        await until(
            enough, lambda: f"{count} copies held for {client_id!r}, not {self.held(client_id)}"
        )


@contextlib.asynccontextmanager
async def running(hooks: Hooks | None = None, mountpoint: str | None = MOUNTPOINT) -> Any:
    """A broker without REST."""
    emqx = Emqx(hooks, mountpoint)
    try:
        yield emqx
    finally:
        emqx.stop()
