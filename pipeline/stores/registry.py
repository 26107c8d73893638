"""From a pool of the configuration to a store: addresses, credentials, TLS, Sentinel."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from millpond.agents.ports import Store
from millpond.pipeline.settings import read_secret
from millpond.pipeline.stores.redis.cluster_store import ClusterStore
from millpond.pipeline.stores.redis.connection import Access, Address, Connection
from millpond.pipeline.stores.redis.sentinels import primary_of
from millpond.pipeline.stores.redis.store import RedisStore
from millpond.schemas.errors import ConfigError
from millpond.schemas.keys import Partition
from millpond.schemas.rules.pool import Pool


def open_store(pool: Pool, partition: Partition) -> Store[Any]:
    """Return the store of a partition in a pool. Nothing connects before `load`.

    Raises:
        ConfigError: the password file or certificate file of the pool cannot be read.
    """
    if pool.type == "cluster":
        return ClusterStore(partition, addresses(pool), access_of(pool))
    return RedisStore(partition, connector(pool))


def addresses(pool: Pool) -> list[Address]:
    """Return the servers that a pool names."""
    return [Address(host, port) for host, port in pool.servers]


def access_of(pool: Pool) -> Access:
    """Read the credentials, database and TLS settings of a pool.

    Raises:
        ConfigError: the password file or certificate file cannot be read.
    """
    password = pool.password
    if pool.password_file is not None:
        password = read_secret(pool.password_file, f"[pool.{pool.name}] password_file")
    try:
        tls = ssl.create_default_context(cafile=pool.ca_file) if pool.tls else None
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"[pool.{pool.name}] ca_file: {pool.ca_file}: {error}") from error
    return Access(pool.username, password, pool.database, tls)


def connector(pool: Pool) -> Callable[[], Awaitable[Connection]]:
    """Return a function that connects to the server of a pool that takes writes; of a cluster, to its first node."""
    access = access_of(pool)

    async def connect() -> Connection:
        return await Connection.open(await locate(pool, access), access)

    return connect


async def locate(pool: Pool, access: Access) -> Address:
    """Return the server of a pool that takes writes; of a cluster, its first node. See `primary` for the errors."""
    return await primary(pool, access) if pool.type == "sentinel" else addresses(pool)[0]


async def primary(pool: Pool, access: Access) -> Address:
    """Ask the sentinels for the primary's address. They have credentials of their own, or none.

    Raises:
        ConfigError: the password file for the sentinels cannot be read.
        StoreDown: no sentinel answers, or none knows a primary that is up.
        StoreRefused: a sentinel refuses the credentials.
    """
    password = None
    if pool.sentinel_password_file is not None:
        setting = f"[pool.{pool.name}] sentinel_password_file"
        password = read_secret(pool.sentinel_password_file, setting)
    own = access._replace(username=pool.sentinel_username, password=password, database=0)
    return await primary_of(addresses(pool), pool.sentinel or "", own)
