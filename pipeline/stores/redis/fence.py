"""The fenced state of one partition on one connection: loaded under WATCH, written in one transaction.

A transaction goes out in one write: `MULTI … EXEC`, then `WATCH` and `GET` of the fence for the next one, so that
a batch costs one round trip. Whoever else writes the partition's state writes its fence, and then EXEC does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from hiredis import ReplyError

from millpond.agents.effects import Output, Refusal, RunCommand
from millpond.agents.ports import Applied, LoadedState
from millpond.pipeline.stores.redis.commands import CommandList, refusals
from millpond.pipeline.stores.redis.connection import Connection, checked, code, pack, store_error
from millpond.pipeline.stores.redis.packing import decode_applied, decode_outputs, decode_seen
from millpond.schemas import keys
from millpond.schemas.errors import Fenced, StoreDown, StoreRefused
from millpond.schemas.keys import Partition

# Errors of a user's command that make the server refuse the whole transaction before it begins: it is sent
# again without that command. Anything else is about the server and concerns every command alike.
POISON: Final = frozenset({"ERR", "NOPERM"})


class Packed(NamedTuple):
    """One transaction, ready to be sent; `expected` is the fence that must still be there."""

    expected: Applied | None
    commands: CommandList
    data: bytes


class Fence:
    """A connection and the fence that was last seen through it."""

    def __init__(self, connection: Connection, partition: Partition) -> None:
        """`load` follows."""
        self._connection, self._partition = connection, partition
        self._seen: Applied | None = None
        name = keys.applied(partition)
        self._watch = pack(("WATCH", name)) + pack(("GET", name))

    async def load(self) -> tuple[LoadedState, Mapping[bytes, bytes]]:
        """What is held, and the journal as it is, both of one moment; from here on the fence is watched.

        Raises:
            StoreDown: the server is gone, not ready, or a replica.
            StoreRefused: it will not let us, or the keys hold what is not ours.
        """
        await self._check_server()
        name = self._partition
        data = self._watch + b"".join(
            pack(command)
            for command in (
                ("HGETALL", keys.journal(name)),
                ("GET", keys.rules(name)),
                ("GET", keys.seen(name, 0)),
                ("GET", keys.seen(name, 1)),
                ("GET", keys.applied(name)),
            )
        )
        while True:
            replies = checked(await self._connection.send(data, 7), self._connection.address)
            _, before, pairs, rules, seen_even, seen_odd, after = replies
            if before == after:
                break
        journal = dict(zip(pairs[::2], pairs[1::2], strict=True))
        try:
            stored = LoadedState(
                applied=None if after is None else decode_applied(after),
                journal=_outputs(journal),
                rules=None if rules is None else rules.decode(),
                seen=(decode_seen(seen_even), decode_seen(seen_odd)),
            )
        except (msgspec.DecodeError, ValueError) as error:
            raise self._not_ours(str(error)) from error
        self._seen = stored.applied
        return stored, journal

    async def _check_server(self) -> None:
        """Transactions are allowed, and this is no replica (where every one of them would fail)."""
        probe = pack(("MULTI",)) + pack(("DISCARD",)) + pack(("ROLE",))
        *transaction, role = await self._connection.send(probe, 3)
        checked(transaction, self._connection.address)
        if isinstance(role, list) and role[0] != b"master":
            raise StoreDown(f"{self._connection.address} is a replica")
        if isinstance(role, ReplyError) and code(role) not in POISON:
            checked([role], self._connection.address)

    def _not_ours(self, reason: str) -> StoreRefused:
        prefix = keys.applied(self._partition).rpartition(":")[0]
        return StoreRefused(
            f"{self._connection.address} holds keys {prefix}:* that Millpond did not write: {reason}; "
            "remove them, or choose another application name"
        )

    async def verify(self) -> None:
        """Ask whether the fence is the one that was last seen; if not, that is `Fenced`."""
        (reply,) = await self._connection.call("GET", keys.applied(self._partition))
        (fence,) = checked((reply,), self._connection.address)
        if self._decoded(fence) != self._seen:
            raise self._fenced()

    def expect(self, packed: Packed) -> None:
        """Raise `Fenced` if the fence that was last seen is not the expected one: then nothing is sent."""
        if packed.expected != self._seen:
            raise self._fenced()

    def send(self, packed: Packed) -> asyncio.Future[list[Any]]:
        """Send a transaction now; `result` reads what came of it."""
        try:
            self.expect(packed)
        except Fenced as error:
            fenced: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
            fenced.set_exception(error)
            return fenced
        count = len(packed.commands.commands)
        data = b"".join((_MULTI, packed.data, _EXEC, self._watch))
        return self._connection.send(data, count + 4)

    async def result(self, packed: Packed, sent: asyncio.Future[list[Any]]) -> list[Refusal]:
        """What the server refused in a transaction. See `millpond.agents.ports.Store.commit` for what is raised."""
        _, *queued, executed, watching, fence = await sent
        sources = packed.commands.sources
        checked((watching, fence), self._connection.address)
        self._seen = self._decoded(fence)
        if executed is None:
            raise self._fenced()
        if isinstance(executed, ReplyError):
            return await self._without_poison(packed, queued, executed)
        if ReplyError not in set(map(type, executed)):  # the hot path: one look in C
            return []
        for command, source, reply in zip(packed.commands.commands, sources, executed, strict=True):
            if source is None and isinstance(reply, ReplyError):
                raise self._not_ours(f"{command[0]!s} {command[1]!s}: {reply}")
        return refusals(sources, executed)

    async def _without_poison(
        self, packed: Packed, queued: Sequence[Any], executed: ReplyError
    ) -> list[Refusal]:
        """The server took nothing of it. If only users' commands were to blame, the rest goes without them."""
        sources, where = packed.commands.sources, self._connection.address
        bad = [at for at, reply in enumerate(queued) if isinstance(reply, ReplyError)]
        for at in bad:
            if not isinstance(sources[at], RunCommand) or code(queued[at]) not in POISON:
                raise store_error(queued[at], where) or StoreRefused(f"{where}: {queued[at]}")
        if not bad:
            raise store_error(executed, where) or StoreRefused(f"{where}: {executed}")
        rest = packed.commands.without(bad)
        again = Packed(packed.expected, rest, rest.packed())
        refused = refusals([sources[at] for at in bad], [queued[at] for at in bad])
        return refused + await self.result(again, self.send(again))

    def _decoded(self, fence: bytes | None) -> Applied | None:
        try:
            return None if fence is None else decode_applied(fence)
        except msgspec.DecodeError as error:
            raise self._not_ours(str(error)) from error

    def _fenced(self) -> Fenced:
        return Fenced(f"{self._partition}: somebody else wrote its state")


_MULTI: Final = pack(("MULTI",))
_EXEC: Final = pack(("EXEC",))


def _outputs(journal: Mapping[bytes, bytes]) -> dict[int, Sequence[Output]]:
    """The outputs that are still to be produced, by sequence; fields with other names are the cluster store's."""
    sequences = sorted(int(field) for field in journal if field.isdigit())
    return {sequence: decode_outputs(journal[b"%d" % sequence]) for sequence in sequences}
