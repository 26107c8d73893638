"""One connection to one Redis server: requests are written at once, replies arrive in the order of the requests.

A `Connection` owns one TCP connection. It never reconnects: after any failure its owner opens a new one.

State:

- `_due`: one `_Exchange` for each `send` whose replies are not complete, oldest first.
- `_timer`: runs while `_due` is not empty. Every chunk of data restarts it. At its end the connection is dropped.
- `_reason`: why the connection was lost; None while it is open.

Invariants: replies belong to the oldest exchange, because Redis answers in order. An exchange whose caller gave up
stays in `_due`, so its late replies are not taken for those of the next exchange.
"""

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

# Encodes one command for the wire. The cast: hiredis annotates its argument as a tuple of one element.
pack: Final = cast(Callable[[RedisCommand], bytes], pack_command)

# Errors about the server's condition: the same transaction may succeed later, here or on another server.
# fmt: off
TRANSIENT_CODES: Final = frozenset((
    "LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "MOVED", "ASK", "BUSY", "OOM",
    "MISCONF", "NOREPLICAS", "EXECABORT",
))
# fmt: on
# Errors about the user: an operator must change credentials or permissions.
ACCESS_CODES: Final = frozenset(("NOAUTH", "NOPERM", "WRONGPASS"))


# Of silence, for a command: a user waits for the answer. Workers wait longer, and then try again.
COMMAND_TIMEOUT_S: Final = 5.0


class Address(NamedTuple):
    """Host and port of one server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Access(NamedTuple):
    """Credentials, database, TLS and time limits of a connection. Its repr hides the password."""

    username: str | None = None
    password: str | None = None
    database: int = 0
    tls: ssl.SSLContext | None = None
    connect_timeout_s: float = 5.0
    reply_timeout_s: float = 10.0  # of silence while a reply is due

    def __repr__(self) -> str:
        return f"Access(username={self.username!r}, database={self.database})"


def escape_glob(text: str) -> str:
    """Return a MATCH pattern that matches exactly this text."""
    return "".join(f"\\{each}" if each in "*?[]\\" else each for each in text)


def error_code(error: ReplyError) -> str:
    """Return the first word of an error reply, which names the kind of error."""
    return str(error).split(" ", 1)[0]


def store_error(error: ReplyError, where: object) -> StoreError | None:
    """Translate an error reply about the whole server. None if the error concerns one key or command only."""
    code = error_code(error)
    if code in ACCESS_CODES:
        return StoreRefused(
            f"{where} refuses: {error}; check the pool's username and its permissions"
        )
    # Redis reports its limit of connections as a plain ERR.
    if code in TRANSIENT_CODES or "max number of clients" in str(error):
        return StoreDown(f"{where} is not ready: {error}")
    return None


def checked(replies: Sequence[Any], where: object) -> Sequence[Any]:
    """Return the replies if none of them is an error.

    Raises:
        StoreDown, StoreRefused: one of them is an error.
    """
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise store_error(reply, where) or StoreRefused(f"{where} answers: {reply}")
    return replies


class _Exchange:
    """One `send`: the replies so far, of `due` in all."""

    __slots__ = ("due", "future", "replies")

    def __init__(self, due: int, future: asyncio.Future[list[Any]]) -> None:
        self.due, self.future = due, future
        self.replies: list[Any] = []


class Connection(asyncio.Protocol):
    """An open connection. If it breaks, every future that still waits for replies fails with `StoreDown`."""

    def __init__(self, address: Address, reply_timeout_s: float) -> None:
        self.address = address
        self._reply_timeout_s = reply_timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = Reader()
        self._due: deque[_Exchange] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._reason: str | None = None

    @classmethod
    async def open(cls, address: Address, access: Access) -> Connection:
        """Connect, authenticate, select the database.

        Raises:
            StoreDown: no server listens there, or it does not answer in time.
            StoreRefused: wrong credentials, a certificate that does not verify, or no such database.
        """
        loop = asyncio.get_running_loop()
        connection = cls(address, access.reply_timeout_s)
        try:
            async with asyncio.timeout(access.connect_timeout_s):
                await loop.create_connection(lambda: connection, *address, ssl=access.tls)
                await connection._authenticate(access)
        except ssl.SSLCertVerificationError as error:
            raise StoreRefused(f"the certificate of {address} does not verify: {error}") from error
        except TimeoutError as error:
            await connection.close()
            raise StoreDown(
                f"Redis at {address} does not answer within {access.connect_timeout_s:g} s"
            ) from error
        except OSError as error:
            raise StoreDown(f"cannot connect to Redis at {address}: {error}") from error
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _authenticate(self, access: Access) -> None:
        commands: list[RedisCommand] = []
        if access.password is not None:
            user = () if access.username is None else (access.username,)
            commands.append(("AUTH", *user, access.password))
        if access.database:
            commands.append(("SELECT", access.database))
        for command in commands:
            checked(await self.call(*command), self.address)

    def send(self, data: bytes, replies: int) -> asyncio.Future[list[Any]]:
        """Write now. The future returns the replies, error replies included, or fails with `StoreDown`."""
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(self._lost_error())
            return future
        if not replies:
            future.set_result([])
            return future
        self._due.append(_Exchange(replies, future))
        if self._timer is None:
            self._restart_timer()
        # The event loop buffers what the socket does not take at once. Callers wait for their replies before they send
        # more, and so bound that buffer.
        self._transport.write(data)
        return future

    def call(self, *arguments: Argument) -> asyncio.Future[list[Any]]:
        """Send one command. Its reply arrives in a list of one."""
        return self.send(pack(arguments), 1)

    def _lost_error(self) -> StoreDown:
        return StoreDown(f"lost the connection to Redis at {self.address}: {self._reason}")

    def _restart_timer(self) -> None:
        """Measure the silence from now on, or not at all if no reply is due."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = (
            self._loop.call_later(self._reply_timeout_s, self._time_out) if self._due else None
        )

    def _time_out(self) -> None:
        self.abort(f"no reply for {self._reply_timeout_s:g} s")

    def abort(self, reason: str = "closed by us") -> None:
        """Drop the connection now, with all replies that are still due."""
        if self._transport is not None and not self._transport.is_closing():
            self._reason = reason
            self._transport.abort()

    async def close(self) -> None:
        """Drop the connection, and wait until it is closed."""
        if self._transport is not None:
            self.abort()
            await asyncio.shield(self._closed)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface, but not the base class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        gets = self._reader.gets
        while self._due:
            exchange = self._due[0]
            replies, due = exchange.replies, exchange.due
            while len(replies) < due:
                reply = gets()
                # False means an incomplete reply. It cannot be a value: RESP2 has no booleans.
                if reply is False:
                    self._restart_timer()
                    return
                replies.append(reply)
            self._due.popleft()
            # A caller that was cancelled has cancelled its future.
            if not exchange.future.done():
                exchange.future.set_result(replies)
        self._restart_timer()

    def connection_lost(self, error: Exception | None) -> None:
        if self._reason is None:
            self._reason = str(error) if error else "the server closed it"
        due, self._due = self._due, deque()
        self._restart_timer()
        for exchange in due:
            if not exchange.future.done():
                exchange.future.set_exception(self._lost_error())
        if not self._closed.done():
            self._closed.set_result(None)
