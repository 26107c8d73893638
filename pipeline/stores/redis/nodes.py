"""The nodes of a Redis Cluster: which one holds a key, one connection to each, redirections followed."""

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
    code,
    pack,
)
from millpond.schemas.errors import StoreDown

REDIRECTIONS_MAX: Final = 5  # of one command, while slots move
_ASKING: Final = pack(("ASKING",))


class Nodes:
    """Connections are opened when first needed. After any `StoreDown`, `close` and start with a new one."""

    def __init__(self, seeds: Sequence[Address], access: Access) -> None:
        """`seeds` are nodes to ask for the others."""
        self._seeds, self._access = seeds, access
        self._slots: list[Address | None] = []
        self._wires: dict[Address, Connection] = {}
        self._opening = asyncio.Lock()
        self._moved = False

    async def discover(self) -> None:
        """Learn which node holds which slot, from the first seed that knows."""
        failures: list[StoreDown] = []
        for seed in self._seeds:
            try:
                self._slots = await self._slots_known_to(seed)
            except StoreDown as error:
                failures.append(error)
            else:
                self._moved = False
                return
        raise StoreDown("; ".join(str(error) for error in failures))

    async def _slots_known_to(self, seed: Address) -> list[Address | None]:
        connection = await self.connection(seed)
        (ranges,) = checked(await connection.call("CLUSTER", "SLOTS"), seed)
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in ranges:
            # A node that does not know its own name leaves the host empty: it is the one that we asked.
            address = Address(host.decode() if host else seed.host, port)
            slots[first : last + 1] = [address] * (last + 1 - first)
        return slots

    async def connection(self, address: Address) -> Connection:
        """The connection to a node."""
        async with self._opening:
            if address not in self._wires:
                self._wires[address] = await Connection.open(address, self._access)
            return self._wires[address]

    def address_of(self, key: str | bytes | int) -> Address:
        """The node that holds a key, as far as we know."""
        slot = key_slot(key if isinstance(key, bytes) else str(key).encode())
        address = self._slots[slot]
        if address is None:
            raise StoreDown(f"no node of the cluster serves slot {slot}")
        return address

    async def run(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """Run commands, pipelined per node, each in order; the replies in order, errors among them.

        A command's second word is taken for its key; where that is wrong, the node says who holds it.
        """
        if self._moved:
            await self.discover()
        by_node: dict[Address, list[int]] = {}
        for at, command in enumerate(commands):
            key = command[1] if len(command) > 1 else b""
            by_node.setdefault(self.address_of(key), []).append(at)
        replies: list[Any] = [None] * len(commands)

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
                replies[at] = await self._redirected(commands[at], reply)
        return replies

    async def _redirected(self, command: RedisCommand, reply: Any) -> Any:
        """Follow a command to where its key is; any other reply stays as it is."""
        for _ in range(REDIRECTIONS_MAX):
            if not isinstance(reply, ReplyError) or code(reply) not in ("MOVED", "ASK"):
                break
            kind, _slot, where = str(reply).split(" ")[:3]
            host, _, port = where.rpartition(":")
            connection = await self.connection(Address(host or self._seeds[0].host, int(port)))
            if kind == "MOVED":
                self._moved = True
                (reply,) = await connection.call(*command)
            else:
                _, reply = await connection.send(_ASKING + pack(command), 2)
        return reply

    async def close(self) -> None:
        """Close every connection."""
        wires, self._wires = self._wires, {}
        for connection in wires.values():
            await connection.close()
