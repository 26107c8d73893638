"""The nodes of a Redis Cluster: one connection to each, and the map from slots to nodes.

State:

- `_slots`: slot → address of its node, None for a slot without one. `discover` fills it.
- `_connections`: address → open connection.
- `_slots_moved`: True after a MOVED reply. The next `run` then discovers the slots again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from hiredis import ReplyError
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from millpond.pipeline.stores.redis.connection import (
    Access,
    Address,
    Connection,
    RedisCommand,
    checked,
    error_code,
    pack,
)
from millpond.schemas.errors import StoreDown

REDIRECTIONS_MAX: Final = 5  # of one command, while slots move
_ASKING: Final = pack(("ASKING",))


class Nodes:
    """Opens connections when they are needed. After a `StoreDown`, close this and begin with a new one."""

    def __init__(self, seeds: Sequence[Address], access: Access) -> None:
        """`seeds` are nodes that know the others. Nothing connects before `discover`."""
        self._seeds, self._access = seeds, access
        self._slots: list[Address | None] = []
        self._connections: dict[Address, Connection] = {}
        self._opening = asyncio.Lock()
        self._slots_moved = False

    async def discover(self) -> None:
        """Ask the seeds in turn which node holds which slot, until one answers.

        Raises:
            StoreDown: none of them answers.
            StoreRefused: one of them refuses the user, or is not part of a cluster.
        """
        failures: list[StoreDown] = []
        for seed in self._seeds:
            try:
                self._slots = await self._slots_known_to(seed)
            except StoreDown as error:
                failures.append(error)
            else:
                self._slots_moved = False
                return
        raise StoreDown("; ".join(str(error) for error in failures))

    async def _slots_known_to(self, seed: Address) -> list[Address | None]:
        connection = await self.connection(seed)
        (ranges,) = checked(await connection.call("CLUSTER", "SLOTS"), seed)
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in ranges:
            # A node that does not know its own address sends an empty host: it is the node that we asked.
            address = Address(host.decode() if host else seed.host, port)
            slots[first : last + 1] = [address] * (last + 1 - first)
        return slots

    async def connection(self, address: Address) -> Connection:
        """Return the connection to a node. See `Connection.open` for the errors."""
        # The lock keeps concurrent callers from opening two connections to one node.
        async with self._opening:
            if address not in self._connections:
                self._connections[address] = await Connection.open(address, self._access)
            return self._connections[address]

    def address_of(self, key: str | bytes | int) -> Address:
        """Return the node that holds a key, by the last discovery.

        Raises:
            StoreDown: no node serves the key's slot.
        """
        slot = key_slot(key if isinstance(key, bytes) else str(key).encode())
        address = self._slots[slot]
        if address is None:
            raise StoreDown(f"no node of the cluster serves slot {slot}")
        return address

    async def run(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """Send the commands to their nodes, all at once and in order for each node. Return the replies in order.

        Error replies are returned, not raised. The second word of a command counts as its key. If it is not the key,
        the node redirects the command.

        Raises:
            StoreDown, StoreRefused: a node cannot be reached, or refuses the user.
        """
        if self._slots_moved:
            await self.discover()
        by_node: dict[Address, list[int]] = {}
        for at, command in enumerate(commands):
            key = command[1] if len(command) > 1 else b""
            by_node.setdefault(self.address_of(key), []).append(at)
        replies: list[Any] = [None] * len(commands)
        asked = {at: address for address, positions in by_node.items() for at in positions}

        async def run_on(address: Address, positions: Sequence[int]) -> None:
            connection = await self.connection(address)
            data = b"".join(pack(commands[at]) for at in positions)
            for at, reply in zip(
                positions, await connection.send(data, len(positions)), strict=True
            ):
                replies[at] = reply

        await asyncio.gather(*(run_on(address, at) for address, at in by_node.items()))
        for at, reply in enumerate(replies):
            if isinstance(reply, ReplyError):
                replies[at] = await self._redirected(commands[at], reply, asked[at])
        return replies

    async def _redirected(self, command: RedisCommand, reply: Any, asked: Address) -> Any:
        """Follow the MOVED and ASK of the node `asked`.

        Return any other reply as it is, and the last one after too many redirections.
        """
        for _ in range(REDIRECTIONS_MAX):
            if not isinstance(reply, ReplyError) or error_code(reply) not in ("MOVED", "ASK"):
                break
            kind, _slot, where = str(reply).split(" ")[:3]
            host, _, port = where.rpartition(":")
            # An empty host is that of the node which sent it.
            asked = Address(host or asked.host, int(port))
            connection = await self.connection(asked)
            if kind == "MOVED":
                self._slots_moved = True
                (reply,) = await connection.call(*command)
            else:
                # A node that imports a slot serves it only to a client that has just sent ASKING.
                _, reply = await connection.send(_ASKING + pack(command), 2)
        return reply

    async def close(self) -> None:
        """Close all connections."""
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()
