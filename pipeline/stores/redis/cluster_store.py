"""A partition on a Redis Cluster: its fenced state on one slot, the messages on all of them.

What a batch stores is acknowledged before its fence is written, index entries after their bodies.
What it removes, and the user's commands, run after the fence. They are journaled with it, as the
field `remove:{sequence}`, until all of them were answered, so that the next owner runs what this
one could not. Here, and only here, a user's command may run twice: after a crash, a stall or a
lost connection between the two.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from hiredis import ReplyError

from millpond.agents.effects import DeleteBody, Refusal, RunCommand
from millpond.agents.ports import Applied, LoadedState, Transaction
from millpond.agents.reads import Read
from millpond.pipeline.clock import now_ms
from millpond.pipeline.stores.redis.commands import CommandList, refusals
from millpond.pipeline.stores.redis.connection import (
    Access,
    Address,
    RedisCommand,
    checked,
    code,
    store_error,
)
from millpond.pipeline.stores.redis.fence import POISON, Fence, Packed
from millpond.pipeline.stores.redis.nodes import Nodes
from millpond.pipeline.stores.redis.packing import BatchCommands
from millpond.pipeline.stores.redis.reads import answer, read_command
from millpond.pipeline.stores.redis.store import until_up
from millpond.schemas import keys
from millpond.schemas.keys import Partition

log = logging.getLogger(__name__)

_encode: Final = msgspec.msgpack.Encoder().encode
# MessagePack itself tells text, bytes and numbers apart.
_decode: Final = msgspec.msgpack.Decoder(tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]).decode


class ClusterPacked(NamedTuple):
    """One transaction in the order in which it is sent."""

    bodies: CommandList
    entries: CommandList
    fenced: Packed
    applied: Applied
    unindexed: CommandList  # and the user's commands
    dropped: CommandList


class ClusterStore:
    """See `millpond.agents.ports.Store`."""

    def __init__(self, partition: Partition, seeds: Sequence[Address], access: Access) -> None:
        """`seeds` are some nodes of the cluster."""
        self._partition, self._seeds, self._access = partition, seeds, access
        self._nodes = Nodes(seeds, access)
        # None before `load`, while a commit is on its way, and after one that failed.
        self._fence: Fence | None = None

    async def load(self) -> LoadedState:
        """See `millpond.agents.ports.Store`. Runs what the last transaction still had to remove."""
        return await until_up(self._load, self._partition)

    async def _load(self) -> LoadedState:
        await self.close()
        self._nodes = Nodes(self._seeds, self._access)
        await self._nodes.discover()
        home = self._nodes.address_of(keys.applied(self._partition))
        fence = Fence(await self._nodes.connection(home), self._partition)
        stored, journal = await fence.load()
        if stored.applied is not None:
            await self._finish(stored.applied, journal)
        self._fence = fence
        return stored

    async def _finish(self, applied: Applied, journal: Mapping[bytes, bytes]) -> None:
        """Run what the last transaction still had to remove."""
        left = journal.get(keys.removal_field(applied.sequence).encode())
        if left is not None:
            for commands in _decode(left):
                await self._run_left(commands)
            await self._forget(applied)

    async def _forget(self, applied: Applied) -> None:
        """All removals of a transaction were answered. No fence: this is true whoever says it."""
        field = keys.removal_field(applied.sequence)
        forget: list[RedisCommand] = [("HDEL", keys.journal(self._partition), field)]
        checked(await self._nodes.run(forget), "the cluster")

    async def _run_left(self, commands: Sequence[RedisCommand]) -> None:
        for command, reply in zip(commands, await self._nodes.run(commands), strict=True):
            if isinstance(reply, ReplyError):
                if (error := store_error(reply, "the cluster")) and code(reply) not in POISON:
                    raise error
                log.warning(
                    "%s: a removal left over was refused: %s: %s",
                    self._partition,
                    command[0],
                    reply,
                )

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        replies = await self._nodes.run([read_command(self._partition, read) for read in reads])
        pairs = zip(reads, replies, strict=True)
        return [answer(read, reply, "the cluster") for read, reply in pairs]

    def pack(self, transaction: Transaction) -> ClusterPacked:
        commands = BatchCommands(self._partition, transaction, now_ms())
        unindexed, dropped = commands.removals.split(DeleteBody)
        state = CommandList()
        if commands.removals.commands:
            left = _encode((unindexed.commands, dropped.commands))
            field = keys.removal_field(transaction.applied.sequence)
            state.add(None, "HSET", keys.journal(self._partition), field, left)
        state.extend(commands.state)
        fenced = Packed(transaction.expected, state, state.packed())
        applied = transaction.applied
        return ClusterPacked(commands.bodies, commands.entries, fenced, applied, unindexed, dropped)

    def commit(self, packed: ClusterPacked) -> Awaitable[Sequence[Refusal]]:
        fence, self._fence = self._fence, None
        assert fence is not None, (
            "load() comes first, and after every failure; one commit at a time"
        )
        return asyncio.ensure_future(self._commit(fence, packed))

    async def _commit(self, fence: Fence, packed: ClusterPacked) -> Sequence[Refusal]:
        fence.expect(packed.fenced)
        refused = await self._spread(packed.bodies) + await self._spread(packed.entries)
        refused += await fence.result(packed.fenced, fence.send(packed.fenced))
        if packed.unindexed.commands or packed.dropped.commands:
            refused += await self._spread(packed.unindexed) + await self._spread(packed.dropped)
            await self._forget(packed.applied)
        self._fence = fence
        return refused

    async def _spread(self, commands: CommandList) -> list[Refusal]:
        """Run commands on the nodes that hold their keys; what is refused for one key is no reason to stop."""
        if not commands.commands:
            return []
        replies = await self._nodes.run(commands.commands)
        for source, reply in zip(commands.sources, replies, strict=True):
            if isinstance(reply, ReplyError):
                error = store_error(reply, "the cluster")
                users_own = isinstance(source, RunCommand) and code(reply) in POISON
                if error is not None and not users_own:
                    raise error
        return refusals(commands.sources, replies)

    async def check(self) -> None:
        fence, self._fence = self._fence, None
        assert fence is not None, (
            "load() comes first, and after every failure; one commit at a time"
        )
        await fence.verify()
        self._fence = fence

    async def close(self) -> None:
        self._fence = None
        await self._nodes.close()
