"""Where the servers of a pool are, and how to log in: addresses, credentials, TLS, Sentinel, the nodes of a cluster."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence

from hiredis import ReplyError

from millpond.pipeline.settings import read_secret
from millpond.pipeline.stores.redis.connection import (
    Access,
    Address,
    Connection,
    checked,
    error_code,
)
from millpond.pipeline.stores.redis.sentinels import primary_of
from millpond.schemas.errors import ConfigError, StoreDown
from millpond.schemas.rules.pool import Pool


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


def connector(
    pool: Pool, reply_timeout_s: float | None = None
) -> Callable[[], Awaitable[Connection]]:
    """Return a function that connects to the server of a pool that takes writes; of a cluster, to one of its nodes."""
    access = access_of(pool)
    if reply_timeout_s is not None:
        access = access._replace(reply_timeout_s=reply_timeout_s)

    async def connect() -> Connection:
        return await Connection.open(await locate(pool, access), access)

    return connect


async def locate(pool: Pool, access: Access, preferred: Address | None = None) -> Address:
    """Return the server of a pool that takes writes; of a cluster, a node that answers, `preferred` if it does.

    Raises:
        StoreDown, StoreRefused: see `primary` and `any_node`. A single server is not asked.
    """
    if pool.type == "sentinel":
        return await primary(pool, access)
    if pool.type == "single":
        return addresses(pool)[0]
    first = [] if preferred is None else [preferred]
    return await any_node([*first, *addresses(pool)], access)


async def any_node(nodes: Sequence[Address], access: Access) -> Address:
    """Return the first of these nodes that answers. One that sees the whole cluster comes before one that is cut off.

    Raises:
        StoreDown: none of them answers.
        StoreRefused: one of them refuses the user, or is not part of a cluster.
    """
    failures, cut_off = [], []
    for node in dict.fromkeys(nodes):
        try:
            if await _sees_the_cluster(node, access):
                return node
        except StoreDown as error:
            failures.append(str(error))
        else:
            cut_off.append(node)
    if cut_off:
        return cut_off[0]
    raise StoreDown("; ".join(failures))


async def _sees_the_cluster(node: Address, access: Access) -> bool:
    connection = await Connection.open(node, access)
    try:
        (reply,) = await connection.call("CLUSTER", "INFO")
    finally:
        await connection.close()
    if isinstance(reply, ReplyError) and error_code(reply) == "NOPERM":
        # A user who may not ask may still use the node.
        return True
    (info,) = checked([reply], node)
    return b"cluster_state:ok" in info


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
