"""The fence: one transaction for each batch, and only one worker whose transactions have an effect.

**Concepts**

- The *fence* is the key `…:applied` of a partition. It holds the applied offset.
- Every transaction of the partition writes the fence.
- A worker has the fence under WATCH. So EXEC does nothing if the fence was written after that WATCH.

One transaction is one write of three parts:

1. `MULTI … EXEC`: the batch and the new fence.
2. `WATCH` of the fence, for the next batch.
3. `GET` of the fence, for the next batch.

The replies of 2 and 3 arrive with those of the batch. So a batch costs one round trip.

**Why the GET follows the WATCH.** Another owner may write the fence between EXEC and WATCH. WATCH does not notice that
write, but GET returns its value. `expect` then finds another fence than the transaction names, and sends nothing.

**Invariants**

1. `_seen` is the value of the fence that the GET after the active WATCH returned.
2. A transaction is sent only if its `expected` fence equals `_seen`.
3. After any exception the connection's WATCH is in an unknown state. The store then loads again on a new connection.

**State**: `_connection`; `_seen`, which is None for a partition without a fence; `confirmation` (see nodes.py).
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
from millpond.pipeline.stores.redis.connection import (
    Address,
    Connection,
    checked,
    error_code,
    pack,
    store_error,
)
from millpond.pipeline.stores.redis.nodes import CONFIRMATION_REPLIES, check_confirmed
from millpond.pipeline.stores.redis.packing import decode_applied, decode_outputs, decode_seen
from millpond.pipeline.stores.redis.role import is_replica
from millpond.schemas import keys
from millpond.schemas.errors import Fenced, StoreDown, StoreRefused
from millpond.schemas.keys import Partition

# Errors that the server gives to one user command when it is queued. They make the server refuse the whole transaction,
# which is then sent again without that command. Any other error is about the server and concerns every command alike.
BAD_COMMAND_CODES: Final = frozenset({"ERR", "NOPERM"})


class Packed(NamedTuple):
    """One transaction, encoded; `expected` is the fence that it replaces."""

    expected: Applied | None
    commands: CommandList
    data: bytes


class Fence:
    """The fence of one partition, under WATCH on one connection."""

    def __init__(self, connection: Connection, partition: Partition) -> None:
        """Call `load` first."""
        self._connection, self._partition = connection, partition
        self._seen: Applied | None = None
        # What follows a transaction so that a replica confirms it. Nothing, except on a Redis Cluster with replicas.
        self.confirmation = b""
        name = keys.applied(partition)
        self._watch = pack(("WATCH", name)) + pack(("GET", name))

    @property
    def address(self) -> Address:
        """The server whose fence this is."""
        return self._connection.address

    async def load(self) -> tuple[LoadedState, Mapping[bytes, bytes]]:
        """Watch the fence, and read the state and the raw journal, all of one moment.

        Raises:
            StoreDown: the connection is lost, or the server is not ready or a replica.
            StoreRefused: the server refuses the user, or the keys hold data that Millpond did not write.
        """
        if await is_replica(self._connection):
            raise StoreDown(f"{self._connection.address} is a replica")
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
        # The reads are no transaction. If the fence is the same before and after them, no other owner wrote in between.
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
            raise self._foreign_keys(str(error)) from error
        self._seen = stored.applied
        return stored, journal

    def _foreign_keys(self, reason: str) -> StoreRefused:
        prefix = keys.applied(self._partition).rpartition(":")[0]
        return StoreRefused(
            f"{self._connection.address} holds keys {prefix}:* that Millpond did not write: {reason}; "
            "remove them, or choose another application name"
        )

    async def verify(self) -> None:
        """Read the fence. See `millpond.agents.ports.Store.check` for the errors."""
        (reply,) = await self._connection.call("GET", keys.applied(self._partition))
        (fence,) = checked((reply,), self._connection.address)
        if self._decoded(fence) != self._seen:
            raise self._fenced()

    def expect(self, packed: Packed) -> None:
        """Check, without asking the server, that the transaction replaces the fence that was last seen.

        Raises:
            Fenced: it expects another fence.
        """
        if packed.expected != self._seen:
            raise self._fenced()

    def send(self, packed: Packed) -> asyncio.Future[list[Any]]:
        """Send a transaction now. `result` interprets its replies."""
        try:
            self.expect(packed)
        except Fenced as error:
            fenced: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
            fenced.set_exception(error)
            return fenced
        count = len(packed.commands.commands)
        data = b"".join((_MULTI, packed.data, _EXEC, self._watch, self.confirmation))
        # One reply for each command, and those of MULTI, EXEC, WATCH, GET and the confirmation.
        extra = CONFIRMATION_REPLIES if self.confirmation else 0
        return self._connection.send(data, count + 4 + extra)

    async def result(self, packed: Packed, sent: asyncio.Future[list[Any]]) -> list[Refusal]:
        """Return the refusals. See `millpond.agents.ports.Store.commit` for the errors."""
        replies = await sent
        end = len(packed.commands.commands) + 4
        _, *queued, executed, watching, fence = replies[:end]
        sources = packed.commands.sources
        checked((watching, fence), self._connection.address)
        self._seen = self._decoded(fence)
        # EXEC returns nil if the watched fence was written since.
        if executed is None:
            raise self._fenced()
        if isinstance(executed, ReplyError):
            return await self._retry_without_bad_commands(packed, queued, executed)
        if replies[end:]:
            check_confirmed(replies[end:], self._connection.address)
        # The hot path: one pass in C over all replies.
        if ReplyError not in set(map(type, executed)):
            return []
        for command, source, reply in zip(packed.commands.commands, sources, executed, strict=True):
            if source is None and isinstance(reply, ReplyError):
                raise self._foreign_keys(f"{command[0]!s} {command[1]!s}: {reply}")
        return refusals(sources, executed)

    async def _retry_without_bad_commands(
        self, packed: Packed, queued: Sequence[Any], executed: ReplyError
    ) -> list[Refusal]:
        """Send an aborted transaction again, without the user commands that the server did not queue.

        The server has applied nothing of it. If it refused anything but user commands, the error stands.
        """
        sources, where = packed.commands.sources, self._connection.address
        bad = [at for at, reply in enumerate(queued) if isinstance(reply, ReplyError)]
        for at in bad:
            if (
                not isinstance(sources[at], RunCommand)
                or error_code(queued[at]) not in BAD_COMMAND_CODES
            ):
                raise store_error(queued[at], where) or StoreRefused(f"{where}: {queued[at]}")
        if not bad:
            raise store_error(executed, where) or StoreRefused(f"{where}: {executed}")
        rest = packed.commands.without(bad)
        retried = Packed(packed.expected, rest, rest.packed())
        refused = refusals([sources[at] for at in bad], [queued[at] for at in bad])
        return refused + await self.result(retried, self.send(retried))

    def _decoded(self, fence: bytes | None) -> Applied | None:
        try:
            return None if fence is None else decode_applied(fence)
        except msgspec.DecodeError as error:
            raise self._foreign_keys(str(error)) from error

    def _fenced(self) -> Fenced:
        return Fenced(f"{self._partition}: another writer has changed its state")


_MULTI: Final = pack(("MULTI",))
_EXEC: Final = pack(("EXEC",))


def _outputs(journal: Mapping[bytes, bytes]) -> dict[int, Sequence[Output]]:
    """Decode the outputs by sequence. Fields with other names are those of the cluster store."""
    sequences = sorted(int(field) for field in journal if field.isdigit())
    return {sequence: decode_outputs(journal[b"%d" % sequence]) for sequence in sequences}
