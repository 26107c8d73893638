"""A partition on a Redis Cluster: its private state in one slot, the public keys in all slots.

One transaction cannot span slots. A batch therefore runs in this order:

1. bodies and receipts,
2. index entries and retained entries,
3. the fenced transaction: private state, fence, journal, and a list of the commands of steps 4 and 5,
4. index deletions, cleared retained entries and body expiries, presence, views of read offsets, user commands,
5. body deletions,
6. the list leaves the journal.

Each step begins after every command of the step before has been answered. On shards with replicas, the steps 1 to 5 end
when a replica of each written shard has acknowledged the writes (nodes.py).

**Why each step is confirmed.** The fence and the public keys lie in different shards, and each shard can fail over by
itself, and lose its last writes. The fence decides what is folded again, and the journal what is removed again. So:

- Bodies and entries are on a replica before the fence moves. If they are lost before, they are folded again.
- The fence is on a replica before anything is removed, and before user commands run. So no removal is ahead of it.
- Removals are on a replica before their list leaves the journal. If they are lost before, they run again.

**Invariants**

1. The private state changes in step 3 alone. It is applied once, as on a single server.
2. An id has its body whenever a reader finds it: bodies come before entries (1, 2), and go after them (4, 5).
3. A removal runs at least once. Its list is in the journal, as field `remove:{sequence}`, from step 3 to step 6.

**ON load**

1. Discover the nodes.
2. Watch the fence, and read state and journal (`Fence.load`).
3. If the journal has the list of the last transaction: confirm the fence, then run steps 4 to 6.

Step 3 may repeat what the last owner did before it crashed, stalled or lost its connection. Only here a user command may
run twice. docs/explanation/guarantees.md lists what else can run late, and with which effect.
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
    error_code,
    store_error,
)
from millpond.pipeline.stores.redis.fence import BAD_COMMAND_CODES, Fence, Packed
from millpond.pipeline.stores.redis.nodes import Nodes
from millpond.pipeline.stores.redis.packing import BatchCommands
from millpond.pipeline.stores.redis.reads import answer, read_command
from millpond.pipeline.stores.redis.store import NOT_LOADED
from millpond.pipeline.stores.retries import Retries, until_up
from millpond.schemas import keys
from millpond.schemas.errors import StoreDown
from millpond.schemas.keys import Partition

log = logging.getLogger(__name__)

# The list of removals: the commands of step 4, then those of step 5. MessagePack keeps text, bytes and numbers apart,
# so that a command runs with the same arguments after a crash.
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]).decode


class ClusterPacked(NamedTuple):
    """One transaction, step by step. `removals` are the commands of step 4, user commands among them."""

    bodies: CommandList
    entries: CommandList
    fenced: Packed
    applied: Applied
    removals: CommandList
    body_removals: CommandList


class ClusterStore:
    """See `millpond.agents.ports.Store`."""

    def __init__(self, partition: Partition, seeds: Sequence[Address], access: Access) -> None:
        """`seeds` are some nodes of the cluster. Nothing connects before `load`."""
        self._partition, self._seeds, self._access = partition, seeds, access
        self._nodes = Nodes(seeds, access)
        self._retries = Retries()
        # None before `load`, during a commit, and after a failure.
        self._fence: Fence | None = None

    async def load(self) -> LoadedState:
        """See `millpond.agents.ports.Store`. Finishes the removals of the last transaction first."""
        # A store that was loaded, and then refused the transaction, is not loaded again at once.
        await self._retries.pause()
        return await until_up(self._load, self._partition, self._retries)

    async def _load(self) -> LoadedState:
        await self.close()
        self._nodes = Nodes(self._seeds, self._access)
        # A node that is cut off from the cluster answers with an old map. So the next load asks another one first.
        self._seeds = (*self._seeds[1:], self._seeds[0])
        await self._nodes.discover()
        home = self._nodes.address_of(keys.applied(self._partition))
        fence = Fence(await self._nodes.connection(home), self._partition)
        stored, journal = await fence.load()
        if stored.applied is not None:
            await self._finish_removals(stored.applied, journal, home)
        self._fence = fence
        return stored

    async def _finish_removals(
        self, applied: Applied, journal: Mapping[bytes, bytes], home: Address
    ) -> None:
        # Lists of earlier transactions cannot exist: a commit ends with step 6, and `load` with this one.
        left = journal.get(keys.removal_field(applied.sequence).encode())
        if left is not None:
            # The owner that left the list may not have had the confirmation of its fence.
            await self._nodes.confirm(home)
            for commands in _decode(left):
                await self._run_journaled(commands)
            await self._forget_removals(applied)

    async def _forget_removals(self, applied: Applied) -> None:
        """Remove the list of a transaction from the journal: all of its commands were answered.

        This needs no fence. The list has run, so its removal is right for every owner.
        """
        field = keys.removal_field(applied.sequence)
        forget: list[RedisCommand] = [("HDEL", keys.journal(self._partition), field)]
        checked(await self._nodes.run(forget), "the cluster")

    async def _run_journaled(self, commands: Sequence[RedisCommand]) -> None:
        for command, reply in zip(
            commands, await self._nodes.run(commands, confirmed=True), strict=True
        ):
            if isinstance(reply, ReplyError):
                error = store_error(reply, "the cluster")
                if error is not None and error_code(reply) not in BAD_COMMAND_CODES:
                    raise error
                # The list does not name the records, so a refusal here cannot become a dead letter.
                log.warning(
                    "%s: the cluster refused %s, which an earlier owner had left to run: %s; it is not run again",
                    self._partition,
                    command[0],
                    reply,
                )

    async def read(self, reads: Sequence[Read]) -> list[Any]:
        commands = [read_command(self._partition, read) for read in reads]
        with self._retries.counting(success=False):
            replies = await self._nodes.run(commands)
            pairs = zip(reads, replies, strict=True)
            return [answer(read, reply, "the cluster") for read, reply in pairs]

    def pack(self, transaction: Transaction) -> ClusterPacked:
        commands = BatchCommands(self._partition, transaction, now_ms())
        removals, body_removals = commands.removals.split(DeleteBody)
        state = CommandList()
        if commands.removals.commands:
            left = _encode((removals.commands, body_removals.commands))
            field = keys.removal_field(transaction.applied.sequence)
            state.add(None, "HSET", keys.journal(self._partition), field, left)
        state.extend(commands.state)
        fenced = Packed(transaction.expected, state, state.packed())
        return ClusterPacked(
            commands.bodies, commands.entries, fenced, transaction.applied, removals, body_removals
        )

    def commit(self, packed: ClusterPacked) -> Awaitable[Sequence[Refusal]]:
        fence, self._fence = self._fence, None
        assert fence is not None, NOT_LOADED
        return asyncio.ensure_future(self._commit(fence, packed))

    async def _commit(self, fence: Fence, packed: ClusterPacked) -> Sequence[Refusal]:
        with self._retries.counting():
            refused = await self._run_steps(fence, packed)
        self._fence = fence
        return refused

    async def _run_steps(self, fence: Fence, packed: ClusterPacked) -> Sequence[Refusal]:
        # Without this check a fenced worker would run steps 1 and 2 in vain.
        fence.expect(packed.fenced)
        await self._nodes.refresh()
        home = self._nodes.address_of(keys.applied(self._partition))
        if home != fence.address:
            # The old primary may be cut off, and still take writes.
            raise StoreDown(
                f"the slot of {self._partition} has moved from {fence.address} to {home}"
            )
        fence.confirmation = self._nodes.confirmation(home)
        # What steps 1 and 2 write in the fence's own shard comes before it, on the same connection.
        refused = await self._run_step(packed.bodies, unless_on=home)
        refused += await self._run_step(packed.entries, unless_on=home)
        refused += await fence.result(packed.fenced, fence.send(packed.fenced))
        if packed.removals.commands or packed.body_removals.commands:
            refused += await self._run_step(packed.removals)
            refused += await self._run_step(packed.body_removals)
            await self._forget_removals(packed.applied)
        return refused

    async def _run_step(
        self, commands: CommandList, unless_on: Address | None = None
    ) -> list[Refusal]:
        """Run commands on the nodes that hold their keys, and return the refusals. For `unless_on` see `Nodes.run`.

        An error about one key stops nothing.

        Raises:
            StoreDown, StoreRefused: an error about a node.
        """
        if not commands.commands:
            return []
        replies = await self._nodes.run(commands.commands, confirmed=True, unless_on=unless_on)
        for source, reply in zip(commands.sources, replies, strict=True):
            if isinstance(reply, ReplyError):
                error = store_error(reply, "the cluster")
                # Permissions that lack one user command are that command's fault alone.
                bad_command = (
                    isinstance(source, RunCommand) and error_code(reply) in BAD_COMMAND_CODES
                )
                if error is not None and not bad_command:
                    raise error
        return refusals(commands.sources, replies)

    async def check(self) -> None:
        fence, self._fence = self._fence, None
        assert fence is not None, NOT_LOADED
        with self._retries.counting():
            await fence.verify()
        self._fence = fence

    async def close(self) -> None:
        self._fence = None
        await self._nodes.close()
