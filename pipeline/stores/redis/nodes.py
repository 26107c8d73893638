"""The nodes of a Redis Cluster: one connection to each, and the map from slots to nodes.

**Confirmation.** A shard is a primary with its replicas. Replication is asynchronous: a primary that dies takes its last
writes with it. `WAIT` answers when a replica has acknowledged what its connection wrote. A connection that wrote nothing,
or repeated what was there already, has nothing to wait for: what an earlier connection wrote may still be on the primary
alone. So a key without meaning is written in front of each WAIT. Every earlier write of the primary comes before it.

A shard counts as one with replicas if the cluster knows a replica of it, whether that works or not. While none of them
acknowledges, the store is down. Else a replica that lags could take over, and lack what was acknowledged.

State:

- `_slots`: slot → address of its node, None for a slot without one. `discover` fills it.
- `_connections`: address → open connection.
- `_replicated`: the primaries that have replicas. `discover` fills it, too.
- `_confirmations`: address → the write and the WAIT, encoded.
- `_slots_moved`: True after a MOVED reply. The next `run` then discovers the slots again.
"""

from __future__ import annotations

import asyncio
import time
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
    store_error,
)
from millpond.schemas import keys
from millpond.schemas.errors import StoreDown

REDIRECTIONS_MAX: Final = 5  # of one command, while slots move
# How old the map of the cluster may be. It is a small read, and this bounds how long a new replica is not waited for.
REFRESH_INTERVAL_S: Final = 10.0
# WAIT takes this share of the time-out of a reply, so that it answers before the connection is given up.
CONFIRM_SHARE: Final = 0.5
CONFIRMATION_REPLIES: Final = 2  # to SET and WAIT
_ASKING: Final = pack(("ASKING",))


def primaries_with_replicas(nodes: bytes) -> set[bytes]:
    """Return the ids of the primaries that have a replica, by the reply to CLUSTER NODES."""
    # One node in each line: id, address, flags, id of its primary, …
    lines = [line.split(b" ") for line in nodes.splitlines()]
    return {fields[3] for fields in lines if b"slave" in fields[2].split(b",")}


def check_confirmed(replies: Sequence[Any], address: Address) -> None:
    """Check the replies to a confirmation.

    Raises:
        StoreDown: no replica has acknowledged in time, or the node is no primary any more.
        StoreRefused: the user may not send WAIT.
    """
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise store_error(reply, address) or StoreDown(f"{address} confirms nothing: {reply}")
    if not replies[-1]:
        raise StoreDown(
            f"no replica of {address} acknowledges its writes: repair the replica,"
            " or remove it from the cluster with CLUSTER FORGET"
        )


class Nodes:
    """Opens connections when they are needed. After a `StoreDown`, close this and begin with a new one."""

    def __init__(self, seeds: Sequence[Address], access: Access) -> None:
        """`seeds` are nodes that know the others. Nothing connects before `discover`."""
        self._seeds, self._access = seeds, access
        self._slots: list[Address | None] = []
        self._connections: dict[Address, Connection] = {}
        self._replicated: frozenset[Address] = frozenset()
        self._confirmations: dict[Address, bytes] = {}
        self._discovered_at = 0.0
        self._opening = asyncio.Lock()
        self._slots_moved = False

    async def discover(self) -> None:
        """Ask the connected nodes and then the seeds which node holds which slot, until one answers.

        Raises:
            StoreDown: none of them answers.
            StoreRefused: one of them refuses the user, or is not part of a cluster.
        """
        failures: list[StoreDown] = []
        for node in dict.fromkeys((*self._connections, *self._seeds)):
            try:
                await self._ask(node)
            except StoreDown as error:
                failures.append(error)
            else:
                self._slots_moved, self._discovered_at = False, time.monotonic()
                return
        raise StoreDown("; ".join(str(error) for error in failures))

    async def refresh(self) -> None:
        """Discover again if the last time is a while ago: a shard may have its first replica now, or none any more."""
        if time.monotonic() - self._discovered_at > REFRESH_INTERVAL_S:
            await self.discover()

    async def _ask(self, node: Address) -> None:
        connection = await self.connection(node)
        data = pack(("CLUSTER", "SLOTS")) + pack(("CLUSTER", "NODES"))
        ranges, nodes = checked(await connection.send(data, 2), node)
        with_replicas = primaries_with_replicas(nodes)
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        replicated = set()
        for first, last, (host, port, node_id, *_), *_ in ranges:
            # A node that does not know its own address sends an empty host: it is the node that we asked.
            address = Address(host.decode() if host else node.host, port)
            slots[first : last + 1] = [address] * (last + 1 - first)
            if node_id in with_replicas:
                replicated.add(address)
        self._slots, self._replicated, self._confirmations = slots, frozenset(replicated), {}

    @property
    def without_replicas(self) -> list[Address]:
        """The primaries that have no replica."""
        primaries = dict.fromkeys(each for each in self._slots if each is not None)
        return [each for each in primaries if each not in self._replicated]

    def confirmation(self, address: Address) -> bytes:
        """Return what makes a node confirm, with `CONFIRMATION_REPLIES` replies; nothing for a shard without replicas."""
        if address not in self._replicated:
            return b""
        found = self._confirmations.get(address)
        if found is None:
            # The first number whose key the node holds. A node has many slots, so there is one soon.
            numbers = range(REDIS_CLUSTER_HASH_SLOTS * 8)
            slots = self._slots
            number = next(at for at in numbers if slots[key_slot(b"%d" % at)] == address)
            timeout_ms = int(self._access.reply_timeout_s * 1000 * CONFIRM_SHARE)
            found = pack(("SET", keys.confirmed(number), "", "PX", 1_000))
            found += pack(("WAIT", 1, timeout_ms))
            self._confirmations[address] = found
        return found

    async def confirm(self, address: Address) -> None:
        """Wait until a replica has every earlier write of a node, if it has replicas. See `check_confirmed`."""
        data = self.confirmation(address)
        if data:
            connection = await self.connection(address)
            check_confirmed(await connection.send(data, CONFIRMATION_REPLIES), address)

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

    async def run(
        self,
        commands: Sequence[RedisCommand],
        *,
        confirmed: bool = False,
        unless_on: Address | None = None,
    ) -> list[Any]:
        """Send the commands to their nodes, all at once and in order for each node. Return the replies in order.

        Error replies are returned, not raised. The second word of a command counts as its key. If it is not the key,
        the node redirects the command.

        Args:
            commands: The commands.
            confirmed: Each node has to confirm its commands.
            unless_on: The node that need not, because something else on the same connection will confirm them.

        Raises:
            StoreDown, StoreRefused: a node cannot be reached, refuses the user, or does not confirm.
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
            count = len(positions)
            confirmation = b""
            if confirmed and address != unless_on:
                confirmation = self.confirmation(address)
            extra = CONFIRMATION_REPLIES if confirmation else 0
            answers = await connection.send(data + confirmation, count + extra)
            if confirmation:
                check_confirmed(answers[count:], address)
            for at, reply in zip(positions, answers[:count], strict=True):
                replies[at] = reply

        await asyncio.gather(*(run_on(address, at) for address, at in by_node.items()))
        redirected: dict[Address, None] = {}
        for at, reply in enumerate(replies):
            if isinstance(reply, ReplyError):
                replies[at], address = await self._redirected(commands[at], reply, asked[at])
                if address != asked[at]:
                    redirected[address] = None
        if confirmed and redirected:
            # The node may be new, so ask first whether it has replicas.
            await self.discover()
            for address in redirected:
                await self.confirm(address)
        return replies

    async def _redirected(
        self, command: RedisCommand, reply: Any, asked: Address
    ) -> tuple[Any, Address]:
        """Follow the MOVED and ASK of the node `asked`. Return the reply, and the node that gave it.

        Any other reply is returned as it is, and the last one after too many redirections.
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
        return reply, asked

    async def close(self) -> None:
        """Close all connections."""
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()
