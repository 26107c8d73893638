"""A double of an EMQX 5.5, as far as a bridge sees one: sessions, routing, hooks and what REST answers rest on.

EMQX itself cannot run here. What it does was seen on a real one; tests connect clients without MQTT in between. The
hooks go to whoever is given as `hooks` (`tests.support.emqx.hooks` calls a bridge by gRPC), REST is served by
`tests.support.emqx.rest`.
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
    """As the broker holds it."""

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
    """In time order as text."""
    return f"{time.time_ns() // 1000:016X}F443{next(_sequence):012X}"


class Hooks(Protocol):
    """What a provider is told, or asked. Every call is waited for, as the broker's client does."""

    async def client(self, name: str, client: Client, **what: Any) -> None:
        """`ClientConnected`, `SessionSubscribed`, and so on."""

    async def publish(self, message: Message) -> Message | None:
        """The message as it is to be routed; None if it is not."""

    async def received(self, name: str, client: Client, message: Message) -> None:
        """`MessageDelivered` or `MessageAcked`."""


class NoHooks:
    """Nobody is asked."""

    async def client(self, name: str, client: Client, **what: Any) -> None:
        pass

    async def publish(self, message: Message) -> Message | None:
        return message

    async def received(self, name: str, client: Client, message: Message) -> None:
        pass


@dataclass
class Session:
    """What outlives a connection: subscriptions, with the mountpoint, and what is not acknowledged."""

    client_id: str
    client: Client | None = None
    subscriptions: dict[str, dict[str, int]] = field(default_factory=dict)
    queue: deque[Message] = field(default_factory=deque)
    inflight: dict[str, Message] = field(default_factory=dict)
    dropped: int = 0


class Client:
    """One connection, and how a test uses it."""

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
        """As the client's process in the broker: one thing after the other, each with its hooks."""
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
        """The reason code of its PUBACK."""
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
        """Whatever was on its way to it has come."""
        await self._calls.join()

    async def until_received(self, count: int) -> list[Message]:
        """The copies: this many, and no more."""

        async def enough() -> bool:
            return len(self.received) >= count

        await until(enough, f"{count} copies at {self.client_id!r}, not {len(self.received)}")
        assert len(self.received) == count
        return self.received

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.received]

    def stop(self) -> None:
        self._working.cancel()


class Emqx:
    """One broker; `nodes` is what REST says of its cluster."""

    def __init__(self, hooks: Hooks | None = None, mountpoint: str | None = MOUNTPOINT) -> None:
        self.hooks: Hooks = hooks or NoHooks()
        self.mountpoints = {} if mountpoint is None else {MOUNTED: mountpoint}
        self.nodes = {NODE: "running"}
        self.started_at = now_ms()
        self.sessions: dict[str, Session] = {}
        self.retained: dict[str, Message] = {}
        self.clients: list[Client] = []
        self._turn = itertools.count()  # of shared subscriptions
        self._routes: dict[str, list[tuple[Session, str, int]]] = {}  # topic → who holds what

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
        """Its newest connection, which may be over."""
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
        """Whether anybody gets it. It is retained before the hook is asked, as it was published."""
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
        """Remembered as long as no subscription changes."""
        if topic not in self._routes:
            self._routes[topic] = [
                (session, held, options["qos"])
                for session in self.sessions.values()
                for held, options in session.subscriptions.items()
                if matches(split_share(held)[1], topic)
            ]
        return self._routes[topic]

    def changed(self) -> None:
        """Sessions or subscriptions did: whoever changes them says so."""
        self._routes.clear()

    def _hand(self, session: Session, message: Message) -> None:
        if len(session.queue) >= QUEUE_MAX:
            session.queue.popleft()
            session.dropped += 1
        session.queue.append(message)
        if session.client is not None:
            session.client.soon(lambda: self._pump(session))

    async def _pump(self, session: Session) -> None:
        """What the window has room for goes to the client."""
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
        """Copies that the broker holds for a client, un-acked or waiting."""
        session = self.sessions[client_id]
        return len(session.inflight) + len(session.queue)

    async def until_held(self, client_id: str, count: int) -> None:
        async def enough() -> bool:
            return self.held(client_id) >= count

        await until(enough, f"{count} copies held for {client_id!r}, not {self.held(client_id)}")


@contextlib.asynccontextmanager
async def running(hooks: Hooks | None = None, mountpoint: str | None = MOUNTPOINT) -> Any:
    """A broker without REST."""
    emqx = Emqx(hooks, mountpoint)
    try:
        yield emqx
    finally:
        emqx.stop()
