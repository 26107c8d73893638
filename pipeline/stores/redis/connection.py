"""One connection to one Redis server: bytes out at once, replies in, in the order of what was sent."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, cast

from hiredis import Reader, ReplyError, pack_command

from millpond.schemas.errors import StoreDown, StoreError, StoreRefused

Argument: TypeAlias = str | bytes | int
RedisCommand: TypeAlias = tuple[Argument, ...]

# One command as it goes over the wire. The library's own annotation allows one argument only.
pack: Final = cast(Callable[[RedisCommand], bytes], pack_command)

# Error codes that say "not now": the same transaction may succeed later, on this server or on another one.
# fmt: off
NOT_NOW: Final = frozenset((
    "LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "MOVED", "ASK", "BUSY", "OOM",
    "MISCONF", "NOREPLICAS", "EXECABORT",
))
# fmt: on
# Error codes that say "not you": somebody has to change credentials or permissions.
NOT_YOU: Final = frozenset(("NOAUTH", "NOPERM", "WRONGPASS"))


class Address(NamedTuple):
    """Where one server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Access(NamedTuple):
    """How to be let in, and how long to wait. Never shown: it holds a password."""

    username: str | None = None
    password: str | None = None
    database: int = 0
    tls: ssl.SSLContext | None = None
    connect_timeout_s: float = 5.0
    reply_timeout_s: float = 10.0  # of silence while a reply is due

    def __repr__(self) -> str:
        return f"Access(username={self.username!r}, database={self.database})"


def code(error: ReplyError) -> str:
    """The first word of an error reply: what kind it is."""
    return str(error).split(" ", 1)[0]


def store_error(error: ReplyError, where: object) -> StoreError | None:
    """What an error reply says about the server as a whole; None if it only concerns one key or command."""
    kind = code(error)
    if kind in NOT_YOU:
        return StoreRefused(
            f"{where} refuses: {error}; check the pool's username and its permissions"
        )
    if kind in NOT_NOW or "max number of clients" in str(error):
        return StoreDown(f"{where} is not ready: {error}")
    return None


def checked(replies: Sequence[Any], where: object) -> Sequence[Any]:
    """The replies, of which none may be an error."""
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise store_error(reply, where) or StoreRefused(f"{where} answers: {reply}")
    return replies


class _Exchange:
    """Replies that are still due for one `send`."""

    __slots__ = ("due", "future", "replies")

    def __init__(self, due: int, future: asyncio.Future[list[Any]]) -> None:
        self.due, self.future = due, future
        self.replies: list[Any] = []


class Connection(asyncio.Protocol):
    """A connection. Whatever happens to it is a `StoreDown` of everything that was still due."""

    def __init__(self, address: Address, reply_timeout_s: float) -> None:
        self.address = address
        self._reply_timeout_s = reply_timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = Reader()
        self._due: deque[_Exchange] = deque()
        self._silence: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._reason: str | None = None  # why it was lost

    @classmethod
    async def open(cls, address: Address, access: Access) -> Connection:
        """Connect, authenticate, select the database.

        Raises:
            StoreDown: nobody answers there, or not in time.
            StoreRefused: wrong credentials, a certificate that does not verify, no such database.
        """
        loop = asyncio.get_running_loop()
        connection = cls(address, access.reply_timeout_s)
        try:
            async with asyncio.timeout(access.connect_timeout_s):
                await loop.create_connection(lambda: connection, *address, ssl=access.tls)
                await connection._greet(access)
        except ssl.SSLCertVerificationError as error:
            raise StoreRefused(f"the certificate of {address} does not verify: {error}") from error
        except TimeoutError as error:
            await connection.close()
            raise StoreDown(f"{address} does not answer") from error
        except OSError as error:
            raise StoreDown(f"cannot connect to {address}: {error}") from error
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _greet(self, access: Access) -> None:
        commands: list[RedisCommand] = []
        if access.password is not None:
            user = () if access.username is None else (access.username,)
            commands.append(("AUTH", *user, access.password))
        if access.database:
            commands.append(("SELECT", access.database))
        for command in commands:
            checked(await self.call(*command), self.address)

    def send(self, data: bytes, replies: int) -> asyncio.Future[list[Any]]:
        """Write now. The future has the replies, errors among them, or fails as `StoreDown`."""
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(self._lost())
            return future
        if not replies:
            future.set_result([])
            return future
        self._due.append(_Exchange(replies, future))
        if self._silence is None:
            self._listen()
        # What the socket does not take now, the event loop sends by and by: a caller waits for its
        # replies before it sends more, and so bounds what is buffered.
        self._transport.write(data)
        return future

    def call(self, *arguments: Argument) -> asyncio.Future[list[Any]]:
        """Send one command; its reply comes in a list of one."""
        return self.send(pack(arguments), 1)

    def _lost(self) -> StoreDown:
        return StoreDown(f"lost the connection to {self.address}: {self._reason}")

    def _listen(self) -> None:
        """Start waiting anew: the server has just spoken, or was asked the first thing."""
        if self._silence is not None:
            self._silence.cancel()
        self._silence = (
            self._loop.call_later(self._reply_timeout_s, self._silent) if self._due else None
        )

    def _silent(self) -> None:
        self.abort(f"no reply for {self._reply_timeout_s:g} s")

    def abort(self, reason: str = "closed by us") -> None:
        """Drop the connection now: no reply that is still due can be mistaken for another's."""
        if self._transport is not None and not self._transport.is_closing():
            self._reason = reason
            self._transport.abort()

    async def close(self) -> None:
        """Drop the connection and wait until it is gone."""
        if self._transport is not None:
            self.abort()
            await asyncio.shield(self._closed)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface, not the base class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        gets = self._reader.gets
        while self._due:
            exchange = self._due[0]
            replies, due = exchange.replies, exchange.due
            while len(replies) < due:
                reply = gets()
                if reply is False:  # not all of it is here yet; RESP2 has no booleans
                    self._listen()
                    return
                replies.append(reply)
            self._due.popleft()
            if not exchange.future.done():
                exchange.future.set_result(replies)
        self._listen()

    def connection_lost(self, error: Exception | None) -> None:
        if self._reason is None:
            self._reason = str(error) if error else "the server closed it"
        due, self._due = self._due, deque()
        self._listen()
        for exchange in due:
            if not exchange.future.done():
                exchange.future.set_exception(self._lost())
        if not self._closed.done():
            self._closed.set_result(None)
