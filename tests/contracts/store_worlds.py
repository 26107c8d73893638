"""One interface to every kind of store under test: open stores, write foreign keys, dump the content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import redis

from millpond.agents.effects import Effect, Output, Refusal, StoreMessage
from millpond.agents.ports import Applied, Store, Transaction
from millpond.pipeline.stores.memory.server import MemoryServer, StoredValue
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.pipeline.stores.redis.cluster_store import ClusterStore
from millpond.pipeline.stores.redis.connection import Access, Address, Connection
from millpond.pipeline.stores.redis.store import RedisStore
from millpond.schemas.keys import Partition
from tests.support.given import published
from tests.support.redis_servers import RedisProcess

PARTITION = Partition("app", "messages", 7)
FAR_MS = 4_000_000_000_000  # the year 2096: nothing expires during a test


class World(Protocol):
    """One kind of store with its server."""

    def store(self, partition: Partition = PARTITION) -> Store[Any]:
        """Return a new store. Several stores of one partition fence each other."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Write a string, as another program would."""
        ...

    def clear(self) -> None:
        """Delete all keys, as an operator would."""
        ...

    def dump(self) -> dict[str, StoredValue]:
        """Return the whole content."""
        ...


class MemoryWorld:
    """The memory store."""

    def __init__(self) -> None:
        self.server = MemoryServer()

    def store(self, partition: Partition = PARTITION) -> Store[Any]:
        return MemoryStore(partition, self.server)

    def put(self, key: str, value: bytes) -> None:
        self.server.values[key] = value

    def clear(self) -> None:
        self.server.values.clear()
        self.server.expires_at.clear()

    def dump(self) -> dict[str, StoredValue]:
        return self.server.dump()


class RedisWorld:
    """One Redis server."""

    def __init__(self, process: RedisProcess, access: Access | None = None) -> None:
        self.address, self.access = Address("127.0.0.1", process.port), access or Access()
        self.clients = [process.client]

    def store(self, partition: Partition = PARTITION) -> Store[Any]:
        return RedisStore(partition, lambda: Connection.open(self.address, self.access))

    def put(self, key: str, value: bytes) -> None:
        self.clients[0].set(key, value)

    def clear(self) -> None:
        for client in self.clients:
            client.flushall()

    def dump(self) -> dict[str, StoredValue]:
        found = {
            key.decode(): entry_of(client, key)
            for client in self.clients
            for key in client.scan_iter(count=1000)
        }
        return dict(sorted(found.items()))


class ClusterWorld(RedisWorld):
    """A Redis Cluster."""

    def __init__(self, processes: Sequence[RedisProcess]) -> None:
        super().__init__(processes[0])
        self.seeds = [Address("127.0.0.1", process.port) for process in processes]
        self.clients = [process.client for process in processes]

    def store(self, partition: Partition = PARTITION) -> Store[Any]:
        return ClusterStore(partition, self.seeds, self.access)

    def put(self, key: str, value: bytes) -> None:
        for client in self.clients:
            try:
                client.set(key, value)
            # MOVED: another node serves the key.
            except redis.ResponseError:
                continue
            return
        raise AssertionError("no node serves the key's slot")


def entry_of(client: Any, key: bytes) -> StoredValue:
    """Return the value and expiry of one key of a Redis server."""
    kind = client.type(key)
    expires_at = client.pexpiretime(key)
    value: Any
    match kind:
        case b"hash":
            fields = client.hgetall(key)
            value = {field.decode(): each for field, each in fields.items()}
        case b"zset":
            pairs = client.zrange(key, 0, -1, withscores=True)
            value = [(member.decode(), int(score)) for member, score in pairs]
        case _:
            value = client.get(key)
    return StoredValue(value, None if expires_at < 0 else expires_at)


def applied(sequence: int, **fields: Any) -> Applied:
    """Return the fence that transaction number `sequence` writes."""
    values: dict[str, Any] = {
        "offset": sequence * 10, "timestamp": 1_700_000_000_000, "cluster_id": "kafka",
        "partition_count": 24, "produced": 0, "now_ms": 1_700_000_000_000, "score": sequence,
        "machine": {"seen_generation": sequence}, **fields,
    }  # fmt: skip
    return Applied(sequence=sequence, **values)


def transaction(
    sequence: int,
    *effects: Effect,
    outputs: Sequence[Output] = (),
    produced: Sequence[int] = (),
) -> Transaction:
    """Return transaction number `sequence` of a partition, from 1 on. It expects the fence of the one before."""
    expected = applied(sequence - 1) if sequence > 1 else None
    return Transaction(expected, applied(sequence), effects, outputs, produced)


def kept(
    offset: int, message_id: str, topic: str, *, expires_at: int | None = None, **fields: object
) -> StoreMessage:
    """Store a message, with its offset as place in the index."""
    event = published(message_id, topic, **fields)
    return StoreMessage(offset, event, 1_000_000 + offset, indexed=True, expires_at=expires_at)


async def commit(store: Store[Any], sent: Transaction) -> list[Refusal]:
    """Pack and commit a transaction, and return its refusals in order."""
    refused = await store.commit(store.pack(sent))
    return sorted(refused, key=lambda refusal: (refusal.offset, refusal.part))
