"""Try a pool as its workers will use it, for `millpond config check`. Nothing is written.

1. Connect, log in, select the database; find the primary, or every node of a cluster.
2. Read the state of one partition of each agent. This notices replicas and foreign keys.
3. Queue one command of each kind that the agents write, and discard them. The server checks permissions when it queues.
4. Subscribe to the control channel, which only sessions does.
"""

from __future__ import annotations

from collections.abc import Sequence

from hiredis import ReplyError

from millpond.pipeline.stores.redis.connection import (
    COMMAND_TIMEOUT_S,
    Connection,
    RedisCommand,
    checked,
    error_code,
    pack,
)
from millpond.pipeline.stores.redis.fence import Fence
from millpond.pipeline.stores.redis.location import access_of, addresses, connector
from millpond.pipeline.stores.redis.nodes import Nodes
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules.pool import Pool

NAME = "millpond-check"  # of the topic, message and client whose keys the discarded commands name


async def try_pool(pool: Pool, app: str, agents: Sequence[AgentName]) -> list[str]:
    """Return the commands that the server would refuse, each with its reason.

    Raises:
        ConfigError: a file that the pool names cannot be read.
        StoreDown, StoreRefused: the server is down or a replica, refuses the user, or holds foreign keys.
    """
    refused: list[str] = []
    if pool.type == "cluster":
        await _try_nodes(pool)
    connection = await connector(pool, COMMAND_TIMEOUT_S)()
    try:
        for agent in agents if pool.type != "cluster" else ():
            await Fence(connection, Partition(app, agent, 0)).load()
        for command in _commands(app, agents):
            refused += await _queued_and_discarded(connection, command)
        if "sessions" in agents:
            (reply,) = await connection.call("SUBSCRIBE", pool.channel)
            if isinstance(reply, ReplyError):
                refused.append(f"SUBSCRIBE {pool.channel}: {reply}")
    finally:
        await connection.close()
    return list(dict.fromkeys(refused))


async def _try_nodes(pool: Pool) -> None:
    nodes = Nodes(addresses(pool), access_of(pool))
    try:
        await nodes.discover()
    finally:
        await nodes.close()


async def _queued_and_discarded(connection: Connection, command: RedisCommand) -> list[str]:
    data = pack(("MULTI",)) + pack(command) + pack(("DISCARD",))
    multi, queued, discarded = await connection.send(data, 3)
    checked((multi, discarded), connection.address)
    # A node of a cluster redirects the keys of others. It has checked the user's permissions before.
    if isinstance(queued, ReplyError) and error_code(queued) != "MOVED":
        return [f"{command[0]!s} {command[1]!s}: {queued}"]
    return []


def _commands(app: str, agents: Sequence[AgentName]) -> list[RedisCommand]:
    """Return one command of each kind that the agents send, on keys that no client has."""
    found: list[RedisCommand] = []
    for agent in agents:
        partition = Partition(app, agent, 0)
        found += [
            ("SET", keys.applied(partition), ""),
            ("HSET", keys.journal(partition), "f", ""),
            ("ZADD", keys.due(partition), "LT", 0, NAME),
        ]
        if agent == "sessions":
            found += [
                ("HSET", keys.presence(NAME), "state", 0),
                ("HDEL", keys.node(NAME), NAME),
                ("HGETALL", keys.subscriptions(NAME)),
            ]
            continue
        body = keys.message_body(NAME)
        found += [
            ("HSET", body, "id", NAME),
            ("PEXPIREAT", body, 1),
            ("PERSIST", body),
            ("HDEL", body, "id"),
            ("ZADD", keys.message_index(NAME), "NX", 0, NAME),
            ("ZREM", keys.message_index(NAME), NAME),
            ("ZREMRANGEBYRANK", keys.retained(NAME), 0, -1),
        ]
        if agent == "pubsub":
            name = keys.read_offset(NAME, NAME)
            found += [("SET", name, NAME), ("GETDEL", name)]
    return found
